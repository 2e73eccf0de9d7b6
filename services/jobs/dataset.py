"""The work of a dataset job: generate the images of a shard, and assemble the files at the end.

This module implements `services.jobs.execution.JobKind`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.attack import Exposure
from dermis.authenticity.index import Nearest
from dermis.bundle import Bundle
from dermis.classifier.preprocess import batch
from dermis.classifier.scores import scores_of
from dermis.dataset.manifest import finalize
from dermis.dataset.plan import DatasetPlan, plan_for
from dermis.dataset.privacy import exact_below
from dermis.dataset.request import stored_request
from dermis.dataset.shards import least_bytes, write_shard
from dermis.dataset.store import MANIFEST
from dermis.errors import MissingShardsError, StorageError
from services.errors import DatabaseUnavailableError, TakenOverError
from services.inference.pixels import Comparison
from services.inference.samples import Options, pack_rows
from services.jobs.context import (
    POLL_SECONDS,
    JobContext,
    ShutdownError,
    StoppedError,
    call_with_retry,
    must_stop,
    retry_transient,
    stop_if_asked,
)
from services.jobs.table import Job
from services.metrics import dataset_samples, shard_retries

logger = logging.getLogger("dermis.jobs")

_ASSEMBLIES = 3  # the first one can report missing shards, the second one those of another version


def path(job_id: str) -> str:
    """The path of a dataset in the API."""
    return f"/v1/datasets/{job_id}"


def has_inputs(ctx: JobContext, job: Job) -> bool:
    """True: a dataset needs nothing but its request."""
    return True


def run_shard(ctx: JobContext, job: Job, shard: int, on_begin: Callable[[], None] = lambda: None) -> None:
    """Generate, classify, compare and encode the images of a shard, and write its file.

    A shard that waits for a place or for temporary space has not begun.

    Raises:
        StoppedError: If the job is to stop.
    """
    bundle, plan = _plan_of(ctx, job)
    progress = _Progress(ctx, job.id, shard)
    needed = least_bytes(plan, len(plan.shard(shard)), bundle.generator.img_resolution)
    turn = ctx.turns.of(job.tenant, partial(stop_if_asked, ctx, job.id))
    with turn as offer_place, ctx.temporary_space(needed):
        on_begin()
        progress(0)

        def end_batch(done: int) -> None:
            progress(done)
            offer_place()

        record = write_shard(
            plan,
            shard,
            _Synthesize(ctx, job, bundle),
            ctx.retrying_store(job),
            score=_Score(ctx, job, bundle) if plan.scored else None,
            examine=_Examine(ctx, job, bundle, Comparison(exact_below(plan), plan.detects_copies))
            if plan.gated
            else None,
            identity=_identity(ctx, job.id, bundle, plan),
            sign=ctx.sign,
            on_batch=end_batch,
        )
    retry_transient(ctx, lambda: ctx.table.progress(job.id, shard, len(record.images), finished=True))


def finish(ctx: JobContext, job: Job) -> None:
    """Write the metadata, the card, the report and the manifest of a dataset whose shards are complete.

    Shards whose files are missing or damaged are made again, as database and storage can be restored from different moments,
    and so are those of another version of dermis or of the libraries, as during an upgrade of several replicas.

    Raises:
        StoppedError: If the job is to stop.
        TakenOverError: If the owner of `job`, which is this worker, is not that in the table any more.
        MissingShardsError: If shards cannot be used although they were made again.
    """
    for _ in range(_ASSEMBLIES - 1):
        try:
            return _assemble_unless_finished(ctx, job)
        except MissingShardsError as error:
            logger.warning("shards made again", extra={"job": job.id, "error": str(error)})
            shard_retries.labels(job.kind).inc(len(error.shards))
            for shard in range(job.shards_total):  # damaged ones are found after missing ones; complete ones are kept
                run_shard(ctx, job, shard)
    return _assemble_unless_finished(ctx, job)


def _assemble_unless_finished(ctx: JobContext, job: Job) -> None:
    """Assemble the files, also if another worker finishes the dataset meanwhile and removes the parts that are read here.

    That happens if this worker has taken over the job from one that could reach the storage but not the database.
    """
    store = ctx.retrying_store(job)
    try:
        return _assemble(ctx, job)
    except StorageError:
        if store.size(MANIFEST) is None:  # it is written before parts are removed
            raise
    try:
        return _assemble(ctx, job)
    except MissingShardsError:
        # Of the present, without an answer from a cache: the other worker may have recorded the dataset as finished by now.
        if ctx.table.must_stop(job.id):
            raise StoppedError from None
        now = ctx.table.get(job.id)
        if now is not None and now.owner != job.owner:
            raise TakenOverError(f"{job.id}: another worker finishes it") from None
        store.remove(MANIFEST)  # of another version of dermis, or damaged; beside it no shard would be written
        raise


def _assemble(ctx: JobContext, job: Job) -> None:
    bundle, plan = _plan_of(ctx, job)
    check = partial(stop_if_asked, ctx, job.id)
    # Of the formats only images.zip is written at the end.
    archived = plan.samples if plan.request.format == "imagefolder" else 0
    needed = least_bytes(plan, archived, bundle.generator.img_resolution)
    with ctx.finish_turns.of(job.tenant, check) as offer_place, ctx.temporary_space(needed):

        def end_batch() -> None:
            check()
            offer_place()

        def expose(pieces: Iterable[NDArray[np.float32]]) -> Exposure:
            embeddings = np.concatenate(list(pieces))  # one request
            return call_with_retry(ctx, job.id, lambda: ctx.inference.authenticity.expose(bundle, embeddings))

        compare = Comparison(detect_copies=False)
        finalize(
            plan,
            ctx.retrying_store(job),
            bundle,
            _identity(ctx, job.id, bundle, plan),
            expose,
            examine=None if bundle.authenticity is None else _Examine(ctx, job, bundle, compare),
            sign=ctx.sign,
            on_batch=end_batch,
            while_archiving=check,  # keeps the place, so that the disk has at most as many unfinished archives as places
            measure_images=ctx.measure_images,
        )


def _plan_of(ctx: JobContext, job: Job) -> tuple[Bundle, DatasetPlan]:
    bundle = ctx.models.serving(job.model_name, job.model_digest)
    return bundle, plan_for(stored_request(job.request), bundle)


class _Progress:
    """Called after each batch with the number of samples done: updates the jobs table, and stops the shard if it has to."""

    def __init__(self, ctx: JobContext, job_id: str, shard: int) -> None:
        self._ctx, self._job_id, self._shard = ctx, job_id, shard
        self._last_update = float("-inf")
        self._done = 0

    def __call__(self, done: int) -> None:
        if self._ctx.stopping.is_set():
            raise ShutdownError
        dataset_samples.inc(max(0, done - self._done))
        self._done = done
        if time.monotonic() - self._last_update < POLL_SECONDS:
            return
        self._last_update = time.monotonic()
        self._ctx.check_space()
        with suppress(DatabaseUnavailableError):  # the end of the shard waits for the database
            self._ctx.table.progress(self._job_id, self._shard, done)
        if must_stop(self._ctx, self._job_id):
            raise StoppedError


class _Synthesize:
    """The generator service as the function that `write_shard` calls."""

    def __init__(self, ctx: JobContext, job: Job, bundle: Bundle) -> None:
        request = stored_request(job.request)
        self._ctx, self._job_id, self._seed = ctx, job.id, request.seed
        self._options = Options(
            bundle.digest,
            request.truncation_psi,
            request.truncation_cutoff,
            request.noise_mode,
            edits=request.moves,
            directions=[direction.name for direction in bundle.directions],
        )

    def __call__(self, indices: Sequence[int], labels: Sequence[int]) -> NDArray[np.uint8]:
        rows = pack_rows(self._options, self._seed, indices, labels)
        generator = self._ctx.inference.generator
        return np.stack(call_with_retry(self._ctx, self._job_id, lambda: generator.images(rows)))


class _Score:
    """The classifier service as the function that `write_shard` calls."""

    def __init__(self, ctx: JobContext, job: Job, bundle: Bundle) -> None:
        assert bundle.classifier is not None
        self._ctx, self._job_id, self._bundle, self._classifier = ctx, job.id, bundle, bundle.classifier

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        inputs = batch(images, self._classifier.input.size)
        classifier = self._ctx.inference.classifier
        logits = call_with_retry(self._ctx, self._job_id, lambda: classifier.logits(self._bundle, inputs))
        return scores_of(logits, self._classifier.temperature).calibrated


class _Examine:
    """The authenticity service as the function that `write_shard` calls."""

    def __init__(self, ctx: JobContext, job: Job, bundle: Bundle, comparison: Comparison) -> None:
        assert bundle.authenticity is not None
        self._ctx, self._job_id, self._bundle, self._index = ctx, job.id, bundle, bundle.authenticity
        self._comparison = comparison

    def __call__(self, images: NDArray[np.uint8]) -> Nearest:
        inputs = batch(images, self._index.resolution)
        authenticity = self._ctx.inference.authenticity
        return call_with_retry(
            self._ctx, self._job_id, lambda: authenticity.nearest(self._bundle, inputs, self._comparison)
        )


def _identity(ctx: JobContext, job_id: str, bundle: Bundle, plan: DatasetPlan) -> Mapping[str, str]:
    """Software and devices of the services that the plan needs, for the manifest."""
    inference = ctx.inference
    identity = call_with_retry(ctx, job_id, lambda: inference.generator.identity(bundle))
    if plan.scored:
        identity = {**identity, **call_with_retry(ctx, job_id, lambda: inference.classifier.identity(bundle))}
    if plan.gated:
        identity = {**identity, **call_with_retry(ctx, job_id, lambda: inference.authenticity.identity(bundle))}
    return identity
