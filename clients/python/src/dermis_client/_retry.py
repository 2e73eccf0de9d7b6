"""Rules for retries: which failures are retried, and after which delay. Pure functions."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

FIRST_DELAY = 0.5  # seconds
MAX_DELAY = 8.0  # seconds
MAX_SECONDS = 1e9  # a longer Retry-After is reduced to this, so that clock arithmetic cannot overflow
MAX_RETRY_AFTER = 120.0  # seconds; if the service asks for more, there is no retry and the caller decides


def after_status(status: int, idempotent: bool, kind: str = "") -> bool:
    """Return whether to retry after this HTTP status: always if the service has refused the request because it was busy.

    After 500, 502, 504 and a 503 that is not `overloaded` the request may have been executed, so that only an idempotent one
    is repeated: the service also answers 503 if it has lost its database, or cannot record the request, after a change.

    Args:
        status: The status.
        idempotent: Whether sending the request twice has the same effect as sending it once.
        kind: The kind of the problem; "" if it is not known.
    """
    refused = status in {408, 429} or (status == 503 and kind == "overloaded")
    return refused or (idempotent and status in {500, 502, 503, 504})


def after_error(error: httpx.RequestError, idempotent: bool) -> bool:
    """Return whether to retry after this error: always if nothing was sent yet, otherwise only an idempotent request."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return True
    return idempotent and isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def delay(attempt: int, retry_after: float | None = None, jitter: float | None = None) -> float | None:
    """Return the seconds to wait after a failed attempt: exponential backoff with jitter.

    Args:
        attempt: Number of the failed attempt, from 0.
        retry_after: Seconds that the service asked to wait; the delay is never shorter.
        jitter: 0 to 1; by default random, so that many clients of one service do not return at the same moment.

    Returns:
        Seconds, or None if the service asked for more than MAX_RETRY_AFTER: do not retry.
    """
    longest = min(FIRST_DELAY * 2.0 ** min(attempt, 30), MAX_DELAY)
    backoff = longest * (0.5 + 0.5 * (random.random() if jitter is None else jitter))
    if retry_after is None:
        return backoff
    return None if retry_after > MAX_RETRY_AFTER else max(backoff, retry_after)


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds of a Retry-After header (a number or an HTTP date); None if it is absent or invalid."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text), MAX_SECONDS)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - (now or datetime.now(UTC))).total_seconds()), MAX_SECONDS)
