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

from dbos import DBOS, DBOSConfig, SetEnqueueOptions, SetWorkflowID
from dbos import error as dbos_error

from services.jobs import work
from services.jobs.projecting import is_projection
from services.jobs.table import Job
from services.jobs.workshop import ShutdownError, Workshop

logger = logging.getLogger("dermis.jobs")

# DBOS recovers workflows of its own application version only. Raise this when the steps of a workflow change, not before:
# jobs begun under another version would wait for a worker that still has it.
APPLICATION_VERSION = "1"

_DATASETS = "dermis-datasets"
_SHARDS = "dermis-shards"
_PROJECTIONS = "dermis-projections"  # its own, so that datasets do not wait for what takes minutes
_POLL_SECONDS = 0.2
_STUCK_SWEEPS = 2
# A job that takes its process down with it must not do so for ever.
_MAX_RECOVERIES = 100

_shop: Workshop | None = None
_executor_id = ""
_running: set[str] = set()
_running_lock = threading.Lock()
_idle_sweeps: dict[str, int] = {}


class _NoCancellations(logging.Filter):
    """Drops what DBOS says of cancelled workflows with a stack trace: we cancelled them."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or not issubclass(kind, _CANCELLED)


_CANCELLED = (dbos_error.DBOSAwaitedWorkflowCancelledError, dbos_error.DBOSWorkflowCancelledError)
_no_cancellations = _NoCancellations()  # one object, so that adding it twice adds it once


def start(shop: Workshop, *, url: str, executor_id: str, shard_concurrency: int, max_active: int) -> None:
    """Launch DBOS on the database at `url` and go on with what this executor left behind. Not from an event loop."""
    global _shop, _executor_id
    _shop, _executor_id = shop, executor_id
    _idle_sweeps.clear()
    config: DBOSConfig = {
        "name": "dermis",
        "system_database_url": url,
        "application_version": APPLICATION_VERSION,
        "executor_id": executor_id,
        "log_level": "WARNING",
    }
    logging.getLogger("dbos").addFilter(_no_cancellations)
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


def submit(job: Job) -> None:
    """Enqueue the job's workflow; a second time changes nothing."""
    with SetWorkflowID(job.id):
        DBOS.enqueue_workflow(_DATASETS, _dataset_workflow, job.id, job.shards_total)


def forget(job_id: str) -> None:
    """Remove an ended job's workflows from DBOS's tables."""
    DBOS.delete_workflows([job_id, *_shard_workflows(job_id)])


def sweep() -> None:
    """Go on with what nobody works on: workflows of dead workers, stuck ones of our own, jobs without a workflow."""
    shop = _workshop()
    alive = shop.table.live_workers() | {_executor_id}
    for status in DBOS.list_workflows(status="PENDING", load_input=False, load_output=False):
        if status.executor_id in alive and not _is_stuck(status.workflow_id, status.executor_id):
            continue
        logger.warning("workflow resumed", extra={"workflow": status.workflow_id, "worker": status.executor_id})
        DBOS.resume_workflow(status.workflow_id, queue_name=_queue_of(status.workflow_id))
    for job in shop.table.active():
        found = DBOS.get_workflow_status(job.id)
        if found is None:
            # Else its submission may still be under way; a projection's images are written before it.
            if time.time() - job.created_at > (60 if is_projection(job.id) else 5):
                submit(job)
        elif found.status not in ("PENDING", "ENQUEUED", "DELAYED"):
            work.give_up(shop, job.id, f"its workflow ended as {found.status}")


def _queue_of(workflow_id: str) -> str:
    if "-" not in workflow_id:
        return _DATASETS
    return _PROJECTIONS if is_projection(workflow_id) else _SHARDS


def _is_stuck(workflow_id: str, executor_id: str | None) -> bool:
    """Whether DBOS says that we run a workflow, sweep after sweep, and we do not: its outcome could not be recorded."""
    with _running_lock:
        idle = executor_id == _executor_id and workflow_id not in _running
    _idle_sweeps[workflow_id] = _idle_sweeps.get(workflow_id, 0) + 1 if idle else 0
    return _idle_sweeps[workflow_id] >= _STUCK_SWEEPS


@DBOS.workflow(name="dermis.dataset", max_recovery_attempts=_MAX_RECOVERIES)
def _dataset_workflow(job_id: str, shards: int) -> str:
    """All of one job. The order of its steps is fixed by its arguments, as replay after a crash needs it."""
    with _running_here(job_id) as shop:
        shop.table.own(job_id, _executor_id)
        shop.table.restart_rate(job_id)
        for shard in range(shards):
            # Shard 0 of every job goes before shard 1 of any: a small job does not wait for a large one to end.
            with SetWorkflowID(_shard_workflow_id(job_id, shard)), SetEnqueueOptions(priority=shard + 1):
                DBOS.enqueue_workflow(_queue_of(_shard_workflow_id(job_id, shard)), _shard_workflow, job_id, shard)
        _wait_for_shards(job_id)
        return _finish(job_id)


@DBOS.workflow(name="dermis.shard", max_recovery_attempts=_MAX_RECOVERIES)
def _shard_workflow(job_id: str, shard: int) -> str:
    with _running_here(_shard_workflow_id(job_id, shard)):
        return _make_shard(job_id, shard)


@DBOS.step(name="dermis.make_shard")
def _make_shard(job_id: str, shard: int) -> str:
    return work.make_shard(_workshop(), job_id, shard)


@DBOS.step(name="dermis.wait_for_shards")
def _wait_for_shards(job_id: str) -> None:
    """Return when every shard is finished, or when the job is to stop and no shard is at work any more."""
    shop = _workshop()
    looked = time.monotonic()
    while not shop.stopping.wait(_POLL_SECONDS):
        job = shop.table.get(job_id)
        if job is None:
            return
        if shop.table.must_stop(job_id):
            # The queued ones need not start; those at work see for themselves that they are to stop.
            queued = _shard_workflows(job_id, "ENQUEUED")
            if queued:
                DBOS.cancel_workflows(queued)
            if not _shard_workflows(job_id, "PENDING"):
                return
        elif job.shards_done == job.shards_total:
            return
        elif time.monotonic() - looked > 5:
            looked = time.monotonic()
            if not _shard_workflows(job_id, "ENQUEUED", "PENDING") and not _is_whole(job_id):
                work.give_up(shop, job_id, "its shards ended without a result")
                return
    raise ShutdownError


@DBOS.step(name="dermis.finish")
def _finish(job_id: str) -> str:
    return work.finish(_workshop(), job_id)


def _is_whole(job_id: str) -> bool:
    job = _workshop().table.get(job_id)
    return job is not None and job.shards_done == job.shards_total


def _shard_workflow_id(job_id: str, shard: int) -> str:
    return f"{job_id}-{shard:05d}"


def _shard_workflows(job_id: str, *states: str) -> list[str]:
    found = DBOS.list_workflows(
        workflow_id_prefix=f"{job_id}-", status=list(states) or None, load_input=False, load_output=False
    )
    return [status.workflow_id for status in found]


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
