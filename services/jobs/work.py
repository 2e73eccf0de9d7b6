"""What a dataset job does, without how it is made durable: one shard, the finish, the clean-up.

Every function here may run again after a crash, and may run twice at once after a lease ran out: shards are idempotent and
files are put into place atomically.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.attack import Exposure
from dermis.authenticity.index import Nearest
from dermis.bundle import Bundle
from dermis.classifier.preprocess import batch
from dermis.classifier.scores import scores_of
from dermis.dataset.manifest import finalize
from dermis.dataset.plan import Plan, plan_for
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.errors import StorageError
from services.errors import InferenceFailedError, InferenceUnavailableError
from services.gateway.metrics import dataset_samples
from services.gateway.problems import problem, problem_of
from services.jobs.table import Job, JobTable
from services.models import Models
from services.pixels import Classify, FindNearest
from services.samples import Generate, Image, Options, pack

logger = logging.getLogger("dermis.jobs")

# A generator that restarts compiles for a while; one that stays away is not waited for for ever.
_PATIENCE_SECONDS = 300.0
_FAILURES = 3
_FIRST_PAUSE_SECONDS = 0.5
_POLL_SECONDS = 0.25


class StoppedError(Exception):
    """The job is to stop: it was cancelled or deleted, or has failed elsewhere."""


class ShutdownError(BaseException):
    """The process is to stop. Not an Exception, for DBOS must not record it as the outcome of the workflow."""


@dataclass(frozen=True)
class Workshop:
    """What the work needs, from the composition root."""

    table: JobTable
    models: Models
    generate: Generate
    identity: Callable[[str], Awaitable[Mapping[str, str]]]  # by bundle digest: what runs it, for the manifest
    classify: Classify
    classifier_identity: Callable[[Bundle], Awaitable[Mapping[str, str]]]
    nearest: FindNearest
    expose: Callable[[Bundle, NDArray[np.float32]], Awaitable[Exposure]]
    index_identity: Callable[[Bundle], Awaitable[Mapping[str, str]]]
    loop: asyncio.AbstractEventLoop  # where these run
    storage: str
    min_free_bytes: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def store(self, job_id: str) -> Store:
        """Where the job's files lie."""
        return Store(f"{self.storage.rstrip('/')}/{job_id}")

    def check_space(self) -> None:
        """StorageError when so little is free that the jobs database would soon be unable to write."""
        free = Store(self.storage).free_bytes()
        if free is not None and free < self.min_free_bytes:
            raise StorageError(
                f"the storage of the datasets has {free >> 20} MiB left; free some space and ask again", "storage-full"
            )


def make_shard(shop: Workshop, job_id: str, shard: int) -> str:
    """Make one shard: "finished", or "stopped" with the reason in the jobs table. Raises ShutdownError only."""
    job = shop.table.get(job_id)
    if job is None or shop.table.must_stop(job_id):
        return "stopped"
    try:
        bundle, plan_ = _plan_of(shop, job)
        progress = _Progress(shop, job_id, shard)
        progress(0)
        record = write_shard(
            plan_,
            shard,
            _Synthesize(shop, job, bundle),
            shop.store(job_id),
            score=_Score(shop, job, bundle) if plan_.scored else None,
            examine=_Examine(shop, job, bundle) if plan_.gated else None,
            identity=_identity(shop, job_id, bundle, plan_),
            on_batch=progress,
        )
        shop.table.progress(job_id, shard, len(record.images), finished=True)
    except StoppedError:
        return "stopped"
    except Exception as error:
        if not shop.table.must_stop(job_id):  # else the files went from under this shard, as another one had failed
            _fail(shop, job_id, error)
        return "stopped"
    return "finished"


def finish(shop: Workshop, job_id: str) -> str:
    """End a job all of whose shards have ended: assemble its files, or clear up after it. Returns its last state."""
    job = shop.table.get(job_id)
    if job is None or not job.active:
        return "gone" if job is None else job.state
    if not shop.table.must_stop(job_id):
        try:
            bundle, plan_ = _plan_of(shop, job)
            finalize(
                plan_,
                shop.store(job_id),
                bundle,
                _identity(shop, job_id, bundle, plan_),
                lambda embeddings: _patiently(shop, job_id, lambda: shop.expose(bundle, embeddings)),
            )
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
        if time.monotonic() - self._told < _POLL_SECONDS:
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
        images: list[Image] = _patiently(self._shop, self._job_id, lambda: self._shop.generate(rows))
        return np.stack(images)


class _Score:
    """The classifier service as the function that shards call."""

    def __init__(self, shop: Workshop, job: Job, bundle: Bundle) -> None:
        assert bundle.classifier is not None
        self._shop, self._job_id, self._bundle, self._described = shop, job.id, bundle, bundle.classifier

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        inputs = batch(images, self._described.input.size)
        logits = _patiently(self._shop, self._job_id, lambda: self._shop.classify(self._bundle, inputs))
        return scores_of(logits, self._described.temperature).calibrated


class _Examine:
    """The authenticity service as the function that shards call."""

    def __init__(self, shop: Workshop, job: Job, bundle: Bundle) -> None:
        assert bundle.authenticity is not None
        self._shop, self._job_id, self._bundle, self._described = shop, job.id, bundle, bundle.authenticity

    def __call__(self, images: NDArray[np.uint8]) -> Nearest:
        inputs = batch(images, self._described.resolution)
        found: Nearest = _patiently(self._shop, self._job_id, lambda: self._shop.nearest(self._bundle, inputs))
        return found


def _identity(shop: Workshop, job_id: str, bundle: Bundle, plan_: Plan) -> Mapping[str, str]:
    """What makes the images, scores them and compares them, as far as the plan has it."""
    found: Mapping[str, str] = _patiently(shop, job_id, lambda: shop.identity(bundle.digest))
    if plan_.scored:
        scorer: Mapping[str, str] = _patiently(shop, job_id, lambda: shop.classifier_identity(bundle))
        found = {**found, **scorer}
    if plan_.gated:
        index: Mapping[str, str] = _patiently(shop, job_id, lambda: shop.index_identity(bundle))
        found = {**found, **index}
    return found


def _patiently(shop: Workshop, job_id: str, call: Callable[[], Awaitable[Any]]) -> Any:
    """The answer of the generator, through its restarts; ends early when the job or the process is to end."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    failures, pause = 0, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return _await(shop, call())
        except InferenceUnavailableError:
            if time.monotonic() > deadline:
                raise
        except InferenceFailedError:
            failures += 1
            if failures >= _FAILURES:
                raise
        if shop.stopping.wait(pause):
            raise ShutdownError
        if shop.table.must_stop(job_id):
            raise StoppedError
        pause = min(2 * pause, 10.0)


def _await(shop: Workshop, awaitable: Awaitable[Any]) -> Any:
    """Wait in a worker's thread for what happens on the event loop; ShutdownError if the process is to stop meanwhile."""

    async def call() -> Any:
        return await awaitable

    future: Future[Any] = asyncio.run_coroutine_threadsafe(call(), shop.loop)
    while True:
        try:
            return future.result(timeout=_POLL_SECONDS)
        except FutureTimeoutError:
            if future.done():  # the call itself timed out
                raise
            if shop.stopping.is_set():
                future.cancel()
                raise ShutdownError from None
