"""What a job does, without how it is made durable: one shard, the finish, the clean-up. Projections are in `projecting`.

Every function here may run again after a crash, and may run twice at once after a lease ran out: shards are idempotent and
files are put into place atomically.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Nearest
from dermis.bundle import Bundle
from dermis.classifier.preprocess import batch
from dermis.classifier.scores import scores_of
from dermis.dataset.manifest import finalize
from dermis.dataset.plan import Plan, plan_for
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from services.gateway.metrics import dataset_samples
from services.gateway.problems import problem, problem_of
from services.jobs import projecting
from services.jobs.table import Job
from services.jobs.workshop import POLL_SECONDS, ShutdownError, StoppedError, Workshop, patiently
from services.samples import Image, Options, pack

logger = logging.getLogger("dermis.jobs")


def make_shard(shop: Workshop, job_id: str, shard: int) -> str:
    """Make one shard: "finished", or "stopped" with the reason in the jobs table. Raises ShutdownError only."""
    job = shop.table.get(job_id)
    if job is None or shop.table.must_stop(job_id):
        return "stopped"
    try:
        if projecting.is_projection(job_id):
            projecting.make_shard(shop, job, shard)
        else:
            _make_dataset_shard(shop, job, shard)
    except StoppedError:
        return "stopped"
    except Exception as error:
        if not shop.table.must_stop(job_id):  # else the files went from under this shard, as another one had failed
            _fail(shop, job_id, error)
        return "stopped"
    return "finished"


def _make_dataset_shard(shop: Workshop, job: Job, shard: int) -> None:
    bundle, plan_ = _plan_of(shop, job)
    progress = _Progress(shop, job.id, shard)
    progress(0)
    record = write_shard(
        plan_,
        shard,
        _Synthesize(shop, job, bundle),
        shop.store(job.id),
        score=_Score(shop, job, bundle) if plan_.scored else None,
        examine=_Examine(shop, job, bundle) if plan_.gated else None,
        identity=_identity(shop, job.id, bundle, plan_),
        on_batch=progress,
    )
    shop.table.progress(job.id, shard, len(record.images), finished=True)


def finish(shop: Workshop, job_id: str) -> str:
    """End a job all of whose shards have ended: assemble its files, or clear up after it. Returns its last state."""
    job = shop.table.get(job_id)
    if job is None or not job.active:
        return "gone" if job is None else job.state
    if not shop.table.must_stop(job_id):
        try:
            if projecting.is_projection(job_id):
                projecting.finish(shop, job)
            else:
                _finish_dataset(shop, job)
        except Exception as error:
            _fail(shop, job_id, error)
    job = shop.table.get(job_id)
    if job is None:
        return "gone"
    if job.state == "cancelling":
        state = "cancelled"
    elif job.error is not None:
        state = "failed"
    else:
        state = "succeeded"
    if state != "succeeded":
        remove_files(shop, job_id)
    shop.table.finish(job_id, state)
    logger.info("dataset ended", extra={"dataset": job_id, "state": state})
    return state


def _finish_dataset(shop: Workshop, job: Job) -> None:
    bundle, plan_ = _plan_of(shop, job)
    finalize(
        plan_,
        shop.store(job.id),
        bundle,
        _identity(shop, job.id, bundle, plan_),
        lambda embeddings: patiently(shop, job.id, lambda: shop.expose(bundle, embeddings)),
    )


def give_up(shop: Workshop, job_id: str, why: str) -> None:
    """End a job as failed whose workflow cannot go on."""
    logger.error("dataset given up", extra={"dataset": job_id, "why": why})
    document = problem("internal", f"the dataset could not be made: {why}; ask for it again", f"/v1/datasets/{job_id}")
    try:
        remove_files(shop, job_id)
    finally:
        shop.table.finish(job_id, "failed", document.model_dump(exclude_none=True))


def remove_files(shop: Workshop, job_id: str) -> None:
    """Remove all files of a job, if there are any."""
    Store(shop.storage).remove(job_id)


def _fail(shop: Workshop, job_id: str, error: Exception) -> None:
    """Note why the job fails; `finish` clears up after it. On a full disk the note itself may need the files' room."""
    found = problem_of(error)
    if found.kind == "internal":
        logger.exception("dataset failed", extra={"dataset": job_id})
    else:
        logger.warning("dataset failed", extra={"dataset": job_id, "kind": found.kind, "detail": found.detail})
    document = problem(found.kind, found.detail, f"/v1/datasets/{job_id}", errors=found.errors)
    note = document.model_dump(exclude_none=True)
    try:
        shop.table.record_error(job_id, note)
    except Exception:  # every database driver has its own
        remove_files(shop, job_id)
        shop.table.record_error(job_id, note)


