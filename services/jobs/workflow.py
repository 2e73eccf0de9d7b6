"""The only module that uses DBOS: a workflow per job that enqueues a workflow per shard, waits for them and finishes the job.

DBOS has one instance per process, which `start` launches and `stop` ends. The arguments of a workflow are ids only, so that a
restarted process can continue it with another `JobContext`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import sqlalchemy as sa
from dbos import DBOS, DBOSConfig, SetEnqueueOptions, SetWorkflowID, WorkflowStatus
from dbos import error as dbos_error

from services import metrics
from services.errors import DatabaseUnavailableError
from services.jobs import execution, projection
from services.jobs.context import JobContext, ShutdownError, retry_transient
from services.jobs.database import (
    IDLE_TRANSACTION_SECONDS,
    UNREACHABLE,
    complete_sqlite,
    connection_options,
    database_errors,
)
from services.jobs.statistics import Kind
from services.jobs.table import Job
from services.tenants import DEFAULT_TENANT

logger = logging.getLogger("dermis.jobs")

# DBOS recovers workflows of its own application version only. Raise this when the steps of a workflow change, not before:
# jobs that were started under another version would wait for a worker of that version. The names of workflows, steps and queues
# below are stored with the jobs as well.
APPLICATION_VERSION = "1"

# Each queue has a partition per tenant, so that a tenant never waits until the datasets of another one are done; `Turns`
# divides the work of a process between them. (Databases of versions up to 0.1 also have the queues dermis-datasets,
# dermis-shards and dermis-projections. DBOS continues to serve every queue of a database.)
_JOB_QUEUE = "dermis-tenant-jobs"
# The shards of projections have their own queue, so that datasets do not wait for work that takes minutes.
_SHARD_QUEUES: Mapping[Kind, str] = {"dataset": "dermis-tenant-shards", "projection": "dermis-tenant-projections"}
_POLL_SECONDS = 0.2
# Each running workflow is a thread: limits for all tenants together, as a multiple of that for one.
_MAX_TENANT_JOBS = 8
_MAX_TENANT_SHARDS = 32
# Parts of projections that a worker claims at most: one at work and one that is ready. They take minutes, and others would wait
# here while other workers have nothing to do. DBOS takes them from the tenants at random.
_MAX_PROJECTION_SHARDS = 2
_CHECK_SECONDS = 5.0
_LISTED_AT_ONCE = 5000  # databases limit the parameters of a query
_STUCK_SWEEPS = 2
# Limits for a job that ends the process each time it runs.
_MAX_RECOVERIES = 100
_MAX_RESTARTS = 20
_REPEAT_SECONDS = 10.0

_ctx: JobContext | None = None
_dbos: DBOS | None = None
_executor_id = ""
_running: list[str] = []  # an id is in it twice if a run that lost its workflow has not ended yet
_running_lock = threading.Lock()
_idle_sweeps: dict[str, int] = {}
_restarts: dict[str, int] = {}


class _RepetitionFilter(logging.Filter):
    """Drops the stack traces that DBOS logs for workflows that we cancelled, and messages that it repeats.

    While the database cannot be reached, the threads of DBOS log that about twenty times a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_logged = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        error_type = record.exc_info[0] if record.exc_info else None
        if error_type is not None and issubclass(error_type, _CANCELLED):
            return False
        if record.levelno <= logging.WARNING and "OperationalError" in str(record.msg):
            if time.monotonic() - self._last_logged < _REPEAT_SECONDS:
                return False
            self._last_logged = time.monotonic()
        return True


_CANCELLED = (dbos_error.DBOSAwaitedWorkflowCancelledError, dbos_error.DBOSWorkflowCancelledError)
_repetition_filter = _RepetitionFilter()  # one object, so that adding it twice adds it once


def create_tables(url: str) -> None:
    """Create DBOS's tables, or upgrade those of an earlier version.

    Args:
        url: SQLAlchemy URL of the database.
    """
    complete_sqlite()
    DBOS.migrate(url)


