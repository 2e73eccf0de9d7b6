"""Limits of the calls at one time, and of what a tenant does in a minute. A call above a limit is refused at once."""

from __future__ import annotations

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
_RATE_SECONDS = 3.0
_RATE_IMAGES = 8
_PERIOD_SECONDS = 3.0
# In an overload a call may wait for so many times the time of a fast call: with twice as many images as are made in this time,
# the device is hardly idle, also if it makes several at once (the bandwidth-delay product of Cardwell et al., "BBR", 2016).
_OVERLOADED_CALLS = 2.0
# In a long overload every call waits, so that a fast call takes longer and longer and with it the limit grows, far beyond what
# keeps the device busy. So the limit is at most so many times the time of a fast call before the overload. If the device
# becomes slower meanwhile, and even a fast call takes longer than this, the limit is the time of a fast call: with less the
# batches would be small, and the slow device would make much less than it can.
_CALM_CALLS = 4.0
_FAST_IMAGES = 4  # a call for more is as fast as its part with so many
_FAST_SECONDS = 30.0  # the fastest call of this time or twice of it counts
_KEPT_SHARE = 0.4  # of the limit: the queue of requested images in an overload, which has to become empty for its end
# An overload begins if the queue of requested images is longer than this share of the limit, and has not been empty for as
# long as the limit: that of a burst is shorter then. Soon after an overload a shorter one is enough: if hardly more is
# requested than can be made, the queue becomes empty often.
_BEGIN_SHARE, _AGAIN_SHARE = 0.5, 0.1
_AGAIN_SECONDS = 10.0
_BUSY_SHARE = 0.05  # of the limit of the wait: calls wait for so long that jobs have to yield
_BUSY_SECONDS = 10.0  # after the last call
_SERVED_HALF_LIFE_SECONDS = 10.0
_STARVED_SHARE = 0.5  # of the images of a mean tenant
_FORGOTTEN_IMAGES = 0.5
_STARVED_CALLS = 2  # of all tenants at one time


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


