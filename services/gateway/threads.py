"""Threads of the gateway for calls that block, divided so that calls which do not return keep no others waiting."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from services.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

_OTHER_READS = 8
_OTHER_CALLS = 64


class Threads:
    """Threads for one kind of calls. They start when they are needed.

    Args:
        number: The maximum number; further calls wait.
        name: The kind of calls, for the names of the threads.
    """

    def __init__(self, number: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(number, thread_name_prefix=f"dermis-{name}")

    async def run(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread, as `asyncio.to_thread` does."""
        call = partial(copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def close(self) -> None:
        """End the threads; those of calls that have not returned end after these."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def storage_threads(settings: Settings) -> Threads:
    """Threads for what routes read from the storage: one for each download, and some for lists of files and single images."""
    return Threads(settings.max_downloads + _OTHER_READS, "storage")


def image_threads() -> Threads:
    """Threads that encode images. More than these would make every image slower, as they share the processors."""
    return Threads(min(32, (os.cpu_count() or 1) + 4), "images")


def allow_blocked_calls(settings: Settings) -> None:
    """Give `asyncio.to_thread` enough threads in the running loop, even when many are blocked by a stalled database.

    Its default of a few threads for each processor would leave none. Each open stream of events can hold one. The loop ends
    them when it is closed.
    """
    pool = ThreadPoolExecutor(_OTHER_CALLS + settings.max_event_streams, thread_name_prefix="dermis-calls")
    asyncio.get_running_loop().set_default_executor(pool)
