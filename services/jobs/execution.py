"""Run the shards and the end of a job of any kind, and record its outcome. `workflow` makes this durable.

Every function here may run again after a crash, and may run twice at once after a lease ran out: shards are idempotent and
files are put into place atomically.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from dermis.errors import StorageError
from services import metrics, tracing
from services.errors import InferenceMemoryError, InferenceUnavailableError, TakenOverError, is_transient
from services.jobs import dataset, projection
from services.jobs.context import JobContext, ShutdownError, StoppedError, retry_transient
from services.jobs.statistics import Kind
from services.jobs.table import Job
from services.observed_store import ObservedStore
from services.problems import Problem, is_disk_full, problem, problem_of
from services.tenants import folder_of

logger = logging.getLogger("dermis.jobs")


class JobKind(Protocol):
    """The work of one kind of job. Each implementation is a module."""

    def path(self, job_id: str) -> str:
        """The path of the job in the API."""

    def has_inputs(self, ctx: JobContext, job: Job) -> bool:
        """Whether everything that the job works on is stored."""

    def run_shard(self, ctx: JobContext, job: Job, shard: int, on_begin: Callable[[], None]) -> None:
        """Do one shard and record its progress in the table.

        Args:
            ctx: The context of the jobs.
            job: The job.
            shard: The number of the shard.
            on_begin: Called when the work begins, before the table says so.

        Raises:
            StoppedError: If the job is to stop.
        """

    def finish(self, ctx: JobContext, job: Job) -> None:
        """Complete the files of a job whose shards are all finished.

        Raises:
            StoppedError: If the job is to stop.
        """


KINDS: Mapping[Kind, JobKind] = {"dataset": dataset, "projection": projection}


def run_shard(ctx: JobContext, job_id: str, shard: int) -> str:
    """Do one shard of a job.

    Returns:
        "finished", or "stopped" if the job is to stop; a failure is recorded in the table.

    Raises:
        ShutdownError: If the process is to stop.
        Exception: A transient error (`services.errors.is_transient`), which is never the outcome of a job.
    """
    job = ctx.table.get(job_id)
    if job is None or ctx.table.must_stop(job_id):
        return "stopped"
    retries = metrics.shard_retries.labels(job.kind)

    def count() -> None:
        if ctx.table.is_begun(job_id, shard):
            retries.inc()

    try:
        with tracing.job_span(f"{job.kind} shard", job.trace_parent, job__id=job_id, shard__number=shard):
            KINDS[job.kind].run_shard(ctx, job, shard, count)
        outcome = "finished"
    except StoppedError:
        outcome = "stopped"
    except ShutdownError:
        with suppress(
            Exception
        ):  # another error would be the outcome of the shard, which then only counts as begun again
            ctx.table.return_shard(job_id, shard)
        raise
    except Exception as error:
        if is_transient(error):
            raise
        # Otherwise another shard has failed, and the files of this one were removed while it ran.
        if not retry_transient(ctx, lambda: ctx.table.must_stop(job_id)):
            _fail(ctx, job, error)
        outcome = "stopped"
    _remove_late_files(ctx, job)
    return outcome


def finish(ctx: JobContext, job_id: str, worker: str | None = None) -> str:
    """End a job none of whose shards is running: complete its files, or remove them if it failed or was cancelled.

    Args:
        ctx: The context of the jobs.
        job_id: The job.
        worker: The name of this worker. A dataset that another one has taken over is left to that one.

    Returns:
        The last state of the job, or "deleted".

    Raises:
        ShutdownError: If the process is to stop.
        Exception: A transient error; the call may then be repeated.
    """
    job: Job | None = ctx.table.get(job_id)
    if job is None or not job.active:
        return "deleted" if job is None else job.state
    # The owner of a projection can be the process that has stored its images again, which does not run it.
    owner = worker if job.kind == "dataset" else None
    begun = job if owner is None else replace(job, owner=owner)
    if not ctx.table.must_stop(job_id):
        try:
            with tracing.job_span(f"{job.kind} finish", job.trace_parent, job__id=job_id):
                KINDS[job.kind].finish(ctx, begun)
                stored_bytes = ctx.retrying_store(job).total_bytes()
        except StoppedError:
            pass
        except Exception as error:
            if is_transient(error):
                raise
            _fail(ctx, job, error)
        else:
            # If it was cancelled in the last moment, this changes nothing, and `end` removes its files.
            job = ctx.table.finish(job_id, "succeeded", stored_bytes=stored_bytes, owner=owner)
            if job is not None and owner not in (None, job.owner) and not ctx.table.must_stop(job_id):
                raise TakenOverError(f"{job_id}: another worker finishes it")
    state = end(ctx, job_id, job)
    _remove_late_files(ctx, begun)
    return state


def end(ctx: JobContext, job_id: str, job: Job | None = None) -> str:
    """End a job that did not succeed, unless another worker has ended it. None of its shards may be running.

    Args:
        ctx: The context of the jobs.
        job_id: The job.
        job: The job as it was last read.

    Returns:
        The last state of the job, or "deleted".
    """
    if job is None or job.active:
        job = ctx.table.get(job_id)
    if job is not None and job.active:
        # The reason is in the table already, so it is kept if this process ends here.
        _try_remove_files(ctx, job)
        job = ctx.table.finish(job_id, "cancelled" if job.state == "cancelling" else "failed")
        if job is not None and job.active:  # it was cancelled meanwhile
            job = ctx.table.finish(job_id, "cancelled")
    state = "deleted" if job is None else job.state
    logger.info("job ended", extra={"job": job_id, "state": state})
    return state


def record_failure(
    ctx: JobContext, job: Job, reason: str, problem_kind: str = "internal", *, undo: Mapping[str, int] | None = None
) -> None:
    """Record that a job cannot continue; `end` or `finish` ends it.

    Args:
        ctx: The context of the jobs.
        job: The job.
        reason: Why, for callers of the API.
        problem_kind: The kind of the problem document (`services.problems.KINDS`).
        undo: What the job uses of quotas, if that is undone (`JobTable.record_error`).
    """
    logger.error("job cannot continue", extra={"job": job.id, "reason": reason})
    document = problem(problem_kind, reason, KINDS[job.kind].path(job.id))
    ctx.table.record_error(job.id, document.model_dump(exclude_none=True), undo=undo)


def measure_files(ctx: JobContext, limit: int = 100) -> None:
    """Record the size of the files of some jobs that ended under a version that did not measure them."""
    for job in ctx.table.unmeasured(limit):
        try:
            ctx.table.set_stored_bytes(job.id, ctx.store(job).total_bytes())
        except StorageError as error:  # a later call tries again
            logger.warning("files not measured", extra={"job": job.id, "error": str(error)})


def remove_files(ctx: JobContext, tenant: str, job_id: str) -> None:
    """Remove all files of a job of a tenant, if there are any."""
    ObservedStore(ctx.storage).remove(folder_of(tenant, job_id))


def _remove_late_files(ctx: JobContext, job: Job) -> None:
    """Remove what was written for a job after another worker had ended it and removed its files. Nothing else would do so."""

    def remove() -> None:
        now = ctx.table.get(job.id)
        if now is None or now.state in ("failed", "cancelled"):
            _try_remove_files(ctx, job)

    retry_transient(ctx, remove)


def _try_remove_files(ctx: JobContext, job: Job) -> None:
    """Remove the files of a job that is about to end; files that cannot be removed do not prevent its end."""
    try:
        remove_files(ctx, job.tenant, job.id)
    except StorageError as error:
        if is_transient(error):
            raise
        logger.error("files not removed", extra={"job": job.id, "error": str(error)})


def _fail(ctx: JobContext, job: Job, error: Exception) -> None:
    """Record why a job fails; `finish` ends it and removes its files."""
    document = _problem_of_job(job, error)
    kind = document.type.rpartition(":")[2]
    if kind == "internal":
        logger.error("job failed", extra={"job": job.id}, exc_info=error)
    else:
        logger.warning("job failed", extra={"job": job.id, "kind": kind, "error": str(error)})
    fields = document.model_dump(exclude_none=True)

    def record() -> None:
        try:
            ctx.table.record_error(job.id, fields)
        except Exception as full:
            if is_transient(full) or not is_disk_full(full):
                raise
            # The record itself needs disk space, so remove the files first; they are to be removed anyway.
            remove_files(ctx, job.tenant, job.id)
            ctx.table.record_error(job.id, fields)

    retry_transient(ctx, record)


def _problem_of_job(job: Job, error: Exception) -> Problem:
    """Return why a job failed, for callers: without any path of the service and without the text of a driver or a library."""
    cause = problem_of(error)
    detail = cause.detail
    if isinstance(error, InferenceMemoryError):
        detail = (
            "the machine or the GPU had too little memory for the job for some minutes; ask the operator of this service for "
            "more, or create the job again when less is in use"
        )
    elif isinstance(error, InferenceUnavailableError):
        detail = "a service that the job needs was unavailable for some minutes; see the log; create the job again"
    elif cause.kind == "internal":
        detail = "the service failed; its log has the details under the id of this job"
    return problem(cause.kind, detail, KINDS[job.kind].path(job.id), errors=cause.errors)
