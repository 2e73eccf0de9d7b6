"""Ending a job before its time, or removing one that has ended, of either kind."""

from __future__ import annotations

import logging
import time

from dermis.errors import StorageError
from services.jobs import work, workflow
from services.jobs.table import Job
from services.jobs.workshop import Workshop

logger = logging.getLogger("dermis.jobs")


def cancel_or_delete(shop: Workshop, job_id: str) -> Job | None:
    """Ask an active job to stop and return it; remove an ended one with its files and return None."""
    job = shop.table.request_cancel(job_id)
    if job is not None and job.active:
        return job
    shop.table.mark_deleted(job_id)  # first: a job must not look complete when only a part of its files is left
    work.remove_files(shop, job_id)
    workflow.forget(job_id)
    shop.table.delete(job_id)
    return None


def expire_projections(shop: Workshop, keep_seconds: float) -> None:
    """Remove the projections that ended so long ago, as nobody may come back for them, and what is left of deleted ones."""
    now = time.time()
    for job in shop.table.ended_before("projection", now):
        if job.state != "cancelled" and (job.finished_at or now) > now - keep_seconds:
            continue
        logger.info("projection expired", extra={"projection": job.id})
        try:
            cancel_or_delete(shop, job.id)
        except StorageError as error:  # the others' images are to go all the same; this one's next time
            logger.warning("projection not removed", extra={"projection": job.id, "error": str(error)})
