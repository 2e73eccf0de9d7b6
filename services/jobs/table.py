"""The jobs table: the request, progress and outcome of each job. SQLAlchemy Core on SQLite or PostgreSQL.

DBOS stores the durable workflow; this table stores what callers see, and keeps it after the workflow has ended. Each method
is one short transaction, may be called from any thread and process, and raises DatabaseUnavailableError while the database
cannot be reached. Times are seconds since 1970 (UTC).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from dermis.errors import DermisError
from services import metrics, tracing
from services.compared_answers import remove_answers
from services.jobs import counters, executors, schema
from services.jobs.database import close_engine, open_engine, reading, schema_lock, time_of, writing
from services.jobs.executors import Executors
from services.jobs.rates import rate_after
from services.jobs.statistics import ACTIVE, Kind, Statistics, read_statistics
from services.jobs.tables import jobs as _jobs
from services.jobs.tables import shards as _shards
from services.jobs.waiting import RecentStates, read_states
from services.quotas import QUOTAS, Quota, QuotaExceededError, QuotaUse
from services.studies.tables import stored_by_studies
from services.webhooks.outbox import add_messages


@dataclass(frozen=True)
class Job:
    """One job, as it was read. The `samples` of a projection are optimisation steps, summed over its images."""

    sequence: int
    id: str
    tenant: str
    kind: Kind
    state: str
    request: Mapping[str, Any]
    model_name: str
    model_digest: str
    samples_total: int
    shards_total: int
    samples_done: int
    shards_done: int
    rate: float | None
    rate_time: float | None
    rate_samples: int | None
    error: Mapping[str, Any] | None
    owner: str | None
    idempotency_key: str | None
    body_hash: str
    created_at: float
    started_at: float | None
    finished_at: float | None
    stored_bytes: int | None
    reserved_bytes: int | None
    trace_parent: str | None

    @property
    def active(self) -> bool:
        """Whether the job has not ended."""
        return self.state in ACTIVE

    @property
    def images_per_second(self) -> float | None:
        """Images/s: smoothed over the last seconds while the job runs, the mean of the whole run once it has ended."""
        if self.active:
            return self.rate
        if self.started_at is None or self.finished_at is None or self.finished_at <= self.started_at:
            return None
        return self.samples_done / (self.finished_at - self.started_at)

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last sample at the present rate; None while there is no rate."""
        if self.state != "running" or not self.rate:
            return None
        return (self.samples_total - self.samples_done) / self.rate


class IdempotencyConflictError(DermisError):
    """The idempotency key was used for a request with another body."""


class TooManyActiveError(DermisError):
    """The tenant has the maximum number of active jobs of this kind."""


