"""What the work on jobs needs, and how it waits: for services through their restarts, never longer than the job is wanted."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.attack import Exposure
from dermis.bundle import Bundle
from dermis.dataset.store import Store
from dermis.errors import StorageError
from services.errors import (
    DatabaseUnavailableError,
    InferenceFailedError,
    InferenceUnavailableError,
    InferenceUnreachableError,
    is_transient,
)
from services.jobs.table import JobTable
from services.models import Models
from services.pixels import Classify, FindNearest
from services.projections import Project
from services.samples import Generate

logger = logging.getLogger("dermis.jobs")

T = TypeVar("T")

# The time for a service that answers that it cannot do what it is asked for (a model that was not loaded). One that does not
# answer is waited for without a limit, because its supervisor starts it again.
_PATIENCE_SECONDS = 300.0
_FAILURES = 3
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0
POLL_SECONDS = 0.25


class StoppedError(Exception):
    """The job is to stop: it was cancelled or deleted, or has failed elsewhere."""


class ShutdownError(BaseException):
    """The process is to stop. Not an Exception, for DBOS must not record it as the outcome of the workflow."""


@dataclass(frozen=True)
class FileInfo:
    """One file of a job that has succeeded."""

    name: str
    bytes: int
    sha256: str


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
    project: Project
    projection_steps: Callable[[str], Awaitable[int]]  # by ticket: steps done of a call of `project`
    cancel_projection: Callable[[str], Awaitable[None]]
    loop: asyncio.AbstractEventLoop  # where these run
    storage: str
    min_free_bytes: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)
    submitting: set[str] = field(default_factory=set)  # ids of jobs that calls in work are about to submit

    def store(self, job_id: str) -> Store:
        """Where the job's files lie."""
        return Store(f"{self.storage.rstrip('/')}/{job_id}")

    def retrying_store(self, job_id: str) -> Store:
        """The same store for work on the job: calls are repeated by `retry_transient` while the storage cannot be reached."""
        return _RetryingStore(self, job_id)

    def check_space(self) -> None:
        """StorageError when so little is free that the jobs database would soon be unable to write."""
        free = Store(self.storage).free_bytes()
        if free is not None and free < self.min_free_bytes:
            raise StorageError(
                f"the storage of the datasets has {free >> 20} MiB left; free some space and ask again", "storage-full"
            )


def retry_transient(shop: Workshop, call: Callable[[], T], job_id: str | None = None) -> T:
    """The result of `call`, repeated while the database, the storage or a service cannot be reached.

    Raises ShutdownError if the process is to stop meanwhile and, where `job_id` is given, StoppedError if that job is to.
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
        if shop.stopping.wait(pause):
            raise ShutdownError
        if job_id is not None and must_stop(shop, job_id):
            raise StoppedError
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def must_stop(shop: Workshop, job_id: str) -> bool:
    """Whether the job was cancelled or deleted, or has failed. False while the database cannot be reached."""
    try:
        return shop.table.must_stop(job_id)
    except DatabaseUnavailableError:
        return False


class _RetryingStore(Store):
    """A store that repeats single calls, so that work of many calls need not begin again after an interruption."""

    def __init__(self, shop: Workshop, job_id: str) -> None:
        super().__init__(shop.store(job_id).location)
        self._shop, self._job_id = shop, job_id

    def _retry(self, call: Callable[[], T]) -> T:
        return retry_transient(self._shop, call, self._job_id)

    def entries(self) -> list[str]:
        return self._retry(super().entries)

    def size(self, name: str) -> int | None:
        return self._retry(partial(super().size, name))

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        with ExitStack() as stack:
            yield self._retry(lambda: stack.enter_context(Store.open(self, name)))

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        return self._retry(partial(super().read, name, limit=limit))

    def sha256(self, name: str) -> str:
        return self._retry(partial(super().sha256, name))

    def write(self, name: str, data: bytes) -> None:
        self._retry(partial(super().write, name, data))

    def _put(self, temporary: Path, name: str) -> None:
        self._retry(partial(super()._put, temporary, name))

    def remove(self, name: str) -> None:
        self._retry(partial(super().remove, name))


def patiently(
    shop: Workshop, job_id: str, call: Callable[[], Awaitable[Any]], while_waiting: Callable[[], None] | None = None
) -> Any:
    """The answer of a service, through its restarts; ends early when the job or the process is to end.

    `while_waiting` is called a few times a second; an exception from it gives the call up.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    failures, pause = 0, _FIRST_PAUSE_SECONDS
    while True:
        try:
            return ask(shop, call(), while_waiting)
        except InferenceUnreachableError:
            deadline = time.monotonic() + _PATIENCE_SECONDS
        except InferenceUnavailableError:
            if time.monotonic() > deadline:
                raise
        except InferenceFailedError:
            failures += 1
            if failures >= _FAILURES:
                raise
        if shop.stopping.wait(pause):
            raise ShutdownError
        if must_stop(shop, job_id):
            raise StoppedError
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def ask(shop: Workshop, awaitable: Awaitable[Any], while_waiting: Callable[[], None] | None = None) -> Any:
    """Wait in a worker's thread for what happens on the event loop; ShutdownError if the process is to stop meanwhile."""

    async def call() -> Any:
        return await awaitable

    future: Future[Any] = asyncio.run_coroutine_threadsafe(call(), shop.loop)
    while True:
        try:
            return future.result(timeout=POLL_SECONDS)
        except FutureTimeoutError:
            if future.done():  # the call itself timed out
                raise
            if shop.stopping.is_set():
                future.cancel()
                raise ShutdownError from None
            if while_waiting is not None:
                try:
                    while_waiting()
                except BaseException:
                    future.cancel()
                    raise
