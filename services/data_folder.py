"""Restrict the data folder to the service's account, and check that the packages of the storage are installed.

It contains data of real people: images to be projected, results, the jobs database.
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
_OWN_FOLDERS = ("datasets", "workers", "run", "cache")
_DATABASES = "*.sqlite*"


def restrict_new_files() -> None:
    """Set the umask, so that other accounts cannot read new files and folders of this process and its children."""
    os.umask(0o077)


def prepare_data_folder(settings: Settings) -> None:
    """Create the data folder, correct the modes of files of an earlier version, and check the storage.

    Raises:
        SettingsError: The service cannot work with these settings.
    """
    folder = settings.data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_mode & stat.S_ISVTX:
            raise SettingsError(f"DERMIS_DATA_DIR: {folder} is shared by all accounts; choose a new folder inside it")
        if os.name == "posix":
            _restrict_modes(folder)
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


def _restrict_modes(folder: Path) -> None:
    """Set mode 0700 on the data folder and the service's folders in it, and 0600 on the service's files in them."""
    paths = [Path(os.path.realpath(folder)), *folder.glob(_DATABASES)]
    for name in _OWN_FOLDERS:
        for here, _, files in os.walk(os.path.realpath(folder / name)):
            paths += [Path(here), *(Path(here, file) for file in files)]
    open_to_others = [path for path in paths if not _restrict(path)]
    if open_to_others:  # such as a volume whose root folder belongs to the orchestrator
        fields = {"location": str(open_to_others[0]), "number": len(open_to_others)}
        logger.warning("other accounts can read files whose mode cannot be changed", extra=fields)


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
