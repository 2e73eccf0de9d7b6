"""A private folder for the files of one start of the service: its sockets and everything temporary.

It lies under the data folder, belongs to this account alone (mode 0700), and is removed when the service ends. What a killed
service has left is removed at the next start: its lock is free then.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from dermis.files import try_lock
from services.settings import SettingsError

_PREFIX = "start-"
_FAR_PREFIX = "dermis-sockets-"
_LOCK = "lock"
_SOCKETS = "sockets"
_MAX_SOCKET_PATH = 100  # operating systems allow 103 to 107 bytes


@dataclass(frozen=True)
class Scratch:
    """Folders of one start of the service; nobody else can enter them."""

    folder: Path
    sockets: Path  # short enough for the path of a Unix socket
    temporary: Path


@contextmanager
def scratch_folder(data_dir: Path) -> Iterator[Scratch]:
    """Make the folders of this start, after those of killed services have been removed.

    Args:
        data_dir: The data folder of the service; it is made if it is missing.

    Raises:
        SettingsError: No Unix socket can be made, neither in the data folder nor in the temporary folder.
        OSError: The data folder cannot be written.
    """
    runs = data_dir.absolute() / "run"
    runs.mkdir(parents=True, exist_ok=True)
    runs.chmod(0o700)
    with FileLock(runs / ".lock", fallback_to_soft=False):  # another start may be making its folder
        _remove_stale(runs)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=runs))
        lock = FileLock(folder / _LOCK, thread_local=False, fallback_to_soft=False)
        lock.acquire()
    try:
        (folder / "tmp").mkdir(mode=0o700)
        yield Scratch(folder, _make_sockets_folder(folder), folder / "tmp")
    finally:
        _remove(folder)
        lock.release()


def _make_sockets_folder(folder: Path) -> Path:
    """`folder`/sockets, or a link there to a private folder with a shorter path."""
    near = folder / _SOCKETS
    near.mkdir(mode=0o700)
    if _takes_sockets(near):
        return near
    near.rmdir()
    far = Path(tempfile.mkdtemp(prefix=_FAR_PREFIX))
    near.symlink_to(far)
    if not _takes_sockets(far):
        raise SettingsError(
            f"DERMIS_DATA_DIR: no Unix socket can be made in {folder} (a long path, or a file system without them) nor in "
            f"{far.parent}; choose another data folder"
        )
    return far


def _takes_sockets(folder: Path) -> bool:
    path = folder / "probe"
    if len(os.fsencode(path)) + 10 > _MAX_SOCKET_PATH:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path))
        path.unlink()
    except OSError:
        return False
    return True


def _remove_stale(runs: Path) -> None:
    for folder in runs.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # the folder has just been removed
            lock = try_lock(folder / _LOCK)
            if lock is not None:  # the service that made it has ended
                _remove(folder)
                lock.release()


def _remove(folder: Path) -> None:
    link = folder / _SOCKETS
    if link.is_symlink():
        far = link.readlink()
        with suppress(OSError):
            if far.name.startswith(_FAR_PREFIX) and not far.is_symlink() and far.stat().st_uid == os.getuid():
                shutil.rmtree(far, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
