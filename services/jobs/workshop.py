"""What the work on jobs needs, and how it waits: for services through their restarts, never longer than the job is wanted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.attack import Exposure
from dermis.bundle import Bundle
from dermis.dataset.store import Store
from dermis.errors import StorageError
from services.errors import InferenceFailedError, InferenceUnavailableError
from services.jobs.table import JobTable
from services.models import Models
from services.pixels import Classify, FindNearest
from services.projections import Project
from services.samples import Generate

# A generator that restarts compiles for a while; one that stays away is not waited for for ever.
_PATIENCE_SECONDS = 300.0
_FAILURES = 3
_FIRST_PAUSE_SECONDS = 0.5
POLL_SECONDS = 0.25


class StoppedError(Exception):
    """The job is to stop: it was cancelled or deleted, or has failed elsewhere."""


class ShutdownError(BaseException):
    """The process is to stop. Not an Exception, for DBOS must not record it as the outcome of the workflow."""


@dataclass(frozen=True)
class Workshop:
    """What the work needs, from the composition root."""

    table: JobTable
    models: Models
    generate: Generate
    identity: Callable[[str], Awaitable[Mapping[str, str]]]  # by bundle digest: what runs it, for the manifest
    classify: Classify
    classifier_identity: Callable[[Bundle], Awaitable[Mapping[str, str]]]
    nearest: FindNearest
    expose: Callable[[Bundle, NDArray[np.float32]], Awaitable[Exposure]]
    index_identity: Callable[[Bundle], Awaitable[Mapping[str, str]]]
    project: Project
    projection_steps: Callable[[str], Awaitable[int]]  # by ticket: steps done of a call of `project`
    cancel_projection: Callable[[str], Awaitable[None]]
    loop: asyncio.AbstractEventLoop  # where these run
    storage: str
    min_free_bytes: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def store(self, job_id: str) -> Store:
        """Where the job's files lie."""
        return Store(f"{self.storage.rstrip('/')}/{job_id}")

    def check_space(self) -> None:
        """StorageError when so little is free that the jobs database would soon be unable to write."""
        free = Store(self.storage).free_bytes()
        if free is not None and free < self.min_free_bytes:
            raise StorageError(
                f"the storage of the datasets has {free >> 20} MiB left; free some space and ask again", "storage-full"
            )


def patiently(
    shop: Workshop, job_id: str, call: Callable[[], Awaitable[Any]], while_waiting: Callable[[], None] | None = None
) -> Any:
    """The answer of a service, through its restarts; ends early when the job or the process is to end.

    `while_waiting` is called a few times a second; an exception from it gives the call up.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    failures, pause = 0, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return ask(shop, call(), while_waiting)
        except InferenceUnavailableError:
            if time.monotonic() > deadline:
                raise
        except InferenceFailedError:
            failures += 1
            if failures >= _FAILURES:
                raise
        if shop.stopping.wait(pause):
            raise ShutdownError
        if shop.table.must_stop(job_id):
            raise StoppedError
        pause = min(2 * pause, 10.0)


def ask(shop: Workshop, awaitable: Awaitable[Any], while_waiting: Callable[[], None] | None = None) -> Any:
    """Wait in a worker's thread for what happens on the event loop; ShutdownError if the process is to stop meanwhile."""

    async def call() -> Any:
        return await awaitable

    future: Future[Any] = asyncio.run_coroutine_threadsafe(call(), shop.loop)
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except FutureTimeoutError:
            if future.done():  # the call itself timed out
                raise
            if shop.stopping.is_set():
                future.cancel()
                raise ShutdownError from None
            if while_waiting is not None:
                try:
                    while_waiting()
                except BaseException:
                    future.cancel()
                    raise