def _plan_of(shop: Workshop, job: Job) -> tuple[Bundle, Plan]:
    bundle = shop.models.serving(job.model_name, job.model_digest)
    return bundle, plan_for(DatasetRequest.model_validate(job.request), bundle)


class _Progress:
    """Called after every batch with the samples done: tells the jobs table, and stops the shard if it is to stop."""

    def __init__(self, shop: Workshop, job_id: str, shard: int) -> None:
        self._shop, self._job_id, self._shard = shop, job_id, shard
        self._told = float("-inf")
        self._done = 0

    def __call__(self, done: int) -> None:
        if self._shop.stopping.is_set():
            raise ShutdownError
        dataset_samples.inc(max(0, done - self._done))
        self._done = done
        if time.monotonic() - self._told < POLL_SECONDS:
            return
        self._told = time.monotonic()
        self._shop.check_space()
        self._shop.table.progress(self._job_id, self._shard, done)
        if self._shop.table.must_stop(self._job_id):
            raise StoppedError


class _Synthesize:
    """The generator service as the function that shards call."""

    def __init__(self, shop: Workshop, job: Job, bundle: Bundle) -> None:
        request = DatasetRequest.model_validate(job.request)
        self._shop, self._job_id, self._seed = shop, job.id, request.seed
        self._options = Options(
            bundle.digest,
            request.truncation_psi,
            request.truncation_cutoff,
            request.noise_mode,
            edits=request.moves,
            directions=[direction.name for direction in bundle.directions],
        )

    def __call__(self, indices: Sequence[int], labels: Sequence[int]) -> NDArray[np.uint8]:
        rows = pack(self._options, self._seed, indices, labels)
        images: list[Image] = patiently(self._shop, self._job_id, lambda: self._shop.generate(rows))
        return np.stack(images)


class _Score:
    """The classifier service as the function that shards call."""

    def __init__(self, shop: Workshop, job: Job, bundle: Bundle) -> None:
        assert bundle.classifier is not None
        self._shop, self._job_id, self._bundle, self._described = shop, job.id, bundle, bundle.classifier

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        inputs = batch(images, self._described.input.size)
        logits = patiently(self._shop, self._job_id, lambda: self._shop.classify(self._bundle, inputs))
        return scores_of(logits, self._described.temperature).calibrated


class _Examine:
    """The authenticity service as the function that shards call."""

    def __init__(self, shop: Workshop, job: Job, bundle: Bundle) -> None:
        assert bundle.authenticity is not None
        self._shop, self._job_id, self._bundle, self._described = shop, job.id, bundle, bundle.authenticity

    def __call__(self, images: NDArray[np.uint8]) -> Nearest:
        inputs = batch(images, self._described.resolution)
        found: Nearest = patiently(self._shop, self._job_id, lambda: self._shop.nearest(self._bundle, inputs))
        return found


def _identity(shop: Workshop, job_id: str, bundle: Bundle, plan_: Plan) -> Mapping[str, str]:
    """What makes the images, scores them and compares them, as far as the plan has it."""
    found: Mapping[str, str] = patiently(shop, job_id, lambda: shop.identity(bundle.digest))
    if plan_.scored:
        scorer: Mapping[str, str] = patiently(shop, job_id, lambda: shop.classifier_identity(bundle))
        found = {**found, **scorer}
    if plan_.gated:
        index: Mapping[str, str] = patiently(shop, job_id, lambda: shop.index_identity(bundle))
        found = {**found, **index}
    return found
