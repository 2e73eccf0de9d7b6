"""Division of the work on jobs between tenants: each tenant with work gets the same share of a worker's time.

A shard takes a place for one batch of images, and then gives it up for the tenant that has been served least. A queued shard of
a large job therefore delays the jobs of others by a batch and not by all its images.

While calls wait for images, jobs yield to them: one shard at a time works, and after each batch none for a while.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# A tenant that is further ahead of another one with work leaves its place free. Less would leave places free between
# two batches of the other tenant, which take a second or two.
_MAX_LEAD_SECONDS = 2.0
_CHECK_SECONDS = 0.5
# While jobs yield to calls, no shard works after each batch for so many times the time of the batch.
_YIELDED = 3.0
_MAX_YIELDED_SECONDS = 10.0


@dataclass
class _Share:
    """What one tenant with work has had: the time of its places in seconds, the running ones since `changed` included."""

    served: float
    changed: float
    places: int = 0
    shards: int = 0

    def advance(self, now: float) -> None:
        self.served += self.places * (now - self.changed)
        self.changed = now


@dataclass(eq=False)
class _Waiting:
    tenant: str


class Turns:
    """Places that the shards of all tenants share.

    The tenant with the least time in places is next, as in start-time fair queueing (Goyal, Vin and Cheng 1996), but with
    the time that was used instead of an estimate. A tenant that comes back begins with the time of the one that has
    least, so that it cannot save up time.

    Args:
        places: The number of shards that work at the same time.
        clock: A monotonic clock in seconds.
        must_yield: Whether jobs yield to calls at this moment. It is called often, in any thread.
    """

    def __init__(
        self,
        places: int,
        clock: Callable[[], float] = time.monotonic,
        must_yield: Callable[[], bool] = lambda: False,
    ) -> None:
        self._places, self._clock, self._must_yield = places, clock, must_yield
        self._yields_until = clock()
        self._held_since: list[float] = []  # of each place
        self._shares: dict[str, _Share] = {}
        self._waiting: list[_Waiting] = []  # in the order of arrival
        self._changed = threading.Condition()

    @contextmanager
    def of(self, tenant: str, check: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """Hold a place for a shard, and yield a function that offers it to others and returns with a place again.

        Args:
            tenant: The tenant that the shard belongs to.
            check: Called about twice a second while the shard waits; an exception that it raises ends the waiting.
        """
        with self._changed:
            self._arrive(tenant)
        try:
            held_since: float | None = self._wait(tenant, check)

            def offer() -> None:
                nonlocal held_since
                if held_since is not None:
                    self._release(tenant, held_since)
                held_since = None
                held_since = self._wait(tenant, check)

            try:
                yield offer
            finally:
                if held_since is not None:
                    self._release(tenant, held_since)
        finally:
            with self._changed:
                self._leave(tenant)
                self._changed.notify_all()

    def _arrive(self, tenant: str) -> None:
        share = self._shares.get(tenant)
        if share is None:
            now = self._advance()
            least = min((each.served for each in self._shares.values()), default=0.0)
            share = self._shares[tenant] = _Share(least, now)
        share.shards += 1

    def _leave(self, tenant: str) -> None:
        share = self._shares[tenant]
        share.shards -= 1
        if not share.shards:
            del self._shares[tenant]

    def _wait(self, tenant: str, check: Callable[[], None]) -> float:
        """Wait for a place, and return the moment at which it was given."""
        ticket = _Waiting(tenant)
        last_check = self._clock()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._next() is not ticket:
                    left = self._yields_until - self._clock()
                    self._changed.wait(min(_CHECK_SECONDS, left) if left > 0 else _CHECK_SECONDS)
                    if self._clock() - last_check >= _CHECK_SECONDS:
                        self._changed.release()  # `check` may take its time
                        try:
                            check()
                        finally:
                            self._changed.acquire()
                        last_check = self._clock()
                self._shares[tenant].places += 1
                since = self._clock()
                self._held_since.append(since)
                return since
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()  # the next one in line

    def _release(self, tenant: str, held_since: float) -> None:
        with self._changed:
            now = self._advance()
            self._shares[tenant].places -= 1
            self._held_since.remove(held_since)
            pause = min(_YIELDED * (now - held_since), _MAX_YIELDED_SECONDS)
            self._yields_until = max(self._yields_until, now + pause)
            self._changed.notify_all()

    def _advance(self) -> float:
        now = self._clock()
        for share in self._shares.values():
            share.advance(now)
        return now

    def _next(self) -> _Waiting | None:
        """The shard that may take a place now; None if there is none."""
        if not self._waiting:
            return None
        if len(self._held_since) >= self._places:
            return None
        if self._must_yield():
            # One that has held its place for long may wait for a storage or a service that cannot be reached.
            now = self._clock()
            if now < self._yields_until or any(now - since < _MAX_YIELDED_SECONDS for since in self._held_since):
                return None
        self._advance()
        least = min(share.served for share in self._shares.values())

        def is_ahead(share: _Share) -> bool:
            return share.places > 0 and share.served - least > _MAX_LEAD_SECONDS

        allowed = [each for each in self._waiting if not is_ahead(self._shares[each.tenant])]
        return min(allowed, key=lambda each: self._shares[each.tenant].served, default=None)
