"""The storage of jobs with metrics and spans: how long each access takes, and whether it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from dermis.dataset.store import Store
from dermis.errors import StorageError
from services import metrics, tracing

T = TypeVar("T")


class ObservedStore(Store):
    """A store that measures its accesses. Names of files are in neither the metrics nor the spans."""

    def entries(self) -> list[str]:
        return _observed("list", super().entries)

    def size(self, name: str) -> int | None:
        return _observed("stat", partial(super().size, name))

    def total_bytes(self) -> int:
        return _observed("list", super().total_bytes)

    @contextmanager
    def open(self, name: str, *, size: int | None = None) -> Iterator[IO[bytes]]:
        with ExitStack() as stack:
            yield _observed("open", lambda: stack.enter_context(Store.open(self, name, size=size)))

    def read_if_exists(self, name: str, *, limit: int | None = None) -> bytes | None:
        return _observed("read", partial(super().read_if_exists, name, limit=limit))

    def _put(self, temporary: Path, name: str, check: Callable[[], None] | None, staged: bool) -> None:
        put, refusals = super()._put, list[Exception]()

        def checked() -> None:
            try:
                if check is not None:
                    check()
            except Exception as refusal:
                refusals.append(refusal)
                raise

        def written() -> None:
            try:
                put(temporary, name, checked, staged)
            except Exception as error:
                if error not in refusals:
                    raise

        _observed("write", written)
        if refusals:  # no error of the storage: accesses of `check` are measured by themselves
            raise refusals[0]

    def write(self, name: str, data: bytes) -> None:
        # A local file gets its name in `_put`, which is observed there.
        if self.local:
            super().write(name, data)
        else:
            _observed("write", partial(super().write, name, data))

    def remove(self, name: str) -> None:
        _observed("remove", partial(super().remove, name))


def check_free_space(storage: str, least: int, needed: int = 0) -> None:
    """Refuse work while so little space is free that the jobs database could soon not be written.

    Args:
        storage: Folder or URL of the storage. The free space of object storage is not known, so it is never refused.
        least: Bytes that must stay free.
        needed: Bytes that the work writes.

    Raises:
        StorageError: Less is free.
    """
    free = Store(storage).free_bytes()
    if free is not None and free < least + needed:
        raise StorageError(f"the storage has {free >> 20} MiB left; free some space and try again", "storage-full")


def _observed(operation: str, call: Callable[[], T]) -> T:
    started = time.perf_counter()
    outcome = "error"
    try:
        with tracing.client_span(f"storage {operation}"):
            result = call()
        outcome = "ok"
        return result
    finally:
        metrics.storage_seconds.labels(operation, outcome).observe(time.perf_counter() - started)
