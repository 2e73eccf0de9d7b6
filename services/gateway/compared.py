"""Answers on uploaded images, repeated for changed copies of the same image.

The distance of a changed copy to the training images is another noisy measurement of whether the image is one of them, so the
answers on many copies of an image say more than one answer. Therefore an image that resembles one that was compared before gets
the answer on that one. Images resemble each other if their fingerprints differ little, in any position: mirrored, turned by
quarters, or both.

The answers are in the jobs database (`services.compared_answers`), so the answer does not depend on the replica, and a restart
changes nothing. Each process has a copy of those of the tenants that it serves, in which it searches. For each image, 256 bits
and two numbers are kept. From the bits, at most a rough pattern of light and dark could be made.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from dermis.perceptual_hash import FINGERPRINT_WORDS, Hashes, turned_and_mirrored
from services.compared_answers import Answer, add_answers, answers_after
from services.jobs.counters import lock_tenant
from services.jobs.database import close_engine, open_engine, reading, writing
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
    """Answers of the last `seconds`, of each tenant by itself. Safe to call from several threads, processes and replicas.

    Args:
        url: SQLAlchemy URL of the jobs database; `JobTable.open` creates the tables.
        seconds: Time for which an answer is repeated; 0 for never.
        capacity: Largest number of answers that are kept for one tenant. If there are more, its images are refused.
        clock: Seconds since 1970.
    """

    def __init__(self, url: str, seconds: float, capacity: int, clock: Callable[[], float] = time.time) -> None:
        self._engine = open_engine(url)
        self._seconds, self._capacity, self._clock = seconds, capacity, clock
        self._lock = threading.Lock()
        self._of_tenant: dict[str, _TenantAnswers] = {}

    @classmethod
    def of(cls, settings: Settings) -> ComparedImages:
        """The answers that the settings allow in the time for which they are repeated."""
        seconds = settings.authenticity_repeat_seconds
        capacity = min(MAX_ANSWERS, settings.max_compared_per_minute * (math.ceil(seconds / 60) + 1))
        return cls(settings.jobs_url, seconds, capacity)

    def close(self) -> None:
        """Close the connections, unless another table of this process uses them."""
        close_engine(self._engine)

    def answer(self, group: tuple[str, str], marks: Hashes, distances: Floats, radii: Floats) -> Answers:
        """Replace the answers on images that resemble earlier ones, also in the same call, and keep the others.

        Args:
            group: Tenant, and digest of the index with which the images were compared. Other tenants do not get these answers.
            marks: Fingerprints [N, 4] of the images (`dermis.perceptual_hash.fingerprints`).
            distances: Their distances [N].
            radii: Their radii [N].

        Raises:
            ProblemError: So many answers are kept for the tenant that no further one can be.
            DatabaseUnavailableError: The database cannot be reached; no answer may be given.
        """
        answers = Answers(distances.copy(), radii.copy(), np.zeros(len(marks), bool))
        if self._seconds <= 0:
            return answers
        tenant, index = group
        with self._lock:
            kept = self._of_tenant.setdefault(tenant, _TenantAnswers())
            others = [each for each in self._of_tenant.values() if each is not kept]
        until = self._clock() - self._seconds
        for each in others:
            if each.lock.acquire(blocking=False):  # a call that has the lock removes them itself
                try:
                    each.forget(until)
                finally:
                    each.lock.release()
        with kept.lock:
            self._answer(kept, tenant, index, marks, answers)
        return answers

    def _answer(self, kept: _TenantAnswers, tenant: str, index: str, marks: Hashes, answers: Answers) -> None:
        kept.forget(self._clock() - self._seconds)
        # Reading and searching many answers comes first: the transaction makes other requests of the tenant wait.
        with reading(self._engine) as connection:
            kept.read(connection, tenant, self._clock() - self._seconds)
        table = kept.of_index.setdefault(index, _Table())
        positions = list(turned_and_mirrored(marks))
        first_new = len(table)
        known = [table.find(each) for each in positions]
        with kept.undone_on_error(), writing(self._engine) as connection:
            lock_tenant(connection, tenant)
            now = self._clock()
            kept.read(connection, tenant, now - self._seconds)
            new = []
            for image, (mark, each, match) in enumerate(zip(marks, positions, known, strict=True)):
                best = min(match, table.find(each, first_new))
                if best.bits <= SAME_BITS:
                    answers.distances[image], answers.radii[image] = table.answer(best.row)
                    answers.repeated[image] = True
                    continue
                if len(kept) >= self._capacity:
                    raise self._full(kept, now)
                added = Answer(index, now, mark, float(answers.distances[image]), float(answers.radii[image]))
                table.add(added)
                new.append(added)
            if new:
                kept.last_number = add_answers(connection, tenant, new)

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
        self.last_number = 0

    def __len__(self) -> int:
        return sum(map(len, self.of_index.values()))

    def forget(self, until: float) -> None:
        """Remove the answers up to this time."""
        for table in self.of_index.values():
            table.forget(until)

    def read(self, connection: sa.Connection, tenant: str, since: float) -> None:
        """Add the answers that other processes have stored after the last call."""
        for number, answer in answers_after(connection, tenant, self.last_number, since):
            self.of_index.setdefault(answer.index, _Table()).add(answer)
            self.last_number = number

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Remove the answers that a failed transaction added. Those that it read are read again."""
        counts = {name: len(table) for name, table in self.of_index.items()}
        number = self.last_number
        try:
            yield
        except BaseException:
            for name, table in self.of_index.items():
                table.truncate(counts.get(name, 0))
            self.last_number = number
            raise


@dataclass(frozen=True, order=True)
class _Match:
    """A row, and the number of bits in which its fingerprint differs. The smallest one is the most similar."""

    bits: int
    row: int


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

    def truncate(self, count: int) -> None:
        """Remove the last answers, so that `count` remain."""
        self._count = count

    def find(self, positions: Hashes, first: int = 0) -> _Match:
        """The row from `first` on that is the most similar to any of the positions [8, 4]."""
        best, fewest = 0, 64 * FINGERPRINT_WORDS + 1
        for start in range(first, self._count, _BLOCK):
            words = self._marks[:, start : min(start + _BLOCK, self._count)]
            for position in positions:
                differing = np.zeros(words.shape[1], np.uint16)
                for word, other in zip(words, position, strict=True):
                    differing += np.bitwise_count(word ^ other)
                if differing.min() < fewest:
                    best, fewest = start + int(differing.argmin()), int(differing.min())
        return _Match(fewest, best)

    def answer(self, row: int) -> NDArray[np.float32]:
        """Distance and radius of a row."""
        return self._answers[:, row].copy()

    def add(self, answer: Answer) -> None:
        """Append an answer."""
        if self._count == len(self._times):
            self._keep(slice(0, self._count), 2 * self._count)
        # The clocks of replicas differ a little, and `forget` needs increasing times.
        time_before = self._times[self._count - 1] if self._count else -math.inf
        self._times[self._count] = max(answer.created_at, time_before)
        self._marks[:, self._count] = answer.mark
        self._answers[:, self._count] = answer.distance, answer.radius
        self._count += 1

    def _keep(self, rows: slice, size: int) -> None:
        """Copy some rows into arrays of another size."""
        self._count = rows.stop - rows.start
        for name in ("_times", "_marks", "_answers"):
            old = getattr(self, name)
            new = np.empty((*old.shape[:-1], size), old.dtype)
            new[..., : self._count] = old[..., rows]
            setattr(self, name, new)
