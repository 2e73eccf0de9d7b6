"""Division of the work on jobs between tenants: each tenant with work gets the same share of a worker's time.

A shard takes a place for one batch of images, and then gives it up for the tenant that has been served least. A queued shard of
a large job therefore delays the jobs of others by a batch and not by all its images.
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
    """

    def __init__(self, places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places, self._clock = places, clock
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
            self._wait(tenant, check)
            held = True

            def offer() -> None:
                nonlocal held
                self._release(tenant)
                held = False
                self._wait(tenant, check)
                held = True

            try:
                yield offer
            finally:
                if held:
                    self._release(tenant)
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

    def _wait(self, tenant: str, check: Callable[[], None]) -> None:
        ticket = _Waiting(tenant)
        last_check = self._clock()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._next() is not ticket:
                    self._changed.wait(_CHECK_SECONDS)
                    if self._clock() - last_check >= _CHECK_SECONDS:
                        self._changed.release()  # `check` may take its time
                        try:
                            check()
                        finally:
                            self._changed.acquire()
                        last_check = self._clock()
                self._shares[tenant].places += 1
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()  # the next one in line

    def _release(self, tenant: str) -> None:
        with self._changed:
            self._advance()
            self._shares[tenant].places -= 1
            self._changed.notify_all()

    def _advance(self) -> float:
        now = self._clock()
        for share in self._shares.values():
            share.advance(now)
        return now

    def _next(self) -> _Waiting | None:
        """The shard that may take a place now; None if there is none."""
        if not self._waiting or sum(share.places for share in self._shares.values()) >= self._places:
            return None
        self._advance()
        least = min(share.served for share in self._shares.values())

        def is_ahead(share: _Share) -> bool:
            return share.places > 0 and share.served - least > _MAX_LEAD_SECONDS

        allowed = [each for each in self._waiting if not is_ahead(self._shares[each.tenant])]
        return min(allowed, key=lambda each: self._shares[each.tenant].served, default=None)
