"""Limits of the calls at one time and of the comparisons per minute. A call above a limit is refused at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from services.problems import ProblemError
from services.settings import Settings

_WINDOW_SECONDS = 60.0


class Limiter:
    """Limits how many calls are processed at the same time.

    Args:
        limit: The maximum number of calls.
        kind: Kind of the problem document of a refused call (`services.problems.KINDS`).
        detail: Message of the refusal.
        retry_after: Seconds after which a refused call may be repeated.
    """

    def __init__(self, limit: int, kind: str, detail: str, retry_after: int) -> None:
        self._limit, self._kind, self._detail, self._retry_after = limit, kind, detail, retry_after
        self._active = 0
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """Count a call until `release`.

        Raises:
            ProblemError: At the limit.
        """
        with self._lock:
            if self._active >= self._limit:
                raise ProblemError(self._kind, self._detail, headers={"Retry-After": str(self._retry_after)})
            self._active += 1

    def release(self) -> None:
        """Stop counting a call."""
        with self._lock:
            self._active -= 1

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Count a call for the time of a `with` block.

        Raises:
            ProblemError: At the limit.
        """
        self.acquire()
        try:
            yield
        finally:
            self.release()


class ComparisonLimiter:
    """Limits how many uploaded images are compared with the training images per minute. Use it on one event loop.

    Each comparison reveals a little about which images are training images.
    """

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._calls: deque[tuple[float, int]] = deque()

    def add(self, images: int) -> None:
        """Count the images of a call.

        Raises:
            ProblemError: Above the limit. The images of a refused call are not counted.
        """
        now = self._clock()
        while self._calls and self._calls[0][0] <= now - _WINDOW_SECONDS:
            self._calls.popleft()
        if sum(count for _, count in self._calls) + images > self._limit:
            wait = round(self._calls[0][0] + _WINDOW_SECONDS - now) + 1 if self._calls else int(_WINDOW_SECONDS)
            raise ProblemError(
                "too-many-requests",
                f"at most {self._limit} images a minute are compared with the training images; try again later",
                headers={"Retry-After": str(wait)},
            )
        self._calls.append((now, images))


@dataclass(frozen=True)
class GatewayLimits:
    """The limits of one gateway."""

    images: Limiter
    uploads: Limiter
    heat_maps: Limiter
    event_streams: Limiter
    comparisons: ComparisonLimiter

    @classmethod
    def of(cls, settings: Settings) -> GatewayLimits:
        """The limits of the settings."""
        return cls(
            images=Limiter(
                settings.max_waiting_image_calls, "overloaded", "too many calls are waiting for images", retry_after=5
            ),
            uploads=Limiter(
                settings.max_upload_calls,
                "overloaded",
                "too many calls with uploads are being processed; try again",
                retry_after=5,
            ),
            heat_maps=Limiter(
                settings.max_heat_map_calls,
                "overloaded",
                "too many calls with heat maps are being processed; try again, or leave heat_map out",
                retry_after=10,
            ),
            event_streams=Limiter(
                settings.max_event_streams, "too-many-requests", "too many event streams are open", retry_after=10
            ),
            comparisons=ComparisonLimiter(settings.max_compared_per_minute),
        )
