"""The jobs of one process: start and stop, and the operations of the gateway on datasets and projections."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle
from dermis.dataset.manifest import MAX_MANIFEST_BYTES, parse_manifest
from dermis.dataset.plan import plan_for
from dermis.dataset.request import DatasetRequest, check_against
from dermis.dataset.shards import check_space, max_dataset_bytes
from dermis.dataset.store import MANIFEST, PARTIAL, Store
from dermis.errors import DermisError, RequestError, StorageError
from services import tracing
from services.image_signing import NO_CERTIFICATE
from services.jobs import execution, projection, workflow
from services.jobs.context import FileInfo, JobContext, ShutdownError, must_stop
from services.jobs.lease import Lease, executor_slot
from services.jobs.projection import Preview, ProjectionOptions
from services.jobs.statistics import Statistics
from services.jobs.table import Job
from services.quotas import DAY, EVERYONE
from services.settings import Settings
from services.tenants import folder_of, job_folders

logger = logging.getLogger("dermis.jobs")

_CACHED_LISTINGS = 64
_EXPIRY_SECONDS = 5.0


class JobService:
    """The worker of this process, with the datasets and projections that it serves to the gateway.

    Call `start` first and `stop` last. Every method blocks and can be called in any thread.
    """

    def __init__(self, settings: Settings, ctx: JobContext) -> None:
        self._settings, self._ctx = settings, ctx
        self._stack = contextlib.ExitStack()
        self.datasets = DatasetJobs(settings, ctx)
        self.projections = ProjectionJobs(settings, ctx)

    def start(self) -> None:
        """Take a worker name, upgrade the database, launch the workflows, and continue unfinished jobs."""
        settings, table = self._settings, self._ctx.table
        works = settings.role != "gateway"
        if settings.storage_url is None:
            Path(settings.storage).mkdir(parents=True, exist_ok=True)
        executor_id = self._stack.enter_context(executor_slot(settings.data_dir, settings.executor_id))
        table.open()
        self._remove_files_without_job()
        # Before the workflows start, so that other workers do not treat this worker as dead.
        table.renew_lease(executor_id, settings.lease_seconds, works=works)
        # The lock is held for the tables alone: many replicas may start at the same moment, and a launch takes seconds.
        with table.schema_lock():
            workflow.create_tables(settings.jobs_url)
        workflow.start(
            self._ctx,
            url=settings.jobs_url,
            executor_id=executor_id,
            shard_concurrency=settings.shard_concurrency,
            max_active=settings.max_active_datasets,
            shared_poll_seconds=settings.queue_poll_seconds,
            works=works,
        )

        def sweep(leases_reliable: bool) -> None:
            with contextlib.suppress(ShutdownError):
                workflow.sweep(leases_reliable)
            self.datasets.remove_expired()
            self.projections.remove_expired(settings.projection_keep_seconds)
            table.remove_compared(table.now() - settings.authenticity_repeat_seconds)
            execution.measure_files(self._ctx)

        lease = Lease(table, executor_id, settings.lease_seconds, works=works, sweep=sweep)
        self._stack.callback(lease.stop)
        lease.start()

    def stop(self) -> None:
        """Stop between two batches. Unfinished jobs continue at the next start, or at another worker."""
        workflow.stop()
        self._stack.close()
        self._ctx.table.close()

    def not_ready(self) -> str | None:
        """Why jobs cannot be accepted or shown now; None if they can."""
        try:
            self._ctx.table.check()
        except Exception as error:  # whatever the driver raises
            logger.warning("jobs database", extra={"error": str(error), "cause": str(error.__cause__)[:200]})
            return "the jobs database cannot be reached"
        return None

    def _remove_files_without_job(self) -> None:
        """Remove what unfinished jobs that are not in the table have left, where both belong to this service alone.

        A database that was lost must not cost the datasets as well: nothing is removed while it has no job at all, and never
        a finished dataset.
        """
        if self._settings.storage_url is not None or self._settings.database_url is not None:
            return
        table, storage = self._ctx.table, Path(self._settings.storage)
        unknown = [
            (tenant, job_id)
            for tenant, job_id in job_folders(storage)
            if (job := table.get(job_id)) is None or job.tenant != tenant
        ]
        if unknown and not table.check():
            message = "the jobs database has no job, but the storage has files of jobs, which are kept: was the database lost?"
            logger.error(message, extra={"folders": len(unknown), "storage": str(storage)})
            return
        for tenant, job_id in unknown:
            if (storage / folder_of(tenant, job_id) / MANIFEST).exists():
                logger.warning("finished dataset without a job kept; remove its folder by hand", extra={"job": job_id})
            else:
                logger.warning("files without a job removed", extra={"job": job_id})
                execution.remove_files(self._ctx, tenant, job_id)


class DatasetJobs:
    """The dataset jobs. Every method blocks and can be called in any thread."""

    def __init__(self, settings: Settings, ctx: JobContext) -> None:
        self._settings, self._ctx = settings, ctx
        self._listings: OrderedDict[str, list[FileInfo]] = OrderedDict()

    def submit(self, tenant: str, request: DatasetRequest, idempotency_key: str | None = None) -> Job:
        """Start a job of a tenant, or return the one that this key of the tenant started.

        Raises:
            RequestError: If the model cannot serve the request.
            BundleError: If the model cannot be served.
            IdempotencyConflictError: If the key was used for another request.
            TooManyActiveError: If as many datasets are active as the settings allow.
            QuotaExceededError: If a quota of the tenant would be exceeded.
            StorageError: If there is not enough space.
            DatabaseUnavailableError: If the database cannot be reached.
        """
        settings, ctx = self._settings, self._ctx
        bundle = ctx.models.serving_for(tenant, request.model)
        check_against(request, bundle, settings.max_samples_per_dataset)
        asked = request.model_dump(mode="json")
        # A body without noise_mode meant const before that default changed; a repeated request must get its job.
        earlier_hashes = [] if "noise_mode" in request.model_fields_set else [_hash_of(asked | {"noise_mode": "const"})]
        request = request.with_signing(ctx.sign is not None, NO_CERTIFICATE)
        plan = plan_for(request, bundle)
        if plan.shards > settings.max_shards_per_dataset:
            message = f"{plan.shards} shards; at most {settings.max_shards_per_dataset} are allowed: choose larger ones"
            raise RequestError("shard_size", message, kind="request-too-large")
        job_id = f"ds_{uuid.uuid4().hex}"
        ctx.check_space()
        check_space(plan, Store(ctx.storage), bundle.generator.img_resolution)
        with _submitting(ctx, job_id):
            job, new = ctx.table.create(
                job_id,
                request.model_dump(mode="json"),
                tenant=tenant,
                kind="dataset",
                model=(bundle.name, bundle.digest),
                samples=plan.samples,
                shards=plan.shards,
                body_hash=_hash_of(asked),
                earlier_hashes=earlier_hashes,
                idempotency_key=idempotency_key,
                max_active=settings.max_active_datasets,
                owner=workflow.executor_id(),
                quota=settings.quota_of(tenant),
                amounts={"images_per_day": plan.samples},
                reserved_bytes=max_dataset_bytes(plan, bundle.generator.img_resolution),
            )
            if new:
                workflow.submit(job)
        return job

    def get(self, tenant: str, job_id: str) -> Job | None:
        """The dataset job of a tenant, or None."""
        return self._ctx.table.find(tenant, "dataset", job_id)

    def progress(self, job_id: str) -> tuple[object, ...]:
        """What is another one after each change of a job, at most a fifth of a second later. Many may ask often."""
        return self._ctx.table.recent_states.of(job_id).progress

    def page(self, tenant: str, limit: int, *, before: int | None = None, state: str | None = None) -> list[Job]:
        """Dataset jobs of a tenant, newest first.

        Args:
            tenant: The tenant.
            limit: The maximum number of jobs.
            before: The sequence number below which the page begins.
            state: Only jobs in this state.
        """
        return self._ctx.table.page(tenant, "dataset", limit, before=before, state=state)

    def statistics(self) -> Statistics:
        """What is waiting, running and stored, of all tenants and of every kind of job."""
        return self._ctx.table.statistics()

    def free_bytes(self) -> int | None:
        """The free space of the storage; None if it is not known."""
        return Store(self._ctx.storage).free_bytes()

    def cancel_or_delete(self, job: Job) -> Job | None:
        """Ask an active job to stop and return it; remove an ended one with its files and return None."""
        stopping = workflow.cancel_or_delete(self._ctx, job)
        if stopping is None:
            self._listings.pop(job.id, None)
        return stopping

    def expires_at(self, job: Job) -> float | None:
        """The time at which an ended job expires, seconds since 1970; None if it is kept, or has not ended."""
        days = self._settings.quota_of(job.tenant).retention_days
        return None if days is None or job.finished_at is None else job.finished_at + days * DAY

    def remove_expired(self) -> None:
        """Remove datasets that ended longer ago than the retention time of their tenant, and the rest of deleted ones.

        A removal that was interrupted is completed by a later call, because the record is deleted last.
        """
        for job_id in _remove_expired(self._ctx, self._expired()):
            self._listings.pop(job_id, None)

    def _expired(self) -> Iterator[Job]:
        quotas, table = self._settings.quotas, self._ctx.table
        yield from table.deleted("dataset")
        days_of = {tenant: self._settings.quota_of(tenant).retention_days for tenant in quotas}
        if not any(days_of.values()):
            return
        now = table.now()
        own = quotas.keys() - {EVERYONE}
        for tenant, days in days_of.items():
            if days is not None:
                whose = None if tenant == EVERYONE else tenant
                yield from table.ended_before("dataset", now - days * DAY, whose, others=own)

    def files(self, job: Job) -> list[FileInfo]:
        """The files of a job that has succeeded: those that its manifest lists, and the manifest."""
        listing = self._listings.get(job.id)
        if listing is None:
            store = self._ctx.store(job)
            data = store.read(MANIFEST, limit=MAX_MANIFEST_BYTES)
            manifest = parse_manifest(data, store.where(MANIFEST))
            listing = [FileInfo(file.name, file.bytes, file.sha256) for file in manifest.files]
            listing.append(FileInfo(MANIFEST, len(data), hashlib.sha256(data).hexdigest()))
            self._listings[job.id] = listing
            while len(self._listings) > _CACHED_LISTINGS:
                self._listings.popitem(last=False)
        return listing

    def open(self, job: Job, file: FileInfo) -> AbstractContextManager[IO[bytes]]:
        """One of `files`, open for reading and seeking."""
        return self._ctx.store(job).open(file.name, size=file.bytes)

    def signed_url(self, job: Job, name: str, *, media_type: str, disposition: str) -> str:
        """A URL of one of `files` in the storage, which is valid for `DERMIS_DOWNLOAD_URL_SECONDS`."""
        seconds = self._settings.download_url_seconds
        return self._ctx.store(job).signed_url(name, seconds, media_type=media_type, disposition=disposition)


class ProjectionJobs:
    """The projection jobs. Every method blocks and can be called in any thread."""

    def __init__(self, settings: Settings, ctx: JobContext) -> None:
        self._settings, self._ctx = settings, ctx

    def submit(
        self,
        tenant: str,
        bundle: Bundle,
        options: ProjectionOptions,
        images: Sequence[NDArray[np.uint8]],
        key: str | None = None,
    ) -> Job:
        """Start a job of a tenant, or return the one that this key of the tenant started.

        Args:
            tenant: The tenant that the projection belongs to.
            bundle: The model to project with.
            options: The request.
            images: uint8 squares [R, R, 3] at the resolution of the generator.
            key: The idempotency key of the caller.

        Raises:
            IdempotencyConflictError: If the key was used for another request.
            TooManyActiveError: If as many projections are active as the settings allow.
            QuotaExceededError: If a quota of the tenant would be exceeded.
            StorageError: If the images cannot be stored.
            DatabaseUnavailableError: If the database cannot be reached.
        """
        ctx = self._ctx
        job_id = f"pr_{uuid.uuid4().hex}"
        body = options.model_dump(mode="json")
        digest = hashlib.sha256(json.dumps([body, bundle.digest], sort_keys=True).encode())
        for image in images:
            digest.update(image.tobytes())
        ctx.check_space()
        with _submitting(ctx, job_id):
            job, new = ctx.table.create(
                job_id,
                body,
                tenant=tenant,
                kind="projection",
                model=(bundle.name, bundle.digest),
                samples=options.images * options.steps,
                shards=projection.shards_of(options.images),
                body_hash=digest.hexdigest(),
                idempotency_key=key,
                max_active=self._settings.max_active_projections,
                owner=workflow.executor_id(),
                quota=self._settings.quota_of(tenant),
                amounts=projection.amounts(body),
                reserved_bytes=projection.max_bytes(options, bundle),
            )
            # The row comes first: after a crash, only a row says that there are images to remove.
            if new:
                self._begin(job, images)
        if not new and job.state == "queued" and not projection.has_inputs(ctx, job):
            job = self._continue(job, images)
        return job

    def _begin(self, job: Job, images: Sequence[NDArray[np.uint8]]) -> None:
        """Store the images of a new job and enqueue it.

        If that fails, a job without a key is removed. One with a key may have been given to another call, which stores the same
        images; if there is no such call, the next sweep ends the job, frees the key and removes the files.
        """
        try:
            self._store_and_enqueue(job, images)
        except BaseException:
            if job.idempotency_key is None:
                self._remove_begun(job)
            raise

    def _remove_begun(self, job: Job) -> None:
        try:
            execution.remove_files(self._ctx, job.tenant, job.id)
            self._ctx.table.delete(job.id, undo=projection.amounts(job.request))
        except DermisError as error:  # the next sweep ends the job, undoes what it uses of quotas and removes its files
            logger.warning("projection not removed", extra={"projection": job.id, "error": str(error)})

    def _continue(self, job: Job, images: Sequence[NDArray[np.uint8]]) -> Job:
        """Store the images of a job whose first call has not stored them: it failed, is slow, or its process has ended."""
        ctx = self._ctx
        with _submitting(ctx, job.id):
            # The sweeps of other processes leave the job alone from now on.
            now = ctx.table.set_owner(job.id, workflow.executor_id())
            if now is None or now.state != "queued":  # the first call has stored them meanwhile, or the job was ended
                return now or job
            self._store_and_enqueue(job, images)
        return job

    def _store_and_enqueue(self, job: Job, images: Sequence[NDArray[np.uint8]]) -> None:
        store = self._ctx.store(job)
        projection.write_inputs(store, images)
        if must_stop(self._ctx, job.id):  # the call was slow, and the job has ended: nothing else removes the images
            store.remove(PARTIAL)
        else:
            workflow.submit(job)

    def get(self, tenant: str, job_id: str) -> Job | None:
        """The projection job of a tenant, or None."""
        return self._ctx.table.find(tenant, "projection", job_id)

    def cancel_or_delete(self, job: Job) -> Job | None:
        """Ask an active job to stop and return it; remove an ended one with its files and return None."""
        return workflow.cancel_or_delete(self._ctx, job)

    def remove_expired(self, keep_seconds: float) -> None:
        """Remove projections that ended more than `keep_seconds` ago, and the rest of those that were deleted.

        The projections of all tenants are kept for the same time.
        """
        table = self._ctx.table
        _remove_expired(self._ctx, table.ended_before("projection", table.now() - keep_seconds, deleted=True))

    def results(self, job: Job) -> list[Mapping[str, Any]]:
        """The results of a job that has succeeded: one row per image, with the names of its files."""
        return projection.results(self._ctx.store(job))

    def previews(self, job: Job) -> list[Preview]:
        """How the images of a running job look at the moment, as far as a worker has reported it."""
        return projection.previews(self._ctx.store(job), job)

    def latents(self, job: Job, image: int) -> NDArray[np.float32]:
        """ws [num_ws, w_dim] of one image of a job that has succeeded."""
        return projection.latents(self._ctx.store(job), image)

    def file(self, job: Job, name: str) -> FileInfo | None:
        """One of the files of `results`, or None."""
        if not any(name in row["files"] for row in self.results(job)):
            return None
        store = self._ctx.store(job)
        size = store.size(name) or 0
        return FileInfo(name, size, store.sha256(name, size=size))

    def open(self, job: Job, file: FileInfo) -> AbstractContextManager[IO[bytes]]:
        """A file of the job, open for reading and seeking."""
        return self._ctx.store(job).open(file.name, size=file.bytes)


def _remove_expired(ctx: JobContext, jobs: Iterable[Job]) -> list[str]:
    """Remove ended jobs with their files. One whose files cannot be removed is removed by a later call.

    The jobs of lost workers wait for the sweep that calls this, so it ends after some seconds and a later one goes on. The
    order is random, so that jobs that cannot be removed do not keep others, and workers do not all remove the same one.

    Returns:
        The ids of the jobs.
    """
    removed, deadline = [], time.monotonic() + _EXPIRY_SECONDS
    remaining = list(jobs)
    random.shuffle(remaining)
    for job in remaining:
        logger.info("job expired or deleted", extra={"job": job.id, "kind": job.kind})
        try:
            workflow.cancel_or_delete(ctx, job)
            removed.append(job.id)
        except StorageError as error:
            logger.warning("expired job not removed", extra={"job": job.id, "error": str(error)})
        if time.monotonic() > deadline:
            break
    return removed


@contextmanager
def _submitting(ctx: JobContext, job_id: str) -> Iterator[None]:
    """Keep sweeps away from a job that has a row and no workflow yet."""
    ctx.submitting.append(job_id)
    try:
        with tracing.span("job create", job__id=job_id):
            yield
    finally:
        ctx.submitting.remove(job_id)


def _hash_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
