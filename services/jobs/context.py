"""The context of the work on jobs, and the waiting for inference services, the database and the storage."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from dermis.dataset.shards import Sign
from dermis.dataset.store import Store, storage_errors
from dermis.errors import StorageError
from dermis.report.appearance import MeasureImages, appearances
from services.errors import (
    DatabaseUnavailableError,
    InferenceFailedError,
    InferenceUnavailableError,
    InferenceUnreachableError,
    is_transient,
)
from services.inference.client import InferenceClients
from services.jobs.table import Job, JobTable
from services.jobs.turns import Turns
from services.models import ServedModels
from services.observed_store import ObservedStore, check_free_space
from services.problems import is_disk_full
from services.tenants import folder_of

logger = logging.getLogger("dermis.jobs")

T = TypeVar("T")

# Limit for a service that answers that it is unavailable, as it did not load a model or has too little memory for the call.
# It begins with the first such answer. For a service that does not answer at all there is no limit, because its supervisor
# restarts it.
_UNAVAILABLE_SECONDS = 300.0
_MAX_FAILURES = 3
_FIRST_PAUSE_SECONDS = 0.5
_MAX_PAUSE_SECONDS = 10.0
POLL_SECONDS = 0.25


class StoppedError(Exception):
    """Work on a job has to stop: the job was cancelled or deleted, or has failed elsewhere."""


class ShutdownError(BaseException):
    """The process has to stop. Not an Exception, so that DBOS does not record it as the outcome of a workflow."""


@dataclass(frozen=True)
class FileInfo:
    """One file of a job that has succeeded."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class JobContext:
    """The parts of the service that the work on jobs uses. `services.composition` creates it."""

    table: JobTable
    models: ServedModels
    inference: InferenceClients
    loop: asyncio.AbstractEventLoop
    """The event loop that runs the calls of `inference`."""
    storage: str
    turns: Turns
    """The places of this process for shards of datasets."""
    finish_turns: Turns
    """The places for the end of datasets. They are others, because measuring images for reports leaves the generator idle."""
    projection_turns: Turns
    """The place for shards of projections."""
    min_free_bytes: int = 0
    sign: Sign | None = None
    """Signs images; None without a certificate."""
    measure_images: MeasureImages = appearances
    """Measures the images of reports."""
    stopping: threading.Event = field(default_factory=threading.Event)
    submitting: list[str] = field(default_factory=list)
    """Ids of jobs that are being created, and whose workflow is about to be enqueued; once for each call that does so."""

    def store(self, job: Job) -> Store:
        """The store of the job's files, below the folder of its tenant."""
        return ObservedStore(f"{self.storage.rstrip('/')}/{folder_of(job.tenant, job.id)}")

    def retrying_store(self, job: Job) -> Store:
        """The same store, with each call repeated by `retry_transient` while the storage cannot be reached."""
        return _RetryingStore(self, job)

    def check_space(self) -> None:
        """Refuse work while so little space is free that the jobs database could soon not be written.

        Raises:
            StorageError: If less than `min_free_bytes` are free.
        """
        check_free_space(self.storage, self.min_free_bytes)

    @contextmanager
    def temporary_space(self, needed: int) -> Iterator[None]:
        """A block that writes a file for storage that is not local, which first needs space in the folder of temporary files.

        That folder belongs to this worker, and its other files are of other shards or programs. So the work waits for space
        there, while a full storage ends a job.

        Args:
            needed: Lower estimate of the size of the file in bytes.

        Raises:
            StorageError: A transient one; or "storage-full" if the file can never fit.
        """
        if Store(self.storage).local:
            yield
            return
        folder = tempfile.gettempdir()
        with storage_errors(folder):
            usage = shutil.disk_usage(folder)
        least = needed + self.min_free_bytes
        if usage.free < least:
            raise StorageError(
                f"{folder}: {usage.free >> 20} MiB are free for temporary files, and {least >> 20} MiB are needed",
                kind="storage-unavailable" if usage.total >= least else "storage-full",
            )
        try:
            yield
        except StorageError as error:
            if error.kind != "storage-full" or not is_disk_full(error):
                raise
            raise StorageError(f"{folder}: no space left for temporary files", kind="storage-unavailable") from error


def retry_transient(ctx: JobContext, call: Callable[[], T], job_id: str | None = None) -> T:
    """Repeat `call` while the database, the storage or a service cannot be reached, and return its result.

    Args:
        ctx: The context of the jobs.
        call: The function to repeat. Errors that are not transient are raised.
        job_id: A job that ends the waiting when it is to stop.

    Raises:
        ShutdownError: If the process is to stop.
        StoppedError: If the job `job_id` is to stop.
    """
    pause = _FIRST_PAUSE_SECONDS
    while True:
        try:
            return call()
        except Exception as error:
            if not is_transient(error):
                raise
            cause = error.__cause__ or error
            logger.warning("work waits", extra={"error": str(error), "cause": str(cause).partition("\n")[0][:200]})
        if ctx.stopping.wait(pause):
            raise ShutdownError
        if job_id is not None and must_stop(ctx, job_id):
            raise StoppedError
        pause = min(2 * pause, _MAX_PAUSE_SECONDS)