class _Fastest:
    """The time of the fastest call of the last half minute, or minute, in which there were calls."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._present = self._last = math.inf

    def add(self, seconds: float, now: float) -> None:
        """Count a call that has ended now."""
        if now - self._since > _FAST_SECONDS:
            self._last, self._present = self._present, math.inf
            self._since = now
        self._present = min(self._present, seconds)

    @property
    def seconds(self) -> float:
        """Infinite if there was no call."""
        return min(self._present, self._last)


class WaitLimiter:
    """Refuses calls for images of a model that would wait too long for those requested before. Use it on one event loop.

    Normally only a tenant that has images waiting is refused: the wait of another one is limited by its share of the calls
    (`Limiter`).

    A number of calls says little about the time to wait: a graphics processor makes in a second what a processor makes in a
    minute, and a call can ask for one image or for many. So the rate is measured, in periods with many waiting images: with few
    of them batches are small and slow, and shards of datasets have the rest of each batch. A period ends when no image is
    waiting or after some seconds, not when fewer are waiting: that is when images are completed, so their number would be too
    high for the time.

    A queue evens out bursts. Where more is requested for a long time than can be made, it would be full all the time, and make
    each call slow without serving more of them. Whether that is so cannot be seen from a queue that refuses calls. So a second
    one is counted, as if no call was refused (the virtual queue of Kunniyur and Srikant, "An adaptive virtual queue (AVQ)
    algorithm for active queue management", 2004). Once it is longer than half of the limit, and has not been empty
    for as long as the limit, there is an overload, until it is empty. Then calls may wait only for twice the time of a fast
    call, and only for a few times that of a fast call before the overload, so that accepted ones are nearly as fast as without
    overload. One call of each tenant would already be a longer queue, so in an overload a tenant without images waiting may be
    refused too, unless it has received less than half as many images as the mean tenant in the last seconds.

    Args:
        limit: Seconds that a call may wait. Normally a call of a tenant that has no other is accepted, whatever its size.
        clock: Seconds that never decrease.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._images: Counter[str] = Counter()  # of all calls, by tenant; only those that have some
        self._served: dict[str, float] = {}  # images of accepted calls, by tenant; earlier ones count less
        self._served_until = clock()
        self._fast, self._calm = _Fastest(clock()), _Fastest(clock())  # of all, and of those requested without overload
        self._starved = 0  # calls that were accepted because their tenant had received little
        self._waiting = 0  # requested from the model
        self._full, self._any = _Rate(), _Rate()  # with a queue half as long as it may be, and with any queue
        self._period = _Period()
        self._requested = 0.0  # images that would be waiting if no call was refused
        self._overloaded = False
        self._last_overloaded = -math.inf
        self._changed = self._empty_until = clock()

    @property
    def rate(self) -> float | None:
        """Images per second; None as long as too little was measured. Both measurements have a rate that is surely possible."""
        full, least = self._full.value, self._any.value
        return full if full is None or least is None else max(full, least)

    @property
    def limit(self) -> float:
        """Seconds that a call may wait at this moment."""
        if not self._overloaded:
            return self._limit
        fast = self._fast.seconds
        return min(self._limit, max(fast, min(_OVERLOADED_CALLS * fast, _CALM_CALLS * self._calm.seconds)))

    @property
    def is_overloaded(self) -> bool:
        """Whether more images are requested than can be made. It can be read in any thread, also while there are no calls."""
        rate, seconds = self.rate, self._clock() - self._changed
        return self._overloaded and rate is not None and self._requested > seconds * rate

    @property
    def is_busy(self) -> bool:
        """Whether jobs have to yield: there is an overload, or calls wait for a moment. It can be read in any thread."""
        rate = self.rate or self._any.value
        if self._clock() - self._changed > _BUSY_SECONDS and not self._waiting:
            return False
        return self.is_overloaded or (rate is not None and self._waiting > _BUSY_SHARE * self._limit * rate)

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
            starved = self._check(tenant)
        except ProblemError:
            self._request(images)
            raise
        self._images[tenant] += images
        self._starved += starved
        begun: float | None = None
        completed = calm = False

        def begin() -> None:
            nonlocal begun, calm
            self._advance()
            calm = not self._overloaded
            self._request(images)
            self._waiting += images
            self._forget()
            self._served[tenant] = self._served.get(tenant, 0.0) + images
            begun = self._changed

        try:
            yield begin
            completed = True
        finally:
            self._advance()
            self._starved -= starved
            if begun is not None:
                self._waiting -= images
                if completed:
                    self._measure_call(self._changed - begun, images, calm)
                else:  # its caller has gone, or the generator has failed: the images are no load
                    self._requested = max(0.0, self._requested - images)
                    self._served[tenant] = max(0.0, self._served.get(tenant, 0.0) - images)
                self._end_call(images if completed else 0)
            self._images[tenant] -= images
            if not self._images[tenant]:
                del self._images[tenant]

    def refuse(self, images: int) -> None:
        """Count a call for this number of images that another limit has refused: it is load too."""
        self._advance()
        self._request(images)

    def _check(self, tenant: str) -> bool:
        """Raise ProblemError if the next call of a tenant would wait too long. Return whether only a starved one may do so."""
        rate, own, waiting, limit = self.rate, self._images[tenant], self._images.total(), self.limit
        if rate is None or (not own and not self._overloaded):
            return False
        wait = waiting / rate if rate > 0 else math.inf
        if wait > limit:
            if not own and self._starved < _STARVED_CALLS and self._is_starved(tenant):
                return True
            seconds = max(wait - limit, self._limit if self._overloaded else 0.0)
            raise ProblemError(
                "overloaded",
                f"{waiting} images were requested before ({own} by this tenant), which is more than "
                f"{round(limit, 2):g} seconds of waiting",
                headers={"Retry-After": str(min(30, max(1, math.ceil(min(seconds, 60.0)))))},
            )
        return False

    def _is_starved(self, tenant: str) -> bool:
        """Whether a tenant has received much less than the others."""
        self._forget()
        tenants = len(self._served.keys() | {tenant})
        return self._served.get(tenant, 0.0) * tenants <= _STARVED_SHARE * sum(self._served.values())

    def _forget(self) -> None:
        """Let the images that tenants have received count less the longer ago it was."""
        weight = 0.5 ** ((self._changed - self._served_until) / _SERVED_HALF_LIFE_SECONDS)
        self._served = {name: n * weight for name, n in self._served.items() if n * weight > _FORGOTTEN_IMAGES}
        self._served_until = self._changed

    def _measure_call(self, seconds: float, images: int, calm: bool) -> None:
        """Remember the time of the fastest calls."""
        fast = seconds * min(1.0, _FAST_IMAGES / images)
        self._fast.add(fast, self._changed)
        if calm:
            self._calm.add(fast, self._changed)

    def _request(self, images: int) -> None:
        """Count a call in the virtual queue, which is limited so that an overload is over soon after its end."""
        rate = self.rate
        if rate is None:
            return
        longest = self._limit * rate
        if self._changed - self._last_overloaded < _AGAIN_SECONDS:
            self._overloaded |= self._requested > _AGAIN_SHARE * longest
        elif self._changed - self._empty_until > self._limit:
            self._overloaded = self._requested > _BEGIN_SHARE * longest
        self._requested = min(self._requested, _KEPT_SHARE * longest if self._overloaded else longest) + images

    def _end_call(self, completed: int) -> None:
        """Count a call that is no longer waiting, and measure the rates at the end of a period."""
        period = self._period
        period.calls += completed > 0
        period.completed += completed
        if self._waiting and period.seconds < _PERIOD_SECONDS:
            return
        self._period = _Period()
        rate, waiting = self.rate, period.waiting_seconds / period.seconds if period.seconds else 0.0
        if period.seconds:
            self._any.add(period)
        if waiting >= (_RATE_IMAGES if rate is None else min(_RATE_IMAGES, rate * self._limit / 2)):
            self._full.add(period)
            if rate is None and self.rate is not None:
                self._requested, self._empty_until = float(self._waiting), self._changed

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
            if self._overloaded:
                self._last_overloaded = now
            self._requested = max(0.0, self._requested - seconds * rate)
            self._overloaded &= self._requested > 0
            if not self._requested:
                self._empty_until = now


class WaitLimiters:
    """The limiter of each model, by its digest: each has its own rate. Use it on one event loop.

    Args:
        limit: Seconds that a call may wait.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._limiters: dict[str, WaitLimiter] = {}

    def of(self, digest: str) -> WaitLimiter:
        """The limiter of a model."""
        if digest not in self._limiters:
            self._limiters[digest] = WaitLimiter(self._limit)
        return self._limiters[digest]

    def is_busy(self) -> bool:
        """Whether jobs have to yield to calls for images of a model. It can be called in any thread."""
        return any(limiter.is_busy for limiter in list(self._limiters.values()))


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
    image_waits: WaitLimiters
    uploads: Limiter
    heat_maps: Limiter
    study_results: Limiter
    study_images: Limiter
    event_streams: Limiter
    downloads: Limiter
    comparisons: MinuteLimiter  # each reveals a little about which images are training images
    webhook_retries: MinuteLimiter

    @contextmanager
    def hold_images(self, tenant: str, digest: str, images: int) -> Iterator[Callable[[], None]]:
        """Count a call of a tenant for images of a model, within both limits, for the time of a `with` block.

        Yields:
            A function to call when the images are requested from the model (`WaitLimiter.hold`).

        Raises:
            ProblemError: At a limit.
        """
        waits = self.image_waits.of(digest)
        try:
            self.images.acquire(tenant)
        except ProblemError:
            waits.refuse(images)
            raise
        try:
            with waits.hold(tenant, images) as begin:
                yield begin
        finally:
            self.images.release(tenant)

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
            image_waits=WaitLimiters(settings.max_image_wait_seconds),
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
