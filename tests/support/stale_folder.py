"""A folder of a network file system that cannot be reached for a while."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_CALLS = ("lstat", "mkdir", "open", "remove", "replace", "rmdir", "scandir", "stat", "statvfs", "unlink")


@contextmanager
def stale(folder: Path) -> Iterator[None]:
    """Within the block, calls on a folder and on what is in it fail as those of an NFS client whose server has restarted."""

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def fail_or_call(path: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return call(path, *arguments, **options)

        return fail_or_call

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, failing(getattr(os, name)))
        yield