def start(
    ctx: JobContext,
    *,
    url: str,
    executor_id: str,
    shard_concurrency: int,
    max_active: int,
    shared_poll_seconds: float = 0.5,
    works: bool = True,
) -> None:
    """Launch DBOS and continue the workflows that this worker left unfinished. Not to be called on an event loop.

    `create_tables` comes first.

    Args:
        ctx: The context of the jobs.
        url: SQLAlchemy URL of the database.
        executor_id: The name of this worker.
        shard_concurrency: Shards of datasets of one tenant that this worker runs at the same time.
        max_active: Jobs of one tenant whose workflow this worker runs at the same time.
        shared_poll_seconds: Time between two polls of each queue of a PostgreSQL, which many workers may share: each poll is
            several transactions. SQLite is polled every 0.2 s.
        works: Whether this process runs jobs. If not, it only enqueues them.
    """
    global _ctx, _dbos, _executor_id  # noqa: PLW0603
    _ctx, _executor_id = ctx, executor_id
    _idle_sweeps.clear()
    _restarts.clear()
    config: DBOSConfig = {
        "name": "dermis",
        "system_database_url": url,
        "application_version": APPLICATION_VERSION,
        "executor_id": executor_id,
        "log_level": "WARNING",
        "sys_db_idle_transaction_timeout_sec": IDLE_TRANSACTION_SECONDS,
    }
    parsed = sa.make_url(url)
    shared = parsed.get_backend_name() != "sqlite"
    if shared:
        config["db_engine_kwargs"] = {"connect_args": connection_options(parsed)}
    logging.getLogger("dbos").addFilter(_repetition_filter)
    _dbos = DBOS(config=config)
    if not works:
        DBOS.listen_queues([])
    DBOS.launch()
    threading.Thread(target=_stop_claiming, args=(ctx, _dbos), name="dermis-stop-claiming", daemon=True).start()
    for queue, of_tenant, of_all in (
        (_JOB_QUEUE, max_active, max_active * _MAX_TENANT_JOBS),
        (_SHARD_QUEUES["dataset"], shard_concurrency, shard_concurrency * _MAX_TENANT_SHARDS),
        (_SHARD_QUEUES["projection"], 1, _MAX_PROJECTION_SHARDS),
    ):
        DBOS.register_queue(
            queue,
            worker_concurrency=of_all,
            partition_worker_concurrency=of_tenant,
            polling_interval_sec=shared_poll_seconds if shared else _POLL_SECONDS,
            on_conflict="always_update" if works else "never_update",
        )


def _stop_claiming(ctx: JobContext, dbos: DBOS) -> None:
    """Claim no more workflows once this process is to end, which can take minutes while calls are open.

    What it has claimed waits until its lease has ended. `DBOS.destroy` sets the same events first, and enqueuing goes on.
    """
    ctx.stopping.wait()
    for event in dbos.background_thread_stop_events:
        event.set()


def stop() -> None:
    """Stop working. Unfinished work stays in the database, for the next start or another worker."""
    global _ctx, _dbos  # noqa: PLW0603
    if _ctx is None:
        return
    _ctx.stopping.set()
    deadline = time.monotonic() + 30
    while _running and time.monotonic() < deadline:
        time.sleep(0.02)
    DBOS.destroy()
    _ctx = _dbos = None


def executor_id() -> str:
    """The name of this worker."""
    return _executor_id


def submit(job: Job) -> None:
    """Enqueue the workflow of a job, unless it is enqueued. If the database prevents it, `sweep` does it later."""
    try:
        with _database(), SetWorkflowID(job.id), SetEnqueueOptions(queue_partition_key=job.tenant):
            DBOS.enqueue_workflow(_JOB_QUEUE, _job_workflow, job.id, job.shards_total)
    except DatabaseUnavailableError as error:
        logger.warning("job not enqueued yet", extra={"job": job.id, "error": str(error)})


def cancel_or_delete(ctx: JobContext, job: Job) -> Job | None:
    """Ask an active job to stop and return it; remove an ended one with its files and workflows and return None."""
    now = ctx.table.request_cancel(job.id)
    if now is None:  # another worker has removed it: its record is deleted last
        return None
    if now.active:
        return now
    ctx.table.mark_deleted(job.id)  # first: a job must not look complete when only a part of its files is left
    execution.remove_files(ctx, job.tenant, job.id)
    with _database():
        DBOS.delete_workflows([job.id, *_shard_workflows(job)])
    ctx.table.delete(job.id)
    return None