class JobTable:
    """The tables behind one SQLAlchemy URL. `open` creates or upgrades them."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)
        self.recent_states = RecentStates(partial(read_states, self._engine))

    def open(self) -> None:
        """Create the tables, or upgrade those of an earlier version.

        Raises:
            SchemaTooNewError: If a newer version of dermis has upgraded them.
        """
        with self.schema_lock(), writing(self._engine) as connection:
            schema.upgrade(connection)

    def schema_lock(self) -> AbstractContextManager[None]:
        """A lock for creating or changing tables, also those of DBOS: several processes may start at the same moment."""
        return schema_lock(self._engine)

    def close(self) -> None:
        """Close the connections, unless another table of this process uses them."""
        close_engine(self._engine)

    # Requests

    def create(
        self,
        job_id: str,
        request: Mapping[str, Any],
        *,
        tenant: str,
        kind: Kind,
        model: tuple[str, str],
        samples: int,
        shards: int,
        body_hash: str,
        earlier_hashes: Sequence[str] = (),
        idempotency_key: str | None = None,
        max_active: int | None = None,
        owner: str | None = None,
        quota: Quota | None = None,
        amounts: Mapping[str, int] | None = None,
        reserved_bytes: int | None = None,
    ) -> tuple[Job, bool]:
        """Insert a queued job.

        Args:
            job_id: The new id.
            request: The request, as JSON.
            tenant: The tenant that the job belongs to.
            kind: The kind of the job.
            model: Name and digest of the bundle.
            samples: Number of samples in total.
            shards: Number of shards.
            body_hash: Hash of the request, compared when an idempotency key is used again.
            earlier_hashes: Hashes of the same request with the defaults of earlier versions.
            idempotency_key: The name that a caller of this tenant gave the request.
            max_active: The maximum number of active jobs of this kind and tenant, this one included.
            owner: The worker that submits the job.
            quota: The quotas of the tenant; by default it has none.
            amounts: What the job uses of quotas with a window, by name of the quota.
            reserved_bytes: Upper estimate of the size of its files.

        Returns:
            (job, True), or (the earlier job of this key, False), which is not counted again.

        Raises:
            IdempotencyConflictError: If the key was used with another body.
            TooManyActiveError: At the limit.
            QuotaExceededError: If the job would exceed a quota of the tenant. Nothing is stored or counted.
        """
        values = {
            "id": job_id,
            "tenant": tenant,
            "kind": kind,
            "state": "queued",
            "request": dict(request),
            "model_name": model[0],
            "model_digest": model[1],
            "samples_total": samples,
            "shards_total": shards,
            "body_hash": body_hash,
            "idempotency_key": idempotency_key,
            "owner": owner,
            "created_at": time.time(),
            "reserved_bytes": reserved_bytes,
            "trace_parent": tracing.carrier(),
        }
        try:
            with writing(self._engine) as connection:
                if max_active is not None or (quota is not None and quota.limits):
                    counters.lock_tenant(connection, tenant)
                earlier = self._by_key(connection, tenant, idempotency_key, (body_hash, *earlier_hashes))
                if earlier is not None:
                    return earlier, False
                if max_active is not None and _count_active(connection, tenant, kind) >= max_active:
                    raise TooManyActiveError(
                        f"{max_active} {kind}s of this tenant are queued or running; try again when one has ended"
                    )
                if quota is not None and quota.limits:
                    check_existing(connection, tenant, quota, {"active_jobs": 1, "stored_bytes": reserved_bytes or 0})
                    counters.add(connection, tenant, amounts or {}, quota)
                connection.execute(sa.insert(_jobs).values(values))
                return _job(connection, job_id), True
        except IntegrityError:
            # Two calls with the same key at the same moment (PostgreSQL): the other one has inserted its job.
            with reading(self._engine) as connection:
                earlier = self._by_key(connection, tenant, idempotency_key, (body_hash, *earlier_hashes))
            if earlier is None:
                raise
            return earlier, False

    def _by_key(
        self, connection: sa.Connection, tenant: str, key: str | None, body_hashes: Sequence[str]
    ) -> Job | None:
        if key is None:
            return None
        query = sa.select(_jobs).where(_jobs.c.tenant == tenant, _jobs.c.idempotency_key == key)
        row = connection.execute(query).one_or_none()
        if row is None:
            return None
        job = Job(**row._mapping)
        if job.body_hash not in body_hashes:
            raise IdempotencyConflictError("the idempotency key was used for another request")
        return job

    def get(self, job_id: str) -> Job | None:
        """The job, whichever tenant it belongs to; None if there is none. For workers; callers of the API need `find`."""
        with reading(self._engine) as connection:
            return _job_or_none(connection, job_id)

    def find(self, tenant: str, kind: Kind, job_id: str) -> Job | None:
        """The job of a tenant; None if there is none, or only one of another tenant or kind."""
        query = sa.select(_jobs).where(_jobs.c.id == job_id, _jobs.c.tenant == tenant, _jobs.c.kind == kind)
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else Job(**row._mapping)

    def page(
        self, tenant: str, kind: Kind, limit: int, *, before: int | None = None, state: str | None = None
    ) -> list[Job]:
        """Jobs of a tenant and a kind, newest first, with sequence numbers below `before`."""
        query = sa.select(_jobs).where(_jobs.c.tenant == tenant, _jobs.c.kind == kind)
        query = query.order_by(_jobs.c.sequence.desc()).limit(limit)
        if before is not None:
            query = query.where(_jobs.c.sequence < before)
        if state is not None:
            query = query.where(_jobs.c.state == state)
        with reading(self._engine) as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def active(self) -> list[Job]:
        """Every job of all tenants that has not ended, oldest first."""
        query = sa.select(_jobs).where(_jobs.c.state.in_(ACTIVE)).order_by(_jobs.c.sequence)
        with reading(self._engine) as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def ended_before(
        self, kind: Kind, moment: float, tenant: str | None = None, *, others: Iterable[str] = (), deleted: bool = False
    ) -> list[Job]:
        """Jobs of a kind that had ended by then, seconds since 1970.

        Args:
            kind: The kind.
            moment: The time.
            tenant: The tenant of the jobs; None for all but `others`.
            others: Tenants whose jobs are left out.
            deleted: Whether all jobs that were cancelled or deleted are included.
        """
        ended = _jobs.c.finished_at < moment
        if deleted:
            ended |= _jobs.c.state == "cancelled"
        of_tenant = _jobs.c.tenant.not_in(list(others)) if tenant is None else _jobs.c.tenant == tenant
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(_jobs).where(_jobs.c.kind == kind, ended, of_tenant))
            return [Job(**row._mapping) for row in rows]

    def check(self) -> bool:
        """Read one row, however many jobs there are. Returns whether there is any."""
        with reading(self._engine) as connection:
            return connection.execute(sa.select(_jobs.c.sequence).limit(1)).first() is not None

    def now(self) -> float:
        """Seconds since 1970 by the clock of the database (`services.jobs.database.time_of`)."""
        with reading(self._engine) as connection:
            return time_of(connection)

    def stored_bytes(self, tenant: str) -> int:
        """The size of the files of a tenant's jobs that have succeeded, and the estimates of those that are active."""
        with reading(self._engine) as connection:
            return _existing(connection, tenant, "stored_bytes")

    # Quotas

    def count_use(self, tenant: str, amounts: Mapping[str, int], quota: Quota) -> list[QuotaUse]:
        """Count a request in all of its quotas that have a limit, or in none.

        Args:
            tenant: The tenant.
            amounts: What the request needs by name of the quota, in counted units. The quotas have windows.
            quota: The quotas of the tenant.

        Returns:
            The use of each quota with a limit, with this request.

        Raises:
            QuotaExceededError: A quota would be exceeded.
        """
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, tenant)
            return counters.add(connection, tenant, amounts, quota)

    def undo_use(self, tenant: str, amounts: Mapping[str, int], counted_at: float) -> None:
        """Undo the count of a request that has failed, as far as its window has not ended.

        Args:
            tenant: The tenant.
            amounts: What was counted by name of the quota.
            counted_at: Seconds since 1970 before it was counted.
        """
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, tenant)
            counters.subtract(connection, tenant, amounts, counted_at)

    def use(self, tenant: str, quota: Quota, names: Iterable[str] = QUOTAS) -> list[QuotaUse]:
        """The use of quotas by a tenant."""
        with reading(self._engine) as connection:
            return [
                counters.use_of(connection, tenant, name, quota)
                if QUOTAS[name].seconds is not None
                else QuotaUse(name, quota.limit_of(name), _existing(connection, tenant, name))
                for name in names
            ]

    def unmeasured(self, limit: int) -> list[Job]:
        """Jobs of all tenants that have succeeded and whose files were not measured, as earlier versions left them."""
        query = sa.select(_jobs).where(_jobs.c.state == "succeeded", _jobs.c.stored_bytes.is_(None)).limit(limit)
        with reading(self._engine) as connection:
            return [Job(**row._mapping) for row in connection.execute(query)]

    def set_stored_bytes(self, job_id: str, stored_bytes: int) -> None:
        """Record the size of the files of a job that has succeeded."""
        succeeded = (_jobs.c.id == job_id) & (_jobs.c.state == "succeeded")
        with writing(self._engine) as connection:
            connection.execute(sa.update(_jobs).where(succeeded).values(stored_bytes=stored_bytes))

    def request_cancel(self, job_id: str) -> Job | None:
        """Ask an active job to stop, which its workers notice between batches. A job that has ended is not changed."""
        with writing(self._engine) as connection:
            connection.execute(
                sa.update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state.in_(ACTIVE)).values(state="cancelling")
            )
            return _job_or_none(connection, job_id)

    def mark_deleted(self, job_id: str) -> None:
        """Record that the files of an ended job are about to be removed, so that none are listed from now on."""
        # Jobs that were cancelled have no `stored_bytes`, so `deleted` finds those whose deletion was interrupted.
        values = {"state": "cancelled", "stored_bytes": sa.func.coalesce(_jobs.c.stored_bytes, 0)}
        with writing(self._engine) as connection:
            connection.execute(
                sa.update(_jobs).where(_jobs.c.id == job_id, _jobs.c.state.not_in(ACTIVE)).values(values)
            )

    def deleted(self, kind: Kind) -> list[Job]:
        """Jobs of a kind whose deletion has begun (`mark_deleted`) and has not been completed."""
        begun = (_jobs.c.state == "cancelled") & _jobs.c.stored_bytes.is_not(None)
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(_jobs).where(_jobs.c.kind == kind, begun))
            return [Job(**row._mapping) for row in rows]

    def delete(self, job_id: str, *, undo: Mapping[str, int] | None = None) -> None:
        """Delete the rows of a job.

        Args:
            job_id: The job.
            undo: What it uses of quotas, if that is undone, unless `record_error` has done so.
        """
        with writing(self._engine) as connection:
            _undo(connection, job_id, undo)
            connection.execute(sa.delete(_shards).where(_shards.c.job_id == job_id))
            connection.execute(sa.delete(_jobs).where(_jobs.c.id == job_id))

    # Work

    def set_owner(self, job_id: str, executor_id: str) -> Job | None:
        """Record which worker runs the workflow of a job."""
        with writing(self._engine) as connection:
            connection.execute(sa.update(_jobs).where(_jobs.c.id == job_id).values(owner=executor_id))
            return _job_or_none(connection, job_id)

    def must_stop(self, job_id: str) -> bool:
        """Whether work on the job should stop: it is being cancelled, has failed, has ended or does not exist."""
        return read_states(self._engine, [job_id])[job_id].must_stop

    def record_error(self, job_id: str, error: Mapping[str, Any], *, undo: Mapping[str, int] | None = None) -> None:
        """Record why an active job will fail. The first reason is kept.

        Args:
            job_id: The job.
            error: The reason.
            undo: What the job uses of quotas, if that is undone, and its idempotency key made free for another request.
        """
        condition = (_jobs.c.id == job_id) & _jobs.c.error.is_(None) & _jobs.c.state.in_(ACTIVE)
        values = {"error": dict(error)} | ({} if undo is None else {"idempotency_key": None})
        with writing(self._engine) as connection:
            _undo(connection, job_id, undo)
            connection.execute(sa.update(_jobs).where(condition).values(values))

    def progress(self, job_id: str, shard: int, samples_done: int, *, finished: bool = False) -> None:
        """Update the count of one shard, and with it the sums and the rate of the job."""
        now = time.time()
        with writing(self._engine) as connection:
            query = sa.select(_jobs).where(_jobs.c.id == job_id).with_for_update()
            row = connection.execute(query).one_or_none()
            if row is None or row.state not in ACTIVE:  # a worker that was taken over is late
                return
            job = Job(**row._mapping)
            is_shard = (_shards.c.job_id == job_id) & (_shards.c.shard == shard)
            before = connection.execute(sa.select(_shards).where(is_shard)).one_or_none()
            if before is None:
                connection.execute(
                    sa.insert(_shards).values(job_id=job_id, shard=shard, samples_done=samples_done, finished=finished)
                )
            else:
                # Two workers on one shard (after a lease ran out): a finished shard stays finished.
                finished = finished or before.finished
                samples_done = max(samples_done, before.samples_done) if before.finished else samples_done
                connection.execute(
                    sa.update(_shards).where(is_shard).values(samples_done=samples_done, finished=finished)
                )
            total = job.samples_done + samples_done - (before.samples_done if before is not None else 0)
            values: dict[str, Any] = {
                "samples_done": total,
                "shards_done": job.shards_done + int(finished) - int(before is not None and before.finished),
            }
            if job.state == "queued":
                values |= {"state": "running", "started_at": job.started_at or now}
            values |= rate_after(job, total, now)
            connection.execute(sa.update(_jobs).where(_jobs.c.id == job_id).values(values))

    def return_shard(self, job_id: str, shard: int) -> None:
        """Forget that a worker, which stops, has begun a shard, unless the shard is finished or another worker makes it."""
        if self.is_begun(job_id, shard):
            self.progress(job_id, shard, 0)  # corrects the sum of the job
        of_it = (_shards.c.job_id == job_id) & (_shards.c.shard == shard)
        untouched = (_shards.c.finished == sa.false()) & (_shards.c.samples_done == 0)
        with writing(self._engine) as connection:
            connection.execute(sa.delete(_shards).where(of_it, untouched))

    def is_begun(self, job_id: str, shard: int) -> bool:
        """Whether a worker has begun a shard of an active job, and perhaps finished it."""
        query = sa.select(sa.func.count()).where(_shards.c.job_id == job_id, _shards.c.shard == shard)
        with reading(self._engine) as connection:
            return bool(connection.scalar(query))

    def restart_rate(self, job_id: str) -> None:
        """Discard the rate, because a worker continues the job after a pause of unknown length."""
        with writing(self._engine) as connection:
            connection.execute(
                sa.update(_jobs)
                .where(_jobs.c.id == job_id)
                .values(rate=None, rate_time=time.time(), rate_samples=_jobs.c.samples_done)
            )

    def finish(
        self, job_id: str, state: str, *, stored_bytes: int | None = None, owner: str | None = None
    ) -> Job | None:
        """End an active job with `state`.

        A job that has ended already is not changed, nor is one that would succeed but has an error recorded. One that is being
        cancelled can only end as cancelled, because the answer to its caller was that it is deleted.

        Args:
            job_id: The job.
            state: The state after the end.
            stored_bytes: The size of its files, if it has succeeded.
            owner: The worker that must run the job; None for any.

        Returns:
            The job as it is then, or None if it does not exist.
        """
        before = ACTIVE if state == "cancelled" else ("queued", "running")
        condition = (_jobs.c.id == job_id) & _jobs.c.state.in_(before)
        if state == "succeeded":
            condition &= _jobs.c.error.is_(None)
        if owner is not None:
            condition &= _jobs.c.owner == owner
        now = time.time()
        values = {"state": state, "finished_at": now, "rate": None, "stored_bytes": stored_bytes}
        ended: Job | None = None
        with writing(self._engine) as connection:
            if connection.execute(sa.update(_jobs).where(condition).values(values)).rowcount:
                connection.execute(sa.delete(_shards).where(_shards.c.job_id == job_id))
                job = _job(connection, job_id)
                tenant = job.tenant
                add_messages(connection, tenant=tenant, kind=job.kind, job_id=job_id, state=state)
                ended = job
            after = _job_or_none(connection, job_id)
        if ended is not None:
            metrics.job_seconds.labels(ended.kind, state).observe(max(0.0, now - ended.created_at))
        return after

    def statistics(self) -> Statistics:
        """What is waiting, running and stored, of all tenants."""
        with reading(self._engine) as connection:
            return read_statistics(connection)

    def remove_compared(self, until: float) -> None:
        """Remove the answers on uploaded images that were given until this time."""
        with writing(self._engine) as connection:
            remove_answers(connection, until)

    # Leases

    def renew_lease(self, executor_id: str, seconds: float, *, works: bool = True) -> None:
        """Extend the lease of a process: others leave its jobs alone for `seconds`. A gateway runs no jobs (`works`)."""
        with writing(self._engine) as connection:
            executors.renew(connection, executor_id, seconds, works=works)

    def drop_lease(self, executor_id: str) -> None:
        """End the lease of a process that stops: its work may be taken over at once."""
        with writing(self._engine) as connection:
            executors.stop(connection, executor_id)

    def executors(self) -> Executors:
        """The processes with a lease, and those that have stopped. Rows of all others are removed."""
        with writing(self._engine) as connection:
            return executors.read(connection)

    def live_executors(self) -> set[str]:
        """Names of the processes, gateways among them, whose lease has not run out."""
        return self.executors().alive


