"""A storage in memory, `flaky://`, whose calls can be made to fail like those of a remote storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

Fail = Callable[[str, str], Exception | None]
"""(call: "read", "write", "info" or "remove"; path) -> the exception to raise."""


class EndpointConnectionError(Exception):
    """An error class of a driver, which is no OSError."""


class FlakyFileSystem(MemoryFileSystem):
    """fsspec's memory file system that asks `fail` first."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    fail: ClassVar[Fail | None] = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def _check(self, call: str, path: str) -> None:
        failure = None if FlakyFileSystem.fail is None else FlakyFileSystem.fail(call, path)
        if failure is not None:
            raise failure

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if "r" in mode:
            self._check("read", path)
        return super()._open(path, mode, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        self._check("write", path)
        return super().pipe_file(path, value, **options)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> Any:
        self._check("write", rpath)
        return super().put_file(lpath, rpath, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._check("info", path)
        return super().info(path, **options)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._check("remove", path)
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)


@contextmanager
def failing(fail: Fail) -> Iterator[None]:
    """Within the block calls of the storage end as `fail` says."""
    FlakyFileSystem.fail = staticmethod(fail)
    try:
        yield
    finally:
        FlakyFileSystem.fail = None


def names() -> list[str]:
    """All files that are stored."""
    return sorted(FlakyFileSystem.store)