def sweep(leases_reliable: bool = True) -> None:
    """Resume work that no worker does: workflows of dead workers, stuck ones of this worker, jobs without a workflow.

    Args:
        leases_reliable: Whether the leases of other workers show which of them are alive. If not, their work is not resumed.
    """
    ctx = _context()
    # The processes are read after the work that is compared with them: one that has started meanwhile must not look dead.
    pending = DBOS.list_workflows(status="PENDING", load_input=False, load_output=False)
    executors = ctx.table.executors()
    alive = executors.alive | {_executor_id}
    for ended in _idle_sweeps.keys() - {status.workflow_id for status in pending}:
        del _idle_sweeps[ended]
    for status in pending:
        ours = status.executor_id == _executor_id
        if _is_stuck(status.workflow_id) if ours else leases_reliable and status.executor_id not in alive:
            now = DBOS.get_workflow_status(status.workflow_id)
            if now is None or _run_of(now) != _run_of(status):  # another worker has resumed it since the list was read
                continue
            if _resume(status):
                logger.warning("workflow resumed", extra={"workflow": status.workflow_id, "worker": status.executor_id})
                if not ours and status.executor_id not in executors.stopped:
                    metrics.lease_takeovers.inc()
    active = ctx.table.active()
    alive = ctx.table.executors().alive | {_executor_id}
    for job in active:
        ours = job.owner == _executor_id
        if job.id not in ctx.submitting and (ours or (leases_reliable and job.owner not in alive)):
            try:
                _continue(ctx, job)
            except Exception as error:  # an error of one job must not stop the others
                logger.warning("job not resumed", extra={"job": job.id, "error": str(error)})


def _resume(status: WorkflowStatus) -> bool:
    """Enqueue a workflow again that its worker does not run. False if another worker has done so.

    `DBOS.resume_workflow` would also forget how often the workflow has begun: with two workers, one that ends the process of
    each would be resumed for ever.
    """
    if _dbos is None:
        raise ShutdownError
    worker, queue = status.executor_id or "", status.queue_name or _JOB_QUEUE
    return _dbos._sys_db.reenqueue_for_recovery(status.workflow_id, [worker], queue)


def _continue(ctx: JobContext, job: Job) -> None:
    """Continue an active job whose workflow is missing, or has ended without an outcome of the job."""
    status = DBOS.get_workflow_status(job.id)
    now = ctx.table.get(job.id)
    if now is None or not now.active:  # it has ended since the list of active ones was read
        return
    if status is None:
        # It was never enqueued: the process or its connection ended first.
        if job.state == "queued" and not execution.KINDS[job.kind].has_inputs(ctx, job):
            _end_interrupted(ctx, job)
        else:
            submit(job)
        return
    # Shards that run again while `finish` collects their files would write files that nothing removes.
    is_whole = now.shards_done == now.shards_total
    if status.status in ("PENDING", "ENQUEUED", "DELAYED"):
        if is_whole:
            return
        failed = _shard_workflows(job, "ERROR")
        if failed and not _may_restart(job.id):
            execution.record_failure(ctx, job, "its shards failed repeatedly; create the job again")
        elif failed:
            logger.warning("shards started again", extra={"job": job.id, "shards": len(failed)})
            for workflow_id in failed:
                # In one transaction: no one would enqueue a shard again that had no workflow. It keeps its priority.
                queue = _SHARD_QUEUES[job.kind]
                DBOS.rewind_workflow(workflow_id, queue_name=queue, queue_partition_key=job.tenant)
        return
    if status.status in ("ERROR", "SUCCESS") and _may_restart(job.id):
        # No outcome of a job makes its workflow fail, so the cause is the database or the tables of DBOS.
        logger.warning("job started again", extra={"job": job.id, "status": status.status, "error": str(status.error)})
        kept = set(_shard_workflows(job) if is_whole else _shard_workflows(job, "PENDING", "ENQUEUED"))
        DBOS.delete_workflows([job.id, *(each for each in _shard_workflows(job) if each not in kept)])
        submit(job)
        return
    _end_as_failed(ctx, job, f"its workflow ended as {status.status}; create the job again")


