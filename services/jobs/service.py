"""Dataset jobs as the gateway sees them: submit, look, stop, fetch. Puts the table, the workflow and the store together."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from dermis.dataset.manifest import MANIFEST, read_manifest
from dermis.dataset.plan import plan_for
from dermis.dataset.request import DatasetRequest, check_against
from dermis.dataset.shards import check_space
from dermis.errors import RequestError
from services.jobs import removal, work, workflow
from services.jobs.lease import Lease, executor_slot
from services.jobs.table import Job, JobTable
from services.jobs.workshop import FileInfo, ShutdownError, Workshop
from services.settings import Settings

logger = logging.getLogger("dermis.jobs")

_LISTINGS_KEPT = 64


class DatasetJobs:
    """The jobs of one process. `start` and `stop` bracket its life; every method blocks and may be called in any thread."""

    def __init__(self, settings: Settings, shop: Workshop) -> None:
        self._settings = settings
        self._shop = shop
        self._table: JobTable = shop.table
        self._stack = contextlib.ExitStack()
        self._listings: OrderedDict[str, list[FileInfo]] = OrderedDict()

    def start(self) -> None:
        """Take a worker name, launch the workflows, and go on with what was left unfinished."""
        settings = self._settings
        if settings.storage_url is None:
            Path(settings.storage).mkdir(parents=True, exist_ok=True)
        executor_id = self._stack.enter_context(executor_slot(settings.data_dir, settings.executor_id))
        self._table.open()
        self._remove_orphans()
        # The lease first: others then know this worker for alive when its workflows start.
        self._table.renew_lease(executor_id, settings.lease_seconds)
        with self._table.schema_lock():
            workflow.start(
                self._shop,
                url=settings.jobs_url,
                executor_id=executor_id,
                shard_concurrency=settings.shard_concurrency,
                max_active=settings.max_active_datasets,
            )

        def sweep(leases_hold: bool) -> None:
            with contextlib.suppress(ShutdownError):
                workflow.sweep(leases_hold)
            removal.expire_projections(self._shop, settings.projection_keep_seconds)

        lease = Lease(self._table, executor_id, settings.lease_seconds, sweep)
        self._stack.callback(lease.stop)
        lease.start()

    def stop(self) -> None:
        """Stop between two batches. Unfinished jobs go on at the next start, or at another worker."""
        workflow.stop()
        self._stack.close()
        self._table.close()

    def _remove_orphans(self) -> None:
        """Remove the files of jobs that are not in the table, where both belong to this service alone."""
        if self._settings.storage_url is not None or self._settings.database_url is not None:
            return
        for folder in Path(self._settings.storage).iterdir():
            if re.fullmatch(r"(ds|pr)_[0-9a-f]{32}", folder.name) and self._table.get(folder.name) is None:
                logger.warning("files without a job removed", extra={"job": folder.name})
                work.remove_files(self._shop, folder.name)

    def submit(self, request: DatasetRequest, idempotency_key: str | None = None) -> Job:
        """Start a job, or find the one that this key started."""
        settings = self._settings
        bundle = self._shop.models.serving(request.model)
        check_against(request, bundle, settings.max_samples_per_dataset)
        planned = plan_for(request, bundle)
        if planned.shards > settings.max_shards_per_dataset:
            message = (
                f"{planned.shards} shards; at most {settings.max_shards_per_dataset} are allowed: choose larger ones"
            )
            raise RequestError("shard_size", message, kind="request-too-large")
        job_id = f"ds_{uuid.uuid4().hex}"
        body = request.model_dump(mode="json")
        # A body without noise_mode meant const before that default changed; a repeated request must find its job.
        earlier = [] if "noise_mode" in request.model_fields_set else [_hash_of(body | {"noise_mode": "const"})]
        self._shop.check_space()
        check_space(planned, self._shop.store(job_id), bundle.generator.img_resolution)
        self._shop.submitting.add(job_id)
        try:
            job, new = self._table.create(
                job_id,
                body,
                kind="dataset",
                model=(bundle.name, bundle.digest),
                samples=planned.samples,
                shards=planned.shards,
                body_hash=_hash_of(body),
                earlier_hashes=earlier,
                idempotency_key=idempotency_key,
                max_active=settings.max_active_datasets,
                owner=workflow.executor_id(),
            )
            if new:
                workflow.submit(job)
        finally:
            self._shop.submitting.discard(job_id)
        return job

    def not_ready(self) -> str | None:
        """Why jobs cannot be taken or shown now; None if they can."""
        try:
            self._table.count_by_state("dataset")
        except Exception as error:  # whatever the driver raises
            logger.warning("jobs database", extra={"error": str(error), "cause": str(error.__cause__)[:200]})
            return "the jobs database cannot be reached"
        return None

    def get(self, job_id: str) -> Job | None:
        """The dataset job, or None."""
        return self._table.get(job_id, "dataset")

    def page(self, limit: int, *, before: int | None = None, state: str | None = None) -> list[Job]:
        return self._table.page("dataset", limit, before=before, state=state)

    def count_by_state(self) -> Mapping[str, int]:
        return self._table.count_by_state("dataset")

    def cancel_or_delete(self, job_id: str) -> Job | None:
        """Ask an active job to stop and return it; remove an ended one with its files and return None."""
        job = removal.cancel_or_delete(self._shop, job_id)
        if job is None:
            self._listings.pop(job_id, None)
        return job

    def files(self, job: Job) -> list[FileInfo]:
        """The files of a succeeded job: those that its manifest lists, and the manifest."""
        known = self._listings.get(job.id)
        if known is None:
            store = self._shop.store(job.id)
            data = store.read(MANIFEST)
            manifest = read_manifest(store)
            known = [FileInfo(file.name, file.bytes, file.sha256) for file in manifest.files]
            known.append(FileInfo(MANIFEST, len(data), hashlib.sha256(data).hexdigest()))
            self._listings[job.id] = known
            while len(self._listings) > _LISTINGS_KEPT:
                self._listings.popitem(last=False)
        return known

    def open(self, job: Job, name: str) -> AbstractContextManager[IO[bytes]]:
        """One of `files`, open for reading and seeking."""
        return self._shop.store(job.id).open(name)


def _hash_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
