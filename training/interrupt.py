"""Ctrl-C and SIGTERM as a wish that a loop looks at, so that it can finish its step and save."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requested(insist: bool) -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal does what it always does.

    With `insist`, further signals are ignored: torchrun signals its processes in its own way and more than once, and
    kills those that have not ended half a minute later.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        event.set()
        if not insist:
            for each, handler in previous.items():
                signal.signal(each, handler)

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