def _end_interrupted(ctx: JobContext, job: Job) -> None:
    """End a projection whose images were not all stored, unless another call with its key stores them, or has stored them."""
    stored_here = job.id in ctx.submitting  # read before the workflow, which such a call enqueues first
    now = ctx.table.get(job.id)
    if stored_here or now is None or now.owner != job.owner or DBOS.get_workflow_status(job.id) is not None:
        return
    reason, used = "not all images were stored; send them again", projection.amounts(job.request)
    _end_as_failed(ctx, job, reason, "upload-interrupted", undo=used)


def _end_as_failed(
    ctx: JobContext, job: Job, reason: str, problem_kind: str = "internal", *, undo: Mapping[str, int] | None = None
) -> None:
    """End a job as failed: now, or in a later sweep if shards are running, which have to notice that they are to stop."""
    execution.record_failure(ctx, job, reason, problem_kind, undo=undo)
    _cancel_queued(job)
    if not _shard_workflows(job, "PENDING"):
        execution.end(ctx, job.id)


def _cancel_queued(job: Job) -> None:
    queued = _shard_workflows(job, "ENQUEUED")
    if queued:
        DBOS.cancel_workflows(queued)


def _may_restart(job_id: str) -> bool:
    """Whether to start failed workflows of a job again: a limited number of times, as the cause can be a bug."""
    _restarts[job_id] = _restarts.get(job_id, 0) + 1
    return _restarts[job_id] <= _MAX_RESTARTS


def _run_of(status: WorkflowStatus) -> tuple[str, str | None, int | None]:
    """What differs between two runs of a workflow, also if a worker that was lost has started again under its name."""
    return status.status, status.executor_id, status.dequeued_at


def _is_stuck(workflow_id: str) -> bool:
    """Whether DBOS listed a workflow in several sweeps as running here although it was not: its end was not recorded.

    In a stop no workflow runs, and none is stuck: another worker takes it over when the lease has ended.
    """
    with _running_lock:
        idle = workflow_id not in _running and not _context().stopping.is_set()
    _idle_sweeps[workflow_id] = _idle_sweeps.get(workflow_id, 0) + 1 if idle else 0
    return _idle_sweeps[workflow_id] >= _STUCK_SWEEPS


@DBOS.workflow(name="dermis.dataset", max_recovery_attempts=_MAX_RECOVERIES)
def _job_workflow(job_id: str, shards: int) -> str:
    """One job of any kind. A replay after a crash repeats its steps, so their order depends on the arguments alone."""
    with _running_here(job_id) as ctx:
        job = retry_transient(ctx, lambda: ctx.table.set_owner(job_id, _executor_id))
        retry_transient(ctx, lambda: ctx.table.restart_rate(job_id))
        # Also for a job that was deleted, whose shards stop at once, because a replay needs the same steps.
        tenant = DEFAULT_TENANT if job is None else job.tenant
        kind: Kind = "dataset" if job is None else job.kind
        for shard in range(shards):
            _enqueue_shard(job_id, tenant, kind, shard)
        _wait_for_shards(job_id)
        return _finish(job_id)


@DBOS.workflow(name="dermis.shard", max_recovery_attempts=_MAX_RECOVERIES)
def _shard_workflow(job_id: str, shard: int) -> str:
    with _running_here(_shard_workflow_id(job_id, shard)):
        return _run_shard(job_id, shard)


@DBOS.step(name="dermis.make_shard")
def _run_shard(job_id: str, shard: int) -> str:
    ctx = _context()
    return retry_transient(ctx, lambda: execution.run_shard(ctx, job_id, shard))


@DBOS.step(name="dermis.wait_for_shards")
def _wait_for_shards(job_id: str) -> None:
    """Return when every shard is finished, or when the job is to stop and no shard is running."""
    ctx = _context()
    last_check = time.monotonic()
    while not ctx.stopping.wait(_POLL_SECONDS):
        check_workflows = time.monotonic() - last_check > _CHECK_SECONDS
        if check_workflows:
            last_check = time.monotonic()
        if retry_transient(ctx, partial(_are_shards_over, ctx, job_id, check_workflows)):
            return
    raise ShutdownError


