"""What the jobs database says of the whole deployment: the queue, the workers, the stored bytes, and jobs of all tenants.

The queries name only the columns that they need, so that `dermis admin status` can also read the tables of an earlier version.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

Kind = Literal["dataset", "projection"]
KINDS: tuple[Kind, ...] = ("dataset", "projection")

ACTIVE = ("queued", "running", "cancelling")
STATES = (*ACTIVE, "succeeded", "failed", "cancelled")

_jobs = sa.table(
    "dermis_jobs",
    *map(sa.column, ("id", "tenant", "kind", "state", "created_at", "finished_at", "owner")),
    *map(sa.column, ("shards_total", "shards_done", "stored_bytes")),
    sa.column("error", sa.JSON),
)
_shards = sa.table("dermis_shards", sa.column("finished"))
_workers = sa.table("dermis_workers", *map(sa.column, ("executor_id", "lease_until", "works", "version")))


@dataclass(frozen=True)
class Worker:
    """A process with a lease, as the jobs database knows it: a worker, or a gateway that runs no jobs.

    Attributes:
        name: Its name.
        lease_until: End of its lease, seconds since 1970; 0 or negative after it has stopped.
        works: Whether it runs jobs.
        version: Its version of dermis; None for a version that does not record it.
        jobs: The number of active jobs whose workflow it runs, or that it has submitted and no worker has begun.
    """

    name: str
    lease_until: float
    works: bool
    version: str | None
    jobs: int

    def seconds_left(self, now: float) -> float:
        """The seconds until its lease runs out; negative once others take over its work."""
        return self.lease_until - now


@dataclass(frozen=True)
class Statistics:
    """What is waiting, running and stored.

    Attributes:
        time: When the numbers were read, seconds since 1970.
        counts: The number of jobs by kind and state.
        oldest: The time at which the oldest queued job was created, by kind; no entry for a kind without one.
        shards_left: The number of shards of queued and running jobs that are not finished, by kind.
        jobs_ending: The number of jobs whose shards are all finished and that have not ended, by kind.
        shards_begun: The number of shards that a worker has begun and not finished.
        workers: The workers and gateways, by name.
        stored_bytes: The size of the files of jobs that have succeeded, as measured at their end.
    """

    time: float
    counts: Mapping[Kind, Mapping[str, int]]
    oldest: Mapping[Kind, float]
    shards_left: Mapping[Kind, int]
    jobs_ending: Mapping[Kind, int]
    shards_begun: int
    workers: list[Worker]
    stored_bytes: int

    @property
    def live_workers(self) -> int:
        """The number of processes that run jobs and whose lease has not run out."""
        return sum(worker.works and worker.seconds_left(self.time) >= 0 for worker in self.workers)

    def oldest_age(self, kind: Kind) -> float:
        """The seconds for which the oldest queued job has waited; 0 if none waits."""
        return max(0.0, self.time - self.oldest[kind]) if kind in self.oldest else 0.0


def read_statistics(connection: sa.Connection, revision: str | None = None) -> Statistics:
    """Read the numbers of all tenants in four queries.

    Args:
        connection: A connection to the jobs database.
        revision: The schema of the tables, if it is an earlier one: those before 0009 do not say which processes run jobs,
            and those before 0012 have no versions. Default: the newest one.
    """
    working = _jobs.c.state.in_(("queued", "running"))
    left = sa.case((working, _jobs.c.shards_total - _jobs.c.shards_done), else_=0)
    ending = sa.case((working & (_jobs.c.shards_done == _jobs.c.shards_total), 1), else_=0)
    by_state = sa.select(
        _jobs.c.kind,
        _jobs.c.state,
        sa.func.count(),
        sa.func.min(_jobs.c.created_at),
        sa.func.sum(left),
        sa.func.sum(ending),
        sa.func.sum(_jobs.c.stored_bytes),
    ).group_by(_jobs.c.kind, _jobs.c.state)
    owned = sa.select(_jobs.c.owner, sa.func.count()).where(_jobs.c.state.in_(ACTIVE)).group_by(_jobs.c.owner)
    works = sa.func.coalesce(_workers.c.works, sa.true()) if revision is None or revision >= "0009" else sa.true()
    version = _workers.c.version if revision is None or revision >= "0012" else sa.null()
    leases = sa.select(_workers.c.executor_id, _workers.c.lease_until, works, version).order_by(_workers.c.executor_id)
    begun = sa.select(sa.func.count()).where(_shards.c.finished == sa.false())
    now = time.time()
    rows = connection.execute(by_state).all()
    jobs = {row[0]: row[1] for row in connection.execute(owned)}
    workers = [
        Worker(name, until, bool(runs_jobs), of_dermis, jobs.get(name, 0))
        for name, until, runs_jobs, of_dermis in connection.execute(leases)
    ]
    counts: dict[Kind, dict[str, int]] = {kind: dict.fromkeys(STATES, 0) for kind in KINDS}
    oldest: dict[Kind, float] = {}
    shards_left, jobs_ending = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    for kind, state, count, created_at, shards, ends, _ in rows:
        counts[kind][state] = count
        shards_left[kind] += int(shards or 0)
        jobs_ending[kind] += int(ends or 0)
        if state == "queued":
            oldest[kind] = created_at
    return Statistics(
        time=now,
        counts=counts,
        oldest=oldest,
        shards_left=shards_left,
        jobs_ending=jobs_ending,
        shards_begun=connection.scalar(begun) or 0,
        workers=workers,
        stored_bytes=sum(int(row[6] or 0) for row in rows),
    )


def read_jobs(connection: sa.Connection, limit: int) -> list[dict[str, Any]]:
    """Read the jobs that have not ended, oldest first, and those that have failed, latest first; at most `limit` of each."""
    columns = (_jobs.c[name] for name in ("id", "tenant", "kind", "state", "created_at", "finished_at", "error"))
    query = sa.select(*columns).limit(limit)
    active = query.where(_jobs.c.state.in_(ACTIVE)).order_by(_jobs.c.created_at, _jobs.c.id)
    failed = query.where(_jobs.c.state == "failed").order_by(_jobs.c.finished_at.desc(), _jobs.c.id)
    return [dict(row._mapping) for each in (active, failed) for row in connection.execute(each)]
