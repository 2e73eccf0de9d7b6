"""The data folder belongs to the service's account alone: modes of what is in it, and what must be installed for the storage.

Images of people pass through it: squares to be projected, results, the jobs database.
"""

from __future__ import annotations

import logging
import os
import stat
import uuid
from pathlib import Path

from dermis.dataset.store import Store
from dermis.errors import StorageError
from services.settings import Settings, SettingsError

logger = logging.getLogger("dermis.service")

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OURS = ("datasets", "workers", "run", "cache")
_DATABASES = "*.sqlite*"


def restrict_new_files() -> None:
    """From now on no other account can read or list what this process and those that it starts write."""
    os.umask(0o077)


def prepare_data_folder(settings: Settings) -> None:
    """Make the data folder, take from other accounts what an earlier version let them read, and look at the storage.

    SettingsError, in one line, if the service cannot work with these settings.
    """
    folder = settings.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & stat.S_ISVTX:
            raise SettingsError(
                f"DERMIS_DATA_DIR: {folder} is for files of all accounts; name a folder of its own in it"
            )
        if os.name == "posix":
            _take_from_others(folder)
        probe = folder / f".{uuid.uuid4().hex}"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise SettingsError(f"DERMIS_DATA_DIR: {folder} cannot be written: {error.strerror}") from None
    try:
        Store(settings.storage)
    except StorageError as error:
        scheme = settings.storage.partition("://")[0]
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(scheme)
        hint = f"; install it in the environment of the service: pip install {package}" if package else ""
        raise SettingsError(f"DERMIS_STORAGE_URL: {error}{hint}") from None


def _take_from_others(folder: Path) -> None:
    """Mode 0700 for folders and 0600 for files: of the data folder and of what the service keeps in it, not of strangers'."""
    paths = [Path(os.path.realpath(folder)), *folder.glob(_DATABASES)]
    for name in _OURS:
        for here, _, files in os.walk(os.path.realpath(folder / name)):
            paths += [Path(here), *(Path(here, file) for file in files)]
    open_to_others = [path for path in paths if not _restrict(path)]
    if open_to_others:  # as of a volume whose root belongs to the orchestrator
        told = {"location": str(open_to_others[0]), "number": len(open_to_others)}
        logger.warning("other accounts may read what this one cannot change the mode of", extra=told)


def _restrict(path: Path) -> bool:
    """Whether other accounts can no longer open `path`."""
    try:
        status = path.lstat()
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & _OTHERS:
            path.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS)
    except FileNotFoundError:  # another service on this folder removed it meanwhile
        return True
    except OSError:
        return False
    return True
