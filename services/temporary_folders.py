"""A private folder for the temporary files and the sockets of one start of the service.

It is inside the data folder, only this account can access it (mode 0700), and it is removed when the service ends. The folder
of a killed service is removed at the next start, because its lock is free then.
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
_SHORT_PATH_PREFIX = "dermis-sockets-"
_LOCK = "lock"
_SOCKETS = "sockets"
_MAX_SOCKET_PATH = 100  # operating systems allow 103 to 107 bytes


@dataclass(frozen=True)
class TemporaryFolders:
    """Folders of one start of the service; only this account can access them."""

    folder: Path
    sockets: Path  # short enough for the path of a Unix socket
    temporary: Path


@contextmanager
def temporary_folders(data_dir: Path) -> Iterator[TemporaryFolders]:
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
        yield TemporaryFolders(folder, _make_sockets_folder(folder), folder / "tmp")
    finally:
        _remove(folder)
        lock.release()


def _make_sockets_folder(folder: Path) -> Path:
    """`folder`/sockets, or a link there to a private folder with a shorter path."""
    inside = folder / _SOCKETS
    inside.mkdir(mode=0o700)
    if _supports_sockets(inside):
        return inside
    inside.rmdir()
    short_path = Path(tempfile.mkdtemp(prefix=_SHORT_PATH_PREFIX))
    inside.symlink_to(short_path)
    if not _supports_sockets(short_path):
        raise SettingsError(
            f"DERMIS_DATA_DIR: no Unix socket can be made in {folder} (a long path, or a file system without them) nor in "
            f"{short_path.parent}; choose another data folder"
        )
    return short_path


def _supports_sockets(folder: Path) -> bool:
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
        short_path = link.readlink()
        with suppress(OSError):
            if (
                short_path.name.startswith(_SHORT_PATH_PREFIX)
                and not short_path.is_symlink()
                and short_path.stat().st_uid == os.getuid()
            ):
                shutil.rmtree(short_path, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