def _existing(connection: sa.Connection, tenant: str, name: str) -> int:
    """The use of a quota of what exists now: the number of active jobs, or the bytes of all jobs."""
    if name == "active_jobs":
        return _count_active(connection, tenant)
    ended = _jobs.c.state.in_(("failed", "cancelled"))  # their files are removed; those of deleted ones were measured
    size = sa.func.coalesce(_jobs.c.stored_bytes, sa.case((ended, 0), else_=_jobs.c.reserved_bytes), 0)
    query = sa.select(sa.func.sum(size)).where(_jobs.c.tenant == tenant)
    return int(connection.scalar(query) or 0) + stored_by_studies(connection, tenant)


def _count_active(connection: sa.Connection, tenant: str, kind: Kind | None = None) -> int:
    """The number of active jobs of a tenant, of one kind or of all."""
    # With the tenant as a condition SQLite would use the index of tenants, and read every job that the tenant ever made.
    # Few jobs are active, and the index of states finds them.
    query = sa.select(sa.func.count().filter(_jobs.c.tenant == tenant)).where(_jobs.c.state.in_(ACTIVE))
    if kind is not None:
        query = query.where(_jobs.c.kind == kind)
    return connection.scalar(query) or 0


def check_existing(connection: sa.Connection, tenant: str, quota: Quota, amounts: Mapping[str, int]) -> None:
    """Raise QuotaExceededError if these amounts exceed quotas of what exists now. The tenant must be locked."""
    for name, amount in amounts.items():
        limit = quota.limit_of(name)
        if limit is not None and (used := _existing(connection, tenant, name)) + amount > limit:
            raise QuotaExceededError(QuotaUse(name, limit, used), amount)


def _undo(connection: sa.Connection, job_id: str, amounts: Mapping[str, int] | None) -> None:
    """Undo what an active job uses of quotas, if it has no error: with an error that has been done, or is not to be done."""
    if amounts is None:
        return
    row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id).with_for_update()).one_or_none()
    if row is not None and row.error is None and row.state in ACTIVE:
        counters.lock_tenant(connection, row.tenant)
        counters.subtract(connection, row.tenant, amounts, row.created_at)


def _job_or_none(connection: sa.Connection, job_id: str) -> Job | None:
    row = connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).one_or_none()
    return None if row is None else Job(**row._mapping)


def _job(connection: sa.Connection, job_id: str) -> Job:
    return Job(**connection.execute(sa.select(_jobs).where(_jobs.c.id == job_id)).one()._mapping)
