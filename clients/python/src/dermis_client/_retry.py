"""When to try again, and after how long. Pure functions."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

FIRST_DELAY = 0.5  # seconds
LONGEST_DELAY = 8.0
FOREVER = 1e9  # seconds; a longer Retry-After is cut to this, a number that clocks can still add
LONGEST_RETRY_AFTER = 120.0  # a service that asks for more than this is left alone: the caller decides


def after_status(status: int, idempotent: bool) -> bool:
    """Whether an answer is worth another try: the service was busy or away, or it failed and asking is harmless."""
    return status in {408, 429, 502, 503, 504} or (status == 500 and idempotent)


def after_error(error: httpx.RequestError, idempotent: bool) -> bool:
    """Whether a broken connection is worth another try: always if nothing can have been sent yet, else if harmless."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):
        return True
    return idempotent and isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def delay(attempt: int, retry_after: float | None = None, jitter: float | None = None) -> float | None:
    """Seconds to wait after failed attempt 0, 1, 2...: doubling, with jitter, never less than the service asked for.

    jitter: 0..1, drawn anew by default, so that many clients of one service do not come back at one moment.
    None means: it asked for longer than LONGEST_RETRY_AFTER, do not try again.
    """
    longest = min(FIRST_DELAY * 2.0 ** min(attempt, 30), LONGEST_DELAY)
    own = longest * (0.5 + 0.5 * (random.random() if jitter is None else jitter))
    if retry_after is None:
        return own
    return None if retry_after > LONGEST_RETRY_AFTER else max(own, retry_after)


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds from a Retry-After header, in either of its forms (seconds, HTTP date); None if absent or unreadable."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return min(float(text), FOREVER)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return min(max(0.0, (moment - (now or datetime.now(UTC))).total_seconds()), FOREVER)
