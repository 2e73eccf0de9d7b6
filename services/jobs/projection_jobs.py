"""Projection jobs as the gateway sees them: submit, look, stop, fetch."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle
from dermis.errors import DermisError
from services.jobs import projecting, removal, work, workflow
from services.jobs.projecting import ProjectionOptions
from services.jobs.table import Job
from services.jobs.workshop import FileInfo, Workshop
from services.settings import Settings

logger = logging.getLogger("dermis.jobs")


class ProjectionJobs:
    """Every method blocks and may be called in any thread. `DatasetJobs` starts and stops the workflows."""

    def __init__(self, settings: Settings, shop: Workshop) -> None:
        self._settings, self._shop = settings, shop

    def submit(
        self, bundle: Bundle, options: ProjectionOptions, images: Sequence[NDArray[np.uint8]], key: str | None = None
    ) -> Job:
        """Start a job on uint8 squares [R, R, 3] at the generator's resolution, or find the one that this key started."""
        shop = self._shop
        job_id = f"pr_{uuid.uuid4().hex}"
        body = options.model_dump(mode="json")
        told = hashlib.sha256(json.dumps([body, bundle.digest], sort_keys=True).encode())
        for image in images:
            told.update(image.tobytes())
        shop.check_space()
        shop.submitting.add(job_id)
        try:
            job, new = shop.table.create(
                job_id,
                body,
                kind="projection",
                model=(bundle.name, bundle.digest),
                samples=options.images * options.steps,
                shards=projecting.shards_of(options.images),
                body_hash=told.hexdigest(),
                idempotency_key=key,
                max_active=self._settings.max_active_projections,
                owner=workflow.executor_id(),
            )
            # The row first: of images without one nobody would know, after a crash, that they are to be removed.
            if new:
                self._write_inputs(job_id, images)
                workflow.submit(job)
        finally:
            shop.submitting.discard(job_id)
        return job

    def _write_inputs(self, job_id: str, images: Sequence[NDArray[np.uint8]]) -> None:
        """Store the images of a new job; without them the job is removed."""
        try:
            projecting.write_inputs(self._shop.store(job_id), images)
        except BaseException:
            try:
                work.remove_files(self._shop, job_id)
                self._shop.table.delete(job_id)
            except DermisError as error:  # the next sweep ends the job and removes what there is
                logger.warning("projection not removed", extra={"projection": job_id, "error": str(error)})
            raise

    def get(self, job_id: str) -> Job | None:
        """The projection job, or None."""
        return self._shop.table.get(job_id, "projection")

    def cancel_or_delete(self, job_id: str) -> Job | None:
        """Ask an active job to stop and return it; remove an ended one with its files and return None."""
        return removal.cancel_or_delete(self._shop, job_id)

    def results(self, job: Job) -> list[Mapping[str, Any]]:
        """Of a job that has succeeded, of each image its facts and its files."""
        return projecting.results(self._shop.store(job.id))

    def latents(self, job: Job, image: int) -> NDArray[np.float32]:
        """ws [num_ws, w_dim] of one image of a job that has succeeded."""
        return projecting.latents(self._shop.store(job.id), image)

    def file(self, job: Job, name: str) -> FileInfo | None:
        """One of the files of `results`, or None."""
        if not any(name in row["files"] for row in self.results(job)):
            return None
        store = self._shop.store(job.id)
        return FileInfo(name, store.size(name) or 0, store.sha256(name))

    def open(self, job: Job, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file, open for reading and seeking."""
        return self._shop.store(job.id).open(name)

    def count_by_state(self) -> Mapping[str, int]:
        """How many projections are in each state."""
        return self._shop.table.count_by_state("projection")
