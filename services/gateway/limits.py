"""Limits of the calls at one time, and of what a tenant does in a minute. A call above a limit is refused at once."""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from services.problems import ProblemError
from services.settings import Settings

_WINDOW_SECONDS = 60.0
_WEBHOOK_RETRIES = 60
_STUDY_RESULTS = 4
_STUDY_IMAGES = 8
_SHARE = 3  # calls of a tenant for each one that is free
_RATE_HALF_LIFE_SECONDS = 30.0
_RATE_CALLS = 20  # the first calls say little about the rate: a generator is slow until it has warmed up
_RATE_SECONDS = 5.0
_RATE_IMAGES = 16
_PERIOD_SECONDS = 3.0
_OVERLOADED_SHARE = 0.1  # of the limit of the wait, while more images are requested than can be made


class Limiter:
    """Limits how many calls are processed at the same time, for all tenants together and for each of them.

    Args:
        limit: The maximum number of calls.
        kind: Kind of the problem document of a refused call (`services.problems.KINDS`).
        detail: Message of the refusal.
        retry_after: Seconds after which a refused call may be repeated.
        shared: Whether there can be several tenants. Then a tenant with calls in progress may have a further one only while it
            has fewer than three times as many as are free, and leaves one free. So a tenant alone can have three quarters of
            the limit, several can have equal parts, and a tenant without a call soon finds a free one.
    """

    def __init__(self, limit: int, kind: str, detail: str, retry_after: int, *, shared: bool = False) -> None:
        self._limit, self._kind, self._detail, self._retry_after = limit, kind, detail, retry_after
        self._shared = shared
        self._active: Counter[str] = Counter()  # by tenant; only those that have calls
        self._lock = threading.Lock()

    def acquire(self, tenant: str) -> None:
        """Count a call of a tenant until `release`.

        Raises:
            ProblemError: At the limit of all tenants, or at the share of this one.
        """
        with self._lock:
            free, own = self._limit - self._active.total(), self._active[tenant]
            if free <= 0:
                raise self._refused(self._detail)
            if self._shared and own and (free == 1 or own >= _SHARE * free):
                raise self._refused(
                    f"{self._detail} (this tenant has {own} of {self._limit}; the others are kept for other tenants)"
                )
            self._active[tenant] = own + 1

    def release(self, tenant: str) -> None:
        """Stop counting a call of a tenant."""
        with self._lock:
            self._active[tenant] -= 1
            if not self._active[tenant]:
                del self._active[tenant]

    @contextmanager
    def hold(self, tenant: str) -> Iterator[None]:
        """Count a call of a tenant for the time of a `with` block.

        Raises:
            ProblemError: At the limit of all tenants, or at the share of this one.
        """
        self.acquire(tenant)
        try:
            yield
        finally:
            self.release(tenant)

    def _refused(self, detail: str) -> ProblemError:
        return ProblemError(self._kind, detail, headers={"Retry-After": str(self._retry_after)})


@dataclass
class _Period:
    """A time in which images were waiting without a pause."""

    seconds: float = 0.0
    waiting_seconds: float = 0.0  # the sum of the times of all images
    calls: int = 0
    completed: int = 0  # images


@dataclass
class _Rate:
    """Images completed per second, weighted towards the last half minute of the time that is measured."""

    calls: int = 0
    completed: float = 0.0
    seconds: float = 0.0

    def add(self, period: _Period) -> None:
        """Count a period, and let earlier ones weigh less."""
        weight = 0.5 ** (period.seconds / _RATE_HALF_LIFE_SECONDS)
        self.calls += period.calls
        self.completed = self.completed * weight + period.completed
        self.seconds = self.seconds * weight + period.seconds

    @property
    def value(self) -> float | None:
        """None as long as too little was measured."""
        if self.calls < _RATE_CALLS or self.seconds < _RATE_SECONDS:
            return None
        return self.completed / self.seconds


