"""How many uploaded images may be compared with the training images: each answer tells a little of who is among them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from services.problems import ProblemError

_WINDOW_SECONDS = 60.0


class Comparisons:
    """Counts the images of the last minute. Use it on one event loop."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._calls: deque[tuple[float, int]] = deque()

    def add(self, images: int) -> None:
        """Count a call of so many images. ProblemError if they are too many by now; they do not count then."""
        now = self._clock()
        while self._calls and self._calls[0][0] <= now - _WINDOW_SECONDS:
            self._calls.popleft()
        if sum(count for _, count in self._calls) + images > self._most:
            wait = round(self._calls[0][0] + _WINDOW_SECONDS - now) + 1 if self._calls else int(_WINDOW_SECONDS)
            raise ProblemError(
                "too-many-requests",
                f"at most {self._most} images a minute are compared with the training images; try again later",
                headers={"Retry-After": str(wait)},
            )
        self._calls.append((now, images))
