"""What a job does, without how it is made durable: one shard, the finish, the clean-up. Projections are in `projecting`.

Every function here may run again after a crash, and may run twice at once after a lease ran out: shards are idempotent and
files are put into place atomically.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Nearest
from dermis.bundle import Bundle
from dermis.classifier.preprocess import batch
from dermis.classifier.scores import scores_of
from dermis.dataset.manifest import finalize
from dermis.dataset.plan import Plan, plan_for
from dermis.dataset.request import stored_request
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.errors import StorageError
from services.errors import DatabaseUnavailableError, InferenceUnavailableError, is_transient
from services.jobs import projecting
from services.jobs.table import Job
from services.jobs.workshop import (
    POLL_SECONDS,
    ShutdownError,
    StoppedError,
    Workshop,
    must_stop,
    patiently,
    retry_transient,
)
from services.metrics import dataset_samples
from services.problems import Problem, is_disk_full, problem, problem_of
from services.samples import Image, Options, pack

logger = logging.getLogger("dermis.jobs")


def make_shard(shop: Workshop, job_id: str, shard: int) -> str:
    """Make one shard: "finished", or "stopped" with the reason in the jobs table.

    Raises ShutdownError, and transient errors (`services.errors.is_transient`), which are no job's outcome.
    """
    job = shop.table.get(job_id)
    if job is None or shop.table.must_stop(job_id):
        return "stopped"
    try:
        if job.kind == "projection":
            projecting.make_shard(shop, job, shard)
        else:
            _make_dataset_shard(shop, job, shard)
    except StoppedError:
        return "stopped"
    except Exception as error:
        if is_transient(error):
            raise
        if not must_stop(
            shop, job_id
        ):  # otherwise the files were removed during this shard, because another one failed
            _fail(shop, job, error)
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
        shop.retrying_store(job.id),
        score=_Score(shop, job, bundle) if plan_.scored else None,
        examine=_Examine(shop, job, bundle) if plan_.gated else None,
        identity=_identity(shop, job.id, bundle, plan_),
        on_batch=progress,
    )
    retry_transient(shop, lambda: shop.table.progress(job.id, shard, len(record.images), finished=True))


def finish(shop: Workshop, job_id: str) -> str:
    """End a job all of whose shards have ended: assemble its files, or clear up after it. Returns its last state.

    Raises as `make_shard`, and may then be called again.
    """
    job = shop.table.get(job_id)
    if job is None or not job.active:
        return "gone" if job is None else job.state
    if not shop.table.must_stop(job_id):
        try:
            if job.kind == "projection":
                projecting.finish(shop, job)
            else:
                _finish_dataset(shop, job)
        except StoppedError:
            pass
        except Exception as error:
            if is_transient(error):
                raise
            _fail(shop, job, error)
        else:
            job = shop.table.finish(job_id, "succeeded")
    return end(shop, job_id, job)


def end(shop: Workshop, job_id: str, job: Job | None = None) -> str:
    """End a job that did not succeed, if it has not ended by now: another worker may have worked on it as well.

    No shard of it may be running any more. Returns its last state.
    """
    if job is None or job.active:
        job = shop.table.get(job_id)
    if job is not None and job.active:
        # The table has the reason by now, so it is not lost if this process dies here.
        _clear(shop, job_id)
        job = shop.table.finish(job_id, "cancelled" if job.state == "cancelling" else "failed")
    state = "gone" if job is None else job.state
    logger.info("job ended", extra={"job": job_id, "state": state})
    return state


def _finish_dataset(shop: Workshop, job: Job) -> None:
    bundle, plan_ = _plan_of(shop, job)
    finalize(
        plan_,
        shop.retrying_store(job.id),
        bundle,
        _identity(shop, job.id, bundle, plan_),
        lambda embeddings: patiently(shop, job.id, lambda: shop.expose(bundle, embeddings)),
    )


def note_failure(shop: Workshop, job: Job, why: str, kind: str = "internal") -> None:
    """Note that a job cannot go on; `end` or `finish` ends it. `why` is for callers."""
    logger.error("job given up", extra={"job": job.id, "why": why})
    document = problem(kind, why, path_of(job))
    shop.table.record_error(job.id, document.model_dump(exclude_none=True))


def remove_files(shop: Workshop, job_id: str) -> None:
    """Remove all files of a job, if there are any."""
    Store(shop.storage).remove(job_id)


def has_inputs(shop: Workshop, job: Job) -> bool:
    """Whether all images of a projection are stored."""
    return projecting.has_inputs(shop.store(job.id), projecting.ProjectionOptions.model_validate(job.request))


def path_of(job: Job) -> str:
    """The path of a job in the API."""
    return f"/v1/{'projections' if job.kind == 'projection' else 'datasets'}/{job.id}"


def _clear(shop: Workshop, job_id: str) -> None:
    """Remove the files of a job that is about to end; files that cannot be removed do not prevent its end."""
    try:
        remove_files(shop, job_id)
    except StorageError as error:
        if is_transient(error):
            raise
        logger.error("files not removed", extra={"job": job_id, "error": str(error)})


def _fail(shop: Workshop, job: Job, error: Exception) -> None:
    """Note why the job fails; `finish` clears up after it."""
    document = _problem_of_job(job, error)
    kind = document.type.rpartition(":")[2]
    if kind == "internal":
        logger.error("job failed", extra={"job": job.id}, exc_info=error)
    else:
        logger.warning("job failed", extra={"job": job.id, "kind": kind, "error": str(error)})
    note = document.model_dump(exclude_none=True)

    def record() -> None:
        try:
            shop.table.record_error(job.id, note)
        except Exception as full:
            if is_transient(full) or not is_disk_full(full):
                raise
            # The note itself needs disk space, so remove the files first; they are to be removed anyway.
            remove_files(shop, job.id)
            shop.table.record_error(job.id, note)

    retry_transient(shop, record)


def _problem_of_job(job: Job, error: Exception) -> Problem:
    """Why a job failed, for callers: no place where the service keeps anything, no text of a driver or a library."""
    cause = problem_of(error)
    detail = cause.detail
    if isinstance(error, InferenceUnavailableError):
        detail = "a service that this needs could not do its part for some minutes; the log has more; ask for it again"
    elif cause.kind == "internal":
        detail = "the service failed; the log has more under the id of this job"
    return problem(cause.kind, detail, path_of(job), errors=cause.errors)


def _plan_of(shop: Workshop, job: Job) -> tuple[Bundle, Plan]:
    bundle = shop.models.serving(job.model_name, job.model_digest)
    return bundle, plan_for(stored_request(job.request), bundle)


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
        with suppress(DatabaseUnavailableError):  # the shard's end waits for it
            self._shop.table.progress(self._job_id, self._shard, done)
        if must_stop(self._shop, self._job_id):
            raise StoppedError


class _Synthesize:
    """The generator service as the function that shards call."""

    def __init__(self, shop: Workshop, job: Job, bundle: Bundle) -> None:
        request = stored_request(job.request)
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