class WaitLimiter:
    """Refuses calls for images of a model that would wait too long for those requested before. Use it on one event loop.

    Only a tenant that has images waiting is refused: the wait of another one is limited by its share of the calls (`Limiter`).

    A number of calls says little about the time to wait: a graphics processor makes in a second what a processor makes in a
    minute, and a call can ask for one image or for many. So the rate is measured, in periods with many waiting images: with few
    of them batches are small and slow, and shards of datasets have the rest of each batch. A period ends when no image is
    waiting or after some seconds, not when fewer are waiting: that is when images are completed, so their number would be too
    high for the time.

    A queue evens out bursts. Where more is requested for a long time than can be made, it would be full all the time, and make
    each call slow without serving more of them. Whether that is so cannot be seen from a queue that refuses calls. So a second
    one is counted, as if no call was refused (the virtual queue of Kunniyur and Srikant, "An adaptive virtual queue (AVQ)
    algorithm for active queue management", 2004). Once it is longer than the limit, and has not been empty for
    so long, calls may wait for a tenth of the limit only, until it is empty.

    Args:
        limit: Seconds that a call may wait. A call of a tenant that has no other is accepted, whatever its size.
        clock: Seconds that never decrease.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._images: Counter[str] = Counter()  # of all calls, by tenant; only those that have some
        self._waiting = 0  # requested from the model
        self._full, self._short = _Rate(), _Rate()  # with a queue half as long as it may be: normally, overloaded
        self._period = _Period()
        self._requested = 0.0  # images that would be waiting if no call was refused
        self._overloaded = False
        self._changed = self._requested_since = clock()

    @property
    def rate(self) -> float | None:
        """Images per second; None as long as too little was measured. Both measurements have a rate that is surely possible."""
        full, short = self._full.value, self._short.value
        return full if full is None or short is None else max(full, short)

    @property
    def limit(self) -> float:
        """Seconds that a call may wait at this moment."""
        return _OVERLOADED_SHARE * self._limit if self._overloaded else self._limit

    @contextmanager
    def hold(self, tenant: str, images: int) -> Iterator[Callable[[], None]]:
        """Count a call of a tenant for this number of images for the time of a `with` block.

        Yields:
            A function to call when the images are requested from the model. Until then a quota may still refuse the call, and
            it is no load.

        Raises:
            ProblemError: It would wait longer than the limit.
        """
        self._advance()
        try:
            self._check(tenant)
        except ProblemError:
            self._request(images)
            raise
        self._images[tenant] += images
        begun = completed = False

        def begin() -> None:
            nonlocal begun
            self._advance()
            self._request(images)
            self._waiting += images
            begun = True

        try:
            yield begin
            completed = True
        finally:
            self._advance()
            if begun:
                self._waiting -= images
                self._end_call(images if completed else 0)
                if not completed:  # its caller has gone, or the generator has failed: the images are no load
                    self._requested = max(0.0, self._requested - images)
            self._images[tenant] -= images
            if not self._images[tenant]:
                del self._images[tenant]

    def _check(self, tenant: str) -> None:
        """Raise ProblemError if the next call of a tenant would wait longer than the limit."""
        rate, own, waiting, limit = self.rate, self._images[tenant], self._images.total(), self.limit
        if rate is None or not own:
            return
        wait = waiting / rate if rate > 0 else math.inf
        if wait > limit:
            seconds = max(wait - limit, self._requested / rate if self._overloaded and rate > 0 else 0.0)
            raise ProblemError(
                "overloaded",
                f"{waiting} images were requested before ({own} by this tenant), which is more than "
                f"{limit:g} seconds of waiting",
                headers={"Retry-After": str(min(30, max(1, math.ceil(min(seconds, 60.0)))))},
            )

    def _request(self, images: int) -> None:
        """Count a call in the virtual queue, which is limited so that an overload is over soon after its end."""
        rate = self.rate
        if rate is None:
            return
        longest = self._limit * rate
        if not self._requested:
            self._requested_since = self._changed
        elif self._requested > longest and self._changed - self._requested_since > self._limit:
            self._overloaded = True
        self._requested = min(self._requested, longest) + images

    def _end_call(self, completed: int) -> None:
        """Count a call that is no longer waiting, and measure the rates at the end of a period."""
        period = self._period
        period.calls += completed > 0
        period.completed += completed
        if self._waiting and period.seconds < _PERIOD_SECONDS:
            return
        self._period = _Period()
        rate, waiting = self.rate, period.waiting_seconds / period.seconds if period.seconds else 0.0
        short = _RATE_IMAGES if rate is None else rate * self._limit * _OVERLOADED_SHARE / 2
        full = _RATE_IMAGES if rate is None else rate * self._limit / 2
        for measured, length in ((self._full, full), (self._short, short)):
            if waiting >= min(_RATE_IMAGES, length):
                measured.add(period)

    def _advance(self) -> None:
        """Count the time since the last change."""
        now = self._clock()
        seconds = now - self._changed
        self._changed = now
        if self._waiting:
            self._period.seconds += seconds
            self._period.waiting_seconds += seconds * self._waiting
        rate = self.rate
        if rate is not None:
            self._requested = max(0.0, self._requested - seconds * rate)
            self._overloaded &= self._requested > 0


class MinuteLimiter:
    """Limits the number of things, such as images, of each tenant in a minute. Use it on one event loop.

    Args:
        limit: The maximum number.
        what: What is limited, for the message of the refusal.
        clock: Seconds that never decrease.
    """

    def __init__(self, limit: int, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._what, self._clock = limit, what, clock
        self._calls: defaultdict[str, deque[tuple[float, int]]] = defaultdict(deque)  # of each tenant

    def add(self, tenant: str, number: int = 1) -> None:
        """Count a call with this number of things.

        Raises:
            ProblemError: Above the limit. A refused call is not counted.
        """
        if number > self._limit:
            raise ProblemError(
                "request-too-large", f"at most {self._limit} {self._what} in a minute, and this request has {number}"
            )
        now = self._clock()
        calls = self._calls[tenant]
        while calls and calls[0][0] <= now - _WINDOW_SECONDS:
            calls.popleft()
        if sum(count for _, count in calls) + number > self._limit:
            wait = round(calls[0][0] + _WINDOW_SECONDS - now) + 1
            raise ProblemError(
                "too-many-requests",
                f"at most {self._limit} {self._what} in a minute; try again later",
                headers={"Retry-After": str(wait)},
            )
        calls.append((now, number))


@dataclass(frozen=True)
class GatewayLimits:
    """The limits of one gateway."""

    images: Limiter
    image_wait: Callable[[str], WaitLimiter]  # of a model by its digest: each has its own rate
    uploads: Limiter
    heat_maps: Limiter
    study_results: Limiter
    study_images: Limiter
    event_streams: Limiter
    downloads: Limiter
    comparisons: MinuteLimiter  # each reveals a little about which images are training images
    webhook_retries: MinuteLimiter

    @classmethod
    def of(cls, settings: Settings) -> GatewayLimits:
        """The limits of the settings."""
        shared = settings.auth != "none"
        return cls(
            images=Limiter(
                settings.max_waiting_image_calls,
                "overloaded",
                "too many calls are waiting for images; try again",
                retry_after=5,
                shared=shared,
            ),
            image_wait=functools.cache(lambda _: WaitLimiter(settings.max_image_wait_seconds)),
            uploads=Limiter(
                settings.max_upload_calls,
                "overloaded",
                "too many calls with uploads are being processed; try again",
                retry_after=5,
                shared=shared,
            ),
            heat_maps=Limiter(
                settings.max_heat_map_calls,
                "overloaded",
                "too many calls with heat maps are being processed; try again, or leave heat_map out",
                retry_after=10,
                shared=shared,
            ),
            study_results=Limiter(
                _STUDY_RESULTS,
                "overloaded",
                "too many results of reader studies are being computed",
                retry_after=5,
                shared=shared,
            ),
            study_images=Limiter(
                _STUDY_IMAGES,
                "overloaded",
                "too many readers of studies are loading images",
                retry_after=1,
                shared=shared,
            ),
            event_streams=Limiter(
                settings.max_event_streams,
                "too-many-requests",
                "too many event streams are open; close some, or try again",
                retry_after=10,
                shared=shared,
            ),
            downloads=Limiter(
                settings.max_downloads,
                "overloaded",
                "too many files are being downloaded; try again",
                retry_after=5,
                shared=shared,
            ),
            comparisons=MinuteLimiter(
                settings.max_compared_per_minute, "images of this tenant are compared with the training images"
            ),
            webhook_retries=MinuteLimiter(
                _WEBHOOK_RETRIES, "messages of the webhooks of this tenant are sent again on request"
            ),
        )
