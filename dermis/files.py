"""Read regular files only, write files completely or not at all, and lock them."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from dermis.errors import StorageError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a link"),
)
# Windows has none of these flags but O_BINARY.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class NotRegularError(OSError):
    """A name does not belong to a regular file, or belongs to one in another folder."""


def open_regular(root: str | Path, name: str) -> BinaryIO:
    """Open the regular file `name` inside the folder `root`; `root` itself can be a link.

    A link is followed only to a regular file inside the same folder. Named pipes, devices, sockets and folders are refused
    without opening them, so that reading ends after the length of the file.

    Raises:
        NotRegularError: There is no regular file of this name in the folder.
        OSError: The file cannot be opened.
    """
    top = os.path.realpath(root)
    path = os.path.realpath(os.path.join(top, name))  # noqa: PTH118  (Path would normalise `name`)
    if not path.startswith(top.rstrip(os.sep) + os.sep):
        raise NotRegularError(errno.EPERM, "is a link out of its folder; copy the file itself there")
    _check_regular(os.lstat(path).st_mode)
    handle = os.open(path, _FLAGS)
    try:
        _check_regular(os.fstat(handle).st_mode)  # again, because it can have been replaced since
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def names_below(root: Path) -> Iterator[str]:
    """Yield the relative names, with slashes, of all files below a folder, and of empty folders with a slash at the end.

    Links to folders are not followed: their own name is yielded.

    Raises:
        OSError: A folder cannot be read.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        empty = True
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                empty = False
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name
        if empty and prefix:
            yield prefix


@contextmanager
def atomic_write(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Give a temporary path in the same folder, which replaces `path` if the block ends without an exception.

    After an exception the temporary file is removed and `path` is as it was. A killed process can leave the temporary
    file.

    Args:
        path: The file to write. Its folder must exist when the block writes.
        concurrent: Whether other threads or processes can write `path` at the same time. The name of the temporary file
            is then unique. Otherwise it is always the same, so that the next write replaces one that was left.

    Yields:
        The temporary path. Its suffix is always .partial: name the format to libraries that choose it by the suffix.

    Raises:
        OSError: The file cannot be written or replaced.
    """
    partial = path.with_name(f".{uuid.uuid4().hex if concurrent else path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file completely or not at all. Missing folders are made.

    Raises:
        StorageError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, concurrent=True) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None


def try_lock(path: Path) -> FileLock | None:
    """Lock a file until `release` is called on the lock or this process ends, however it ends.

    The file is made if it is missing, and stays. A link in its place is not followed.

    Args:
        path: The lock file. Its folder must exist.

    Returns:
        The lock, or None if another process, or another lock of this process, holds it.

    Raises:
        OSError: The file cannot be opened, or its file system has no locks.
    """
    # Not thread_local: another thread can release it. The fallback is a lock that would not end with the process.
    lock = FileLock(path, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        return None
    return lock


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise NotRegularError(errno.EINVAL, f"is {kind}, not a regular file")
