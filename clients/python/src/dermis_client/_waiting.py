"""Wait until a job has finished, without I/O of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

from dermis_client._events import MAX_SILENCE
from dermis_client._flow import Flow, now, sleep
from dermis_client.errors import APIConnectionError, RateLimitError, ServerError, WaitTimeoutError

STATUS_TIMEOUT = 30.0  # seconds that a status request may take
MAX_EMPTY_STREAMS = 2  # event streams in a row without an event, after which only status requests are used


class JobRecord(Protocol):
    """The record of a job at one moment."""

    @property
    def finished(self) -> bool:
        """Whether the state is final."""


J = TypeVar("J", bound=JobRecord)


def wait_until_finished(
    poll: Callable[[], Flow[J]],
    *,
    timeout: float | None,
    poll_interval: float,
    patience: float,
    report: Callable[[J], None],
    timeout_error: Callable[[J | None], WaitTimeoutError],
    follow: Callable[[float], Flow[J | None]] | None = None,
) -> Flow[J]:
    """Wait until a job has finished: by its events where they arrive, otherwise by status requests.

    Args:
        poll: Sends one status request, without retries: this loop retries, within `patience`.
        timeout: Seconds for the whole wait; None for no limit.
        poll_interval: Seconds between status requests.
        patience: Seconds without any response before giving up; shorter outages, such as a restart, are tolerated.
        report: Called with every record.
        timeout_error: Returns the error of an expired timeout for the last record.
        follow: Reports the records of one event stream until a deadline (of the clock of `now`) and returns the last
            one; None if there was none.

    Returns:
        The record in its final state.

    Raises:
        WaitTimeoutError: The timeout expired.
        APIConnectionError, ServerError, RateLimitError: No response within `patience`.
    """
    last_contact = yield from now()
    deadline = math.inf if timeout is None else last_contact + timeout
    empty_streams = 0
    record: J | None = None
    while True:
        try:
            record = yield from poll()
        except (APIConnectionError, ServerError, RateLimitError) as error:
            if (yield from now()) - last_contact > patience:
                raise
            pause = max(poll_interval, min(getattr(error, "retry_after", None) or 0.0, patience))
        else:
            last_contact, pause = (yield from now()), poll_interval
            report(record)
            # An event stream can be silent for MAX_SILENCE: close to the deadline, status requests are more exact.
            near_deadline = deadline - last_contact <= MAX_SILENCE
            if follow and not record.finished and not near_deadline and empty_streams < MAX_EMPTY_STREAMS:
                streamed = yield from follow(deadline)
                if streamed is None:
                    empty_streams += 1
                else:
                    empty_streams, record, last_contact = 0, streamed, (yield from now())
            if record.finished:
                return record
        remaining = deadline - (yield from now())
        if remaining <= 0:
            raise timeout_error(record)
        yield from sleep(min(pause, remaining))
