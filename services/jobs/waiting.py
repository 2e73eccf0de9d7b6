"""States of jobs for the threads and event streams that wait for them or look regularly whether they must stop.

Each active dataset has several of them. If each asked the database several times a second, a worker with two dozen
datasets would need half a processor for it. So one query reads the states of all jobs that were asked for lately.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from services.jobs.database import reading

_FRESH_SECONDS = 0.2
_ASKED_SECONDS = 5.0

_jobs = sa.table(
    "dermis_jobs",
    *map(sa.column, ("id", "state", "error", "samples_done", "shards_done", "shards_total", "rate")),
)


@dataclass(frozen=True)
class JobState:
    """What one who waits needs to know of a job.

    Attributes:
        must_stop: Work on it should stop: it is being cancelled, has failed, has ended or does not exist.
        is_whole: All of its shards are finished.
        progress: It is another one after each change that is shown to users.
    """

    must_stop: bool
    is_whole: bool
    progress: tuple[object, ...] = ()


_GONE = JobState(must_stop=True, is_whole=False)


def read_states(engine: sa.Engine, job_ids: Collection[str]) -> dict[str, JobState]:
    """Read the states of jobs.

    Raises:
        DatabaseUnavailableError: The database cannot be reached.
    """
    columns = (_jobs.c.error.is_not(None), _jobs.c.shards_done == _jobs.c.shards_total)
    progress = (_jobs.c.state, _jobs.c.samples_done, _jobs.c.shards_done, _jobs.c.rate)
    with reading(engine) as connection:
        rows = connection.execute(sa.select(_jobs.c.id, *columns, *progress).where(_jobs.c.id.in_(job_ids))).all()
    states = {
        job_id: JobState(shown[0] not in ("queued", "running") or bool(has_error), bool(is_whole), tuple(shown))
        for job_id, has_error, is_whole, *shown in rows
    }
    return {job_id: states.get(job_id, _GONE) for job_id in job_ids}


class RecentStates:
    """States of jobs that are at most a fifth of a second old, or five seconds while a read takes longer. Thread-safe.

    Args:
        read: Reads the states of jobs.
        clock: Seconds that never decrease.
    """

    def __init__(
        self,
        read: Callable[[Collection[str]], Mapping[str, JobState]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._clock = read, clock
        self._lock = threading.Lock()
        self._asked: dict[str, float] = {}  # when a job was last asked for
        self._states: Mapping[str, JobState] = {}
        self._began = -_FRESH_SECONDS  # when the read of `_states` began
        self._is_reading = False

    def of(self, job_id: str) -> JobState:
        """The state of a job.

        Raises:
            DatabaseUnavailableError: It must be read, and the database cannot be reached.
        """
        with self._lock:
            now = self._clock()
            self._asked[job_id] = now
            state = self._states.get(job_id)
            # A read that does not end must not stop the news: then each thread reads for itself.
            limit = _ASKED_SECONDS if self._is_reading else _FRESH_SECONDS
            if state is not None and now - self._began < limit:
                return state
            alone = self._is_reading
            self._is_reading = True
            self._asked = {each: asked for each, asked in self._asked.items() if now - asked < _ASKED_SECONDS}
            job_ids = [job_id] if alone else list(self._asked)
        try:
            states = self._read(job_ids)
            with self._lock:
                self._states = {**self._states, **states} if alone else states
                if not alone:
                    self._began = now
            return states[job_id]
        finally:
            if not alone:
                with self._lock:
                    self._is_reading = False
