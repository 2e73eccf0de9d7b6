"""Answers on uploaded images, repeated for changed copies of the same image.

The distance of a changed copy to the training images is another noisy measurement of whether the image is one of them, so the
answers on many copies of an image say more than one answer. Therefore an image that resembles one that was compared before gets
the answer on that one. Images resemble each other if their fingerprints differ little, in any position: mirrored, turned by
quarters, or both.

Of an image 256 bits and two numbers are kept, in the memory of this process only. At most a rough pattern of light and dark
could be made from the bits.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.perceptual_hash import FINGERPRINT_WORDS, Hashes, turned_and_mirrored
from services.problems import ProblemError
from services.settings import Settings

SAME_BITS = 74
"""Largest number of differing bits, of 256, between the fingerprints of copies. docs/privacy.md states how many copies are
recognised, and how often different images are taken for copies."""
MAX_ANSWERS = 1_000_000
"""Largest number of answers that are kept for one tenant."""
_FIRST_ROWS = 1024
_BLOCK = 1 << 15  # images compared at a time, so that their fingerprints fit into the cache

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Answers:
    """Answers [N] on the images of a call.

    Attributes:
        distances: Distance to the nearest training image.
        radii: Radius of that training image.
        repeated: Whether the answer is that on an earlier image.
    """

    distances: Floats
    radii: Floats
    repeated: NDArray[np.bool_]


class ComparedImages:
    """Answers of the last `seconds`, of each tenant by itself. Safe to call from several threads.

    Args:
        seconds: Time for which an answer is repeated; 0 for never.
        capacity: Largest number of answers that are kept for one tenant. If there are more, its images are refused.
        clock: Seconds that never decrease.
    """

    def __init__(self, seconds: float, capacity: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._capacity, self._clock = seconds, capacity, clock
        self._lock = threading.Lock()
        self._of_tenant: dict[str, _TenantAnswers] = {}

    @classmethod
    def of(cls, settings: Settings) -> ComparedImages:
        """The answers that the settings allow in the time for which they are repeated."""
        seconds = settings.authenticity_repeat_seconds
        return cls(seconds, min(MAX_ANSWERS, settings.max_compared_per_minute * (math.ceil(seconds / 60) + 1)))

    def answer(self, group: tuple[str, str], marks: Hashes, distances: Floats, radii: Floats) -> Answers:
        """Replace the answers on images that resemble earlier ones, also in the same call, and keep the others.

        Args:
            group: Tenant, and digest of the index with which the images were compared. Other tenants do not get these answers.
            marks: Fingerprints [N, 4] of the images (`dermis.perceptual_hash.fingerprints`).
            distances: Their distances [N].
            radii: Their radii [N].

        Raises:
            ProblemError: So many answers are kept for the tenant that no further one can be.
        """
        answers = Answers(distances.copy(), radii.copy(), np.zeros(len(marks), bool))
        if self._seconds <= 0:
            return answers
        tenant, index = group
        with self._lock:
            kept = self._of_tenant.setdefault(tenant, _TenantAnswers())
            others = [each for each in self._of_tenant.values() if each is not kept]
        now = self._clock()
        for each in others:
            if each.lock.acquire(blocking=False):  # a call that has the lock removes them itself
                try:
                    each.forget(now - self._seconds)
                finally:
                    each.lock.release()
        with kept.lock:
            now = self._clock()
            kept.forget(now - self._seconds)
            table = kept.of_index.setdefault(index, _Table())
            for image, positions in enumerate(turned_and_mirrored(marks)):
                known = table.find(positions)
                if known is not None:
                    answers.distances[image], answers.radii[image] = known
                    answers.repeated[image] = True
                    continue
                if len(kept) >= self._capacity:
                    raise self._full(kept, now)
                table.add(now, marks[image], distances[image], radii[image])
        return answers

    def _full(self, kept: _TenantAnswers, now: float) -> ProblemError:
        oldest = min(table.oldest for table in kept.of_index.values() if len(table))
        return ProblemError(
            "too-many-requests",
            f"at most {self._capacity} different images of this tenant are compared with the training images in "
            f"{self._seconds:g} s; try again later",
            headers={"Retry-After": str(math.ceil(oldest + self._seconds - now) + 1)},
        )


class _TenantAnswers:
    """The answers that are kept for one tenant, by digest of the index, and the lock for their use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.of_index: dict[str, _Table] = {}

    def __len__(self) -> int:
        return sum(map(len, self.of_index.values()))

    def forget(self, until: float) -> None:
        """Remove the answers up to this time."""
        for table in self.of_index.values():
            table.forget(until)


class _Table:
    """Fingerprints and answers in the order in which they were added."""

    def __init__(self) -> None:
        self._count = 0
        self._times = np.empty(_FIRST_ROWS)
        self._marks = np.empty((FINGERPRINT_WORDS, _FIRST_ROWS), np.uint64)  # each word of all images, which is faster
        self._answers = np.empty((2, _FIRST_ROWS), np.float32)

    def __len__(self) -> int:
        return self._count

    @property
    def oldest(self) -> float:
        """Time of the first answer. There must be one."""
        return float(self._times[0])

    def forget(self, until: float) -> None:
        """Remove the answers up to this time."""
        expired = int(np.searchsorted(self._times[: self._count], until, side="right"))
        if expired:
            self._keep(slice(expired, self._count), max(_FIRST_ROWS, 2 * (self._count - expired)))

    def find(self, positions: Hashes) -> NDArray[np.float32] | None:
        """Return the answer on the most similar image, if one is similar enough to any of the positions [8, 4]."""
        best, fewest = 0, SAME_BITS + 1
        for start in range(0, self._count, _BLOCK):
            words = self._marks[:, start : min(start + _BLOCK, self._count)]
            for position in positions:
                differing = np.zeros(words.shape[1], np.uint16)
                for word, other in zip(words, position, strict=True):
                    differing += np.bitwise_count(word ^ other)
                if differing.min() < fewest:
                    best, fewest = start + int(differing.argmin()), int(differing.min())
        return self._answers[:, best].copy() if fewest <= SAME_BITS else None

    def add(self, now: float, mark: Hashes, distance: np.float32, radius: np.float32) -> None:
        """Append an answer."""
        if self._count == len(self._times):
            self._keep(slice(0, self._count), 2 * self._count)
        self._times[self._count] = now
        self._marks[:, self._count], self._answers[:, self._count] = mark, (distance, radius)
        self._count += 1

    def _keep(self, rows: slice, size: int) -> None:
        """Copy some rows into arrays of another size."""
        self._count = rows.stop - rows.start
        for name in ("_times", "_marks", "_answers"):
            old = getattr(self, name)
            new = np.empty((*old.shape[:-1], size), old.dtype)
            new[..., : self._count] = old[..., rows]
            setattr(self, name, new)