def must_stop(ctx: JobContext, job_id: str) -> bool:
    """Whether the job was cancelled or deleted, or has failed, up to a moment ago. False without the database."""
    try:
        return ctx.table.recent_states.of(job_id).must_stop
    except DatabaseUnavailableError:
        return False


def stop_if_asked(ctx: JobContext, job_id: str) -> None:
    """Raise ShutdownError if the process is to stop, and StoppedError if the job is to stop."""
    if ctx.stopping.is_set():
        raise ShutdownError
    if must_stop(ctx, job_id):
        raise StoppedError


class _RetryingStore(ObservedStore):
    """A store that repeats single calls, so that work of many calls need not restart after an interruption."""

    def __init__(self, ctx: JobContext, job: Job) -> None:
        super().__init__(ctx.store(job).location)
        self._ctx, self._job_id = ctx, job.id

    def _retry(self, call: Callable[[], T]) -> T:
        return retry_transient(self._ctx, call, self._job_id)

    def entries(self) -> list[str]:
        return self._retry(super().entries)

    def size(self, name: str) -> int | None:
        return self._retry(partial(super().size, name))

    def total_bytes(self) -> int:
        return self._retry(super().total_bytes)

    @contextmanager
    def open(self, name: str, *, size: int | None = None) -> Iterator[IO[bytes]]:
        with ExitStack() as stack:
            yield self._retry(lambda: stack.enter_context(ObservedStore.open(self, name, size=size)))

    def read_if_exists(self, name: str, *, limit: int | None = None) -> bytes | None:
        return self._retry(partial(super().read_if_exists, name, limit=limit))

    def sha256(self, name: str, *, size: int | None = None) -> str:
        return self._retry(partial(super().sha256, name, size=size))

    def write(self, name: str, data: bytes) -> None:
        self._retry(partial(super().write, name, data))

    def _put(self, temporary: Path, name: str, check: Callable[[], None] | None, staged: bool) -> None:
        self._retry(partial(super()._put, temporary, name, check, staged))

    def remove(self, name: str) -> None:
        self._retry(partial(super().remove, name))


def call_with_retry(
    ctx: JobContext, job_id: str, call: Callable[[], Awaitable[T]], while_waiting: Callable[[], None] | None = None
) -> T:
    """Call an inference service, repeatedly while it restarts, and return its response.

    Args:
        ctx: The context of the jobs.
        job_id: The job that needs the response.
        call: Makes one call, on the event loop.
        while_waiting: Called several times a second; an exception that it raises cancels the call.

    Raises:
        InferenceUnavailableError: If the service has answered for minutes that it is unavailable.
        InferenceFailedError: If the service has failed repeatedly.
        ShutdownError: If the process is to stop.
        StoppedError: If the job is to stop.
    """
    deadline: float | None = None
    failures, pause = 0, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return run_on_loop(ctx, call(), while_waiting)
        except InferenceUnreachableError:
            deadline = None
        except InferenceUnavailableError:
            now = time.monotonic()
            if deadline is None:  # a call that has taken minutes is repeated as well
                deadline = now + _UNAVAILABLE_SECONDS
            elif now > deadline:
                raise
        except InferenceFailedError:
            failures += 1
            if failures >= _MAX_FAILURES:
                raise
        if ctx.stopping.wait(pause):
            raise ShutdownError
        if must_stop(ctx, job_id):
            raise StoppedError
        pause = min(2 * pause, _MAX_PAUSE_SECONDS)


def run_on_loop(ctx: JobContext, awaitable: Awaitable[T], while_waiting: Callable[[], None] | None = None) -> T:
    """Await something on the event loop, from the thread of a worker.

    Args:
        ctx: The context of the jobs.
        awaitable: The awaitable.
        while_waiting: As for `call_with_retry`.

    Raises:
        ShutdownError: If the process is to stop.
    """

    async def call() -> T:
        return await awaitable

    future: Future[T] = asyncio.run_coroutine_threadsafe(call(), ctx.loop)
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except FutureTimeoutError:
            if future.done():  # the call itself timed out
                raise
            if ctx.stopping.is_set():
                future.cancel()
                raise ShutdownError from None
            if while_waiting is not None:
                try:
                    while_waiting()
                except BaseException:
                    future.cancel()
                    raise
