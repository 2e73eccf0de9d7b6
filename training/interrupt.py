"""Ctrl-C and SIGTERM as an event that a training loop checks, so that it can finish its step and save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requested(ignore_repeated: bool) -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets. Outside of the main thread it is never set.

    Args:
        ignore_repeated: Ignore further signals. Otherwise a second signal has its usual effect. torchrun sends its
            processes more than one signal, and kills those that have not ended after half a minute.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        event.set()
        if not ignore_repeated:
            for each, handler in previous.items():
                signal.signal(each, handler)

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
