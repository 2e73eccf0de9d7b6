"""DBOS, and all that we ask of it: a dataset workflow that enqueues shard workflows, waits for them and finishes.

Nothing outside this module knows DBOS. It is one instance a process; `start` and `stop` are its life. Workflows name their
job only, so that what they need (the Workshop) can be another one after a restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from dbos import DBOS, DBOSConfig, SetEnqueueOptions, SetWorkflowID
from dbos import error as dbos_error

from services.errors import DatabaseUnavailableError
from services.jobs import work
from services.jobs.database import UNREACHABLE, database_errors
from services.jobs.table import Job, Kind
from services.jobs.workshop import ShutdownError, Workshop, retry_transient

logger = logging.getLogger("dermis.jobs")

# DBOS recovers workflows of its own application version only. Raise this when the steps of a workflow change, not before:
# jobs begun under another version would wait for a worker that still has it.
APPLICATION_VERSION = "1"

_DATASETS = "dermis-datasets"
_SHARDS = "dermis-shards"
_PROJECTIONS = "dermis-projections"  # its own, so that datasets do not wait for what takes minutes
_SHARD_QUEUES: dict[Kind, str] = {"dataset": _SHARDS, "projection": _PROJECTIONS}
_POLL_SECONDS = 0.2
_STUCK_SWEEPS = 2
# A job that takes its process down with it must not do so for ever.
_MAX_RECOVERIES = 100
_MAX_RESTARTS = 20
_REPEAT_SECONDS = 10.0

_shop: Workshop | None = None
_executor_id = ""
_running: set[str] = set()
_running_lock = threading.Lock()
_idle_sweeps: dict[str, int] = {}
_restarts: dict[str, int] = {}


class _Quieter(logging.Filter):
    """Drops DBOS's stack traces of workflows that we cancelled, and messages that it repeats.

    While the database cannot be reached, its threads log that about twenty times a second.
    """

    def __init__(self) -> None:
        super().__init__()
        self._said = float("-inf")

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        if kind is not None and issubclass(kind, _CANCELLED):
            return False
        if record.levelno <= logging.WARNING and "OperationalError" in str(record.msg):
            if time.monotonic() - self._said < _REPEAT_SECONDS:
                return False
            self._said = time.monotonic()
        return True


_CANCELLED = (dbos_error.DBOSAwaitedWorkflowCancelledError, dbos_error.DBOSWorkflowCancelledError)
_quieter = _Quieter()  # one object, so that adding it twice adds it once


def start(shop: Workshop, *, url: str, executor_id: str, shard_concurrency: int, max_active: int) -> None:
    """Launch DBOS on the database at `url` and go on with what this executor left behind. Not from an event loop."""
    global _shop, _executor_id
    _shop, _executor_id = shop, executor_id
    _idle_sweeps.clear()
    _restarts.clear()
    config: DBOSConfig = {
        "name": "dermis",
        "system_database_url": url,
        "application_version": APPLICATION_VERSION,
        "executor_id": executor_id,
        "log_level": "WARNING",
    }
    logging.getLogger("dbos").addFilter(_quieter)
    DBOS(config=config)
    DBOS.launch()
    for queue, concurrency in ((_DATASETS, max_active), (_SHARDS, shard_concurrency), (_PROJECTIONS, 1)):
        DBOS.register_queue(
            queue, worker_concurrency=concurrency, polling_interval_sec=_POLL_SECONDS, on_conflict="always_update"
        )


def stop() -> None:
    """Stop working. What is unfinished stays so in the database, for the next start or another worker."""
    global _shop  # noqa: PLW0603
    if _shop is None:
        return
    _shop.stopping.set()
    deadline = time.monotonic() + 30
    while _running and time.monotonic() < deadline:
        time.sleep(0.02)
    DBOS.destroy()
    _shop = None


def executor_id() -> str:
    """The name of this worker."""
    return _executor_id


def submit(job: Job) -> None:
    """Enqueue the job's workflow; a second time changes nothing. If the database prevents it now, `sweep` does it later."""
    try:
        with _database(), SetWorkflowID(job.id):
            DBOS.enqueue_workflow(_DATASETS, _dataset_workflow, job.id, job.shards_total)
    except DatabaseUnavailableError as error:
        logger.warning("job not enqueued yet", extra={"job": job.id, "error": str(error)})