def _are_shards_over(ctx: JobContext, job_id: str, check_workflows: bool) -> bool:
    """Whether there is no shard left to wait for.

    Args:
        ctx: The context of the jobs.
        job_id: The job.
        check_workflows: Check the states of the shards' workflows too.
    """
    with _database():
        state = ctx.table.recent_states.of(job_id)
        if not (check_workflows or state.must_stop or state.is_whole):
            return False
        job = ctx.table.get(job_id)
        if job is None:
            return True
        if ctx.table.must_stop(job_id):
            # Queued shards must not start; running ones check regularly whether they must stop.
            _cancel_queued(job)
            return not _shard_workflows(job, "PENDING")
        if job.shards_done == job.shards_total:
            return True
        # `sweep` starts failed ones again.
        if not check_workflows or _shard_workflows(job, "ENQUEUED", "PENDING", "ERROR") or _is_whole(job_id):
            return False
        execution.record_failure(ctx, job, "its shards ended without a result; create the job again")
        return True


@DBOS.step(name="dermis.finish")
def _finish(job_id: str) -> str:
    ctx = _context()

    def finish() -> str:
        _own(ctx, job_id)
        state = execution.finish(ctx, job_id, _executor_id)
        job = ctx.table.get(job_id)
        if job is not None and not job.active:
            with _database():
                _delete_ended_shards(job)
        return state

    return retry_transient(ctx, finish)


def _own(ctx: JobContext, job_id: str) -> None:
    """Make this worker the owner of a job whose workflow it runs by the record of DBOS.

    A run that has lost the workflow can write its own name late, and would then never end the job itself.
    """
    job = ctx.table.get(job_id)
    if job is None or not job.active or job.owner == _executor_id:
        return
    with _database():
        status = DBOS.get_workflow_status(job_id)
    if status is not None and (status.status, status.executor_id) == ("PENDING", _executor_id):
        ctx.table.set_owner(job_id, _executor_id)


def _delete_ended_shards(job: Job) -> None:
    """Delete the workflows of an ended job's shards, else each query of DBOS would read those of every job that there was.

    A replay of the job's workflow does not need them: it has recorded that they were enqueued, and waits for none. One that is
    still recording its end is left, until the job is deleted.
    """
    ended = _shard_workflows(job, "SUCCESS", "ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED")
    if ended:
        DBOS.delete_workflows(ended)


def _is_whole(job_id: str) -> bool:
    job = _context().table.get(job_id)
    return job is not None and job.shards_done == job.shards_total


def _enqueue_shard(job_id: str, tenant: str, kind: Kind, shard: int) -> None:
    # Shard 0 of every job goes before shard 1 of any: a small job does not wait for a large one of its tenant to end.
    options = SetEnqueueOptions(priority=shard + 1, queue_partition_key=tenant)
    with SetWorkflowID(_shard_workflow_id(job_id, shard)), options:
        DBOS.enqueue_workflow(_SHARD_QUEUES[kind], _shard_workflow, job_id, shard)


def _shard_workflow_id(job_id: str, shard: int) -> str:
    return f"{job_id}-{shard:05d}"


def _shard_workflows(job: Job, *states: str) -> list[str]:
    """Ids of the workflows of a job's shards in these states, by default in any. By id: DBOS has no index of their prefixes."""
    ids = [_shard_workflow_id(job.id, shard) for shard in range(job.shards_total)]
    return [
        status.workflow_id
        for first in range(0, len(ids), _LISTED_AT_ONCE)
        for status in DBOS.list_workflows(
            workflow_ids=ids[first : first + _LISTED_AT_ONCE],
            status=list(states) or None,
            load_input=False,
            load_output=False,
        )
    ]


@contextmanager
def _database() -> Iterator[None]:
    """Raise DatabaseUnavailableError for errors of DBOS while the database cannot be reached. It handles most itself."""
    with database_errors():
        try:
            yield
        except dbos_error.DBOSQueryTimeoutError as error:
            raise DatabaseUnavailableError(UNREACHABLE) from error


@contextmanager
def _running_here(workflow_id: str) -> Iterator[JobContext]:
    ctx = _context()
    with _running_lock:
        _running.append(workflow_id)
    try:
        yield ctx
    finally:
        with _running_lock:
            _running.remove(workflow_id)


def _context() -> JobContext:
    if _ctx is None:
        raise ShutdownError
    return _ctx