def forget(job_id: str) -> None:
    """Remove a job's workflows from DBOS's tables."""
    with _database():
        DBOS.delete_workflows([job_id, *_shard_workflows(job_id)])


def sweep(leases_hold: bool = True) -> None:
    """Resume work that no worker does: workflows of dead workers, stuck ones of our own, jobs without a workflow.

    Without `leases_hold` the leases of other workers do not tell whether they live, and their work is left alone.
    """
    shop = _workshop()
    alive = shop.table.live_workers() | {_executor_id}
    for status in DBOS.list_workflows(status="PENDING", load_input=False, load_output=False):
        ours = status.executor_id == _executor_id
        if _is_stuck(status.workflow_id) if ours else leases_hold and status.executor_id not in alive:
            logger.warning("workflow resumed", extra={"workflow": status.workflow_id, "worker": status.executor_id})
            DBOS.resume_workflow(status.workflow_id, queue_name=status.queue_name)
    for job in shop.table.active():
        ours = job.owner == _executor_id
        if job.id not in shop.submitting and (ours or (leases_hold and job.owner not in alive)):
            try:
                _go_on(shop, job)
            except Exception as error:  # the other jobs are to go on all the same
                logger.warning("job not resumed", extra={"job": job.id, "error": str(error)})


def _go_on(shop: Workshop, job: Job) -> None:
    """Go on with an active job whose workflow is missing, or has ended without an outcome of the job."""
    status = DBOS.get_workflow_status(job.id)
    now = shop.table.get(job.id)
    if now is None or not now.active:  # it has ended since the list of active ones was read
        return
    if status is None:
        # It was never enqueued: the process or its connection ended first.
        if job.kind == "projection" and job.state == "queued" and not work.has_inputs(shop, job):
            shop.table.release_key(job.id)
            _give_up(shop, job, "the images did not arrive completely; send them again", "upload-interrupted")
        else:
            submit(job)
        return
    if status.status in ("PENDING", "ENQUEUED", "DELAYED"):
        lost = _shard_workflows(job.id, "ERROR")
        if lost and not _may_restart(job.id):
            work.note_failure(shop, job, "its shards failed again and again; ask for it again")
        elif lost:
            logger.warning("shards started again", extra={"job": job.id, "shards": len(lost)})
            DBOS.delete_workflows(lost)
            for workflow_id in lost:
                _enqueue_shard(job.id, job.kind, int(workflow_id.rpartition("-")[2]))
        return
    if status.status in ("ERROR", "SUCCESS") and _may_restart(job.id):
        # No outcome of a job makes its workflow fail, so this is what became of the database or of DBOS's tables.
        logger.warning("job started again", extra={"job": job.id, "status": status.status, "error": str(status.error)})
        at_work = set(_shard_workflows(job.id, "PENDING", "ENQUEUED"))
        DBOS.delete_workflows([job.id, *(each for each in _shard_workflows(job.id) if each not in at_work)])
        submit(job)
        return
    _give_up(shop, job, f"its workflow ended as {status.status}; ask for it again")


def _give_up(shop: Workshop, job: Job, why: str, kind: str = "internal") -> None:
    """End a job as failed: at once, or in a later sweep where shards still have to see that they are to stop."""
    work.note_failure(shop, job, why, kind)
    _cancel_queued(job.id)
    if not _shard_workflows(job.id, "PENDING"):
        work.end(shop, job.id)


def _cancel_queued(job_id: str) -> None:
    queued = _shard_workflows(job_id, "ENQUEUED")
    if queued:
        DBOS.cancel_workflows(queued)


def _may_restart(job_id: str) -> bool:
    """Whether workflows of a job that failed are started again: a limited number of times, as the fault may be in our code."""
    _restarts[job_id] = _restarts.get(job_id, 0) + 1
    return _restarts[job_id] <= _MAX_RESTARTS


def _is_stuck(workflow_id: str) -> bool:
    """Whether DBOS takes a workflow for running here though it has not for several sweeps: its outcome was not recorded."""
    with _running_lock:
        idle = workflow_id not in _running
    _idle_sweeps[workflow_id] = _idle_sweeps.get(workflow_id, 0) + 1 if idle else 0
    return _idle_sweeps[workflow_id] >= _STUCK_SWEEPS


@DBOS.workflow(name="dermis.dataset", max_recovery_attempts=_MAX_RECOVERIES)
def _dataset_workflow(job_id: str, shards: int) -> str:
    """All of one job. The order of its steps is fixed by its arguments, as replay after a crash needs it."""
    with _running_here(job_id) as shop:
        job = retry_transient(shop, lambda: shop.table.own(job_id, _executor_id))
        retry_transient(shop, lambda: shop.table.restart_rate(job_id))
        for shard in range(shards):
            # Shards of a job that was deleted stop at once. They are enqueued all the same, as a replay needs the same steps.
            _enqueue_shard(job_id, "dataset" if job is None else job.kind, shard)
        _wait_for_shards(job_id)
        return _finish(job_id)


@DBOS.workflow(name="dermis.shard", max_recovery_attempts=_MAX_RECOVERIES)
def _shard_workflow(job_id: str, shard: int) -> str:
    with _running_here(_shard_workflow_id(job_id, shard)):
        return _make_shard(job_id, shard)


@DBOS.step(name="dermis.make_shard")
def _make_shard(job_id: str, shard: int) -> str:
    shop = _workshop()
    return retry_transient(shop, lambda: work.make_shard(shop, job_id, shard))


@DBOS.step(name="dermis.wait_for_shards")
def _wait_for_shards(job_id: str) -> None:
    """Return when every shard is finished, or when the job is to stop and no shard is at work any more."""
    shop = _workshop()
    last_check = time.monotonic()
    while not shop.stopping.wait(_POLL_SECONDS):
        check_workflows = time.monotonic() - last_check > 5
        if check_workflows:
            last_check = time.monotonic()
        if retry_transient(shop, partial(_are_shards_over, shop, job_id, check_workflows)):
            return
    raise ShutdownError


def _are_shards_over(shop: Workshop, job_id: str, check_workflows: bool) -> bool:
    """Whether no shard is left to wait for. `check_workflows`: also look at the states of their workflows."""
    with _database():
        job = shop.table.get(job_id)
        if job is None:
            return True
        if shop.table.must_stop(job_id):
            # The queued ones need not start; those at work see for themselves that they are to stop.
            _cancel_queued(job_id)
            return not _shard_workflows(job_id, "PENDING")
        if job.shards_done == job.shards_total:
            return True
        # What failed is started again by `sweep`.
        if not check_workflows or _shard_workflows(job_id, "ENQUEUED", "PENDING", "ERROR") or _is_whole(job_id):
            return False
        work.note_failure(shop, job, "its shards ended without a result; ask for it again")
        return True


@DBOS.step(name="dermis.finish")
def _finish(job_id: str) -> str:
    shop = _workshop()
    return retry_transient(shop, lambda: work.finish(shop, job_id))


def _is_whole(job_id: str) -> bool:
    job = _workshop().table.get(job_id)
    return job is not None and job.shards_done == job.shards_total


def _enqueue_shard(job_id: str, kind: Kind, shard: int) -> None:
    # Shard 0 of every job goes before shard 1 of any: a small job does not wait for a large one to end.
    workflow_id = _shard_workflow_id(job_id, shard)
    with SetWorkflowID(workflow_id), SetEnqueueOptions(priority=shard + 1):
        DBOS.enqueue_workflow(_SHARD_QUEUES[kind], _shard_workflow, job_id, shard)


def _shard_workflow_id(job_id: str, shard: int) -> str:
    return f"{job_id}-{shard:05d}"


def _shard_workflows(job_id: str, *states: str) -> list[str]:
    found = DBOS.list_workflows(
        workflow_id_prefix=f"{job_id}-", status=list(states) or None, load_input=False, load_output=False
    )
    return [status.workflow_id for status in found]


@contextmanager
def _database() -> Iterator[None]:
    """Raise DatabaseUnavailableError for what DBOS raises while the database is away. It waits for most of that itself."""
    with database_errors():
        try:
            yield
        except dbos_error.DBOSQueryTimeoutError as error:
            raise DatabaseUnavailableError(UNREACHABLE) from error


@contextmanager
def _running_here(workflow_id: str) -> Iterator[Workshop]:
    shop = _workshop()
    with _running_lock:
        _running.add(workflow_id)
    try:
        yield shop
    finally:
        with _running_lock:
            _running.discard(workflow_id)


def _workshop() -> Workshop:
    if _shop is None:
        raise ShutdownError
    return _shop
