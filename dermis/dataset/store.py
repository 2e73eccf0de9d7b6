"""Storage of a dataset: a local folder or an fsspec URL. Files are written completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

from dermis.errors import DermisError, StorageError
from dermis.files import names_below, open_regular

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"
"""The file that is written last: a folder with it is a finished dataset."""
PARTIAL = ".partial"
"""Folder of the files that are removed when the dataset is complete."""

_WRITING = "writing-"
# More than the time between the creation of a temporary file and its lock.
_ABANDONED_SECONDS = 60.0

_FULL = {errno.ENOSPC, errno.EDQUOT}
# A network file system that cannot be reached, a server that restarts, too many open files, a folder that gets new files
# while it is removed: the same call can succeed later.
_TRANSIENT = {
    number
    for number, name in errno.errorcode.items()
    if re.fullmatch(
        "EAGAIN|EBUSY|EINTR|EMFILE|ENFILE|ENETDOWN|ENETRESET|ENETUNREACH|ENOTCONN|ESHUTDOWN|EHOSTDOWN|EHOSTUNREACH|ESTALE|"
        "EREMOTEIO|ECOMM|ENOTEMPTY|ECONNABORTED|ECONNREFUSED|ECONNRESET|EPIPE|ETIMEDOUT",
        name,
    )
}
_FINAL_TYPES = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# HTTP statuses below 500 that mean "try again".
_TRANSIENT_STATUSES = {408, 409, 425, 429}
_FINAL_NAMES = re.compile("Credential|Authenti|Validation|Profile|Region")
# S3 accepts signatures of the last 15 minutes; other storages have shorter limits.
_CLOCK_DIFFERENCE_SECONDS = 240.0
# Drivers read this much ahead and keep it until the next block has arrived. s3fs's default of 50 MiB would be up to 100 MiB for
# each open file, also for a few bytes of it. Requests for smaller blocks would take longer than the transfer of their bytes.
_BLOCK_BYTES = 4 << 20


class Store:
    """A folder to store a dataset in.

    Args:
        location: A local path, or a URL that fsspec knows (`s3://bucket/prefix`, `memory://name`).

    Raises:
        StorageError: The protocol of the URL is not installed.
    """

    def __init__(self, location: str | Path) -> None:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.location = str(location)
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.location)
        except (ImportError, ValueError) as error:
            raise StorageError(f"{self.location}: {error}") from error
        self.local = isinstance(self._fs, LocalFileSystem)  # also if named by a file:// URL
        if "://" not in self.location:
            self._root = str(Path(location).absolute())

    def where(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""
        return f"{self.location.rstrip('/')}/{name}"

    def errors(self, name: str) -> AbstractContextManager[None]:
        """Turn exceptions of the storage about the file `name` into StorageErrors."""
        return storage_errors(self.where(name), remote=not self.local)

    @property
    def folder(self) -> Path | None:
        """The folder, if it is local."""
        return Path(self._root) if self.local else None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _current_path(self, name: str) -> str:
        """Return the path of a file, after the driver's listings of its folders are dropped.

        Other processes write to the same storage. A listing that the driver keeps would hide their files and state old sizes.
        """
        path = self._path(name)
        if not self.local:
            self._fs.invalidate_cache(path)
        return path

    def entries(self) -> list[str]:
        """Return the relative names of all files, sorted. Names of empty folders are included, with a slash at the end."""
        with storage_errors(self.location, remote=not self.local):
            if self.local:
                while Path(self._root).is_dir():
                    with suppress(FileNotFoundError):  # another process is removing folders: look again
                        return sorted(names_below(Path(self._root)))
                return []
            self._fs.invalidate_cache()
            if not self._root_exists():
                return []
            root = self._fs._strip_protocol(self._root).strip("/") + "/"
            found = (path.lstrip("/") for path in self._fs.find(self._root))
            # Some object storages list a folder as a file of its own name.
            return sorted(path.removeprefix(root) for path in found if path.rstrip("/") != root.rstrip("/"))

    def _root_exists(self) -> bool:
        """Return whether the folder exists. `exists` of fsspec would return False if the storage cannot be reached."""
        try:
            self._fs.info(self._root)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if there is no such file."""
        with self.errors(name):
            try:
                info: dict[str, Any] = self._fs.info(self._current_path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(info["size"]) if info["type"] == "file" else None

    def total_bytes(self) -> int:
        """Return the size of all files together."""
        with storage_errors(self.location, remote=not self.local):
            if not self.local:
                self._fs.invalidate_cache()
            if not self._root_exists():
                return 0
            return sum(int(info["size"]) for info in self._fs.find(self._root, detail=True).values())

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for reading and seeking. In a local folder only regular files of that folder are opened."""
        with self.errors(name):
            if self.local:
                file = open_regular(self._root, name)
            else:
                file = self._fs.open(self._current_path(name), "rb", block_size=_BLOCK_BYTES)
        with file:
            yield file

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """Read a small file.

        Raises:
            StorageError: The file cannot be read, or is larger than `limit` bytes.
        """
        with self.errors(name), self.open(name) as file:
            data: bytes = file.read() if limit is None else file.read(limit + 1)
        if limit is not None and len(data) > limit:
            raise StorageError(f"{self.where(name)}: is larger than allowed ({limit:,} bytes)")
        return data

    def sha256(self, name: str) -> str:
        """Return the SHA-256 (hex) of a file."""
        with self.errors(name), self.open(name) as file:
            return hash_file(file)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a local path to write to, which becomes the file `name` if the block ends without an exception.

        A local file is renamed. For other storage it is uploaded from the temporary folder (`tempfile.gettempdir()`),
        which needs enough space for it.

        Raises:
            StorageError: The file cannot be written.
        """
        if not self.local:
            with storage_errors(tempfile.gettempdir()):
                handle, temporary = tempfile.mkstemp(prefix="dermis-")
                os.close(handle)
        else:
            temporary = self._path(f"{PARTIAL}/{_WRITING}{uuid.uuid4().hex}")
            with storage_errors(self.where(name)):
                Path(temporary).parent.mkdir(parents=True, exist_ok=True)
        created = False
        try:
            with _in_use(Path(temporary), self.where(name)) if self.local else nullcontext():
                created = True
                yield Path(temporary)
                self._put(Path(temporary), name)
        except (StorageError, FileNotFoundError) as error:
            if self.local and created and not Path(temporary).exists():
                # Not the end of a job: the other process may have ended it, or this one can write the file again.
                raise StorageError(
                    f"{self.where(name)}: another process removed the unfinished file; try again",
                    kind="storage-unavailable",
                ) from error
            raise
        finally:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)

    def remove_abandoned(self) -> None:
        """Remove what processes that were killed have left of `writing` in a local folder, and nothing that is being written.

        Where processes cannot see each other's locks, a file in use can be removed. `writing` then fails in such a way that it
        is tried again.
        """
        if not self.local or sys.platform == "win32":
            return
        for path in Path(self._path(PARTIAL)).glob(f"{_WRITING}*"):
            with suppress(OSError):  # such as that of a lock
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    with path.open("r+b") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()

    def _put(self, temporary: Path, name: str) -> None:
        """Move or upload a local file to `name`."""
        with self.errors(name):
            if self.local:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())  # so that a power failure cannot leave the name without the content
                temporary.replace(self._path(name))
            else:
                self._fs.put_file(str(temporary), self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file. Unlike `writing` it needs no temporary file for storage that is not local."""
        if not self.local:
            with self.errors(name):
                self._fs.pipe_file(self._path(name), data)
            return
        with self.writing(name) as path, self.errors(name):
            path.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists.

        Raises:
            StorageError: Something is left, or the storage cannot be reached.
        """
        with self.errors(name), suppress(FileNotFoundError):
            self._fs.rm(self._current_path(name), recursive=True)
            if self.local:
                return
            # S3 answers 200 and a list of the objects that it has not deleted, which s3fs ignores.
            found = self._fs.find(self._current_path(name), detail=True).values()
            left = sum(info["type"] == "file" for info in found)  # SeaweedFS keeps the folder itself
            if left:
                raise StorageError(
                    f"{self.where(name)}: {left:,} objects are left after their deletion; the account needs the permission to "
                    "delete; try again",
                    kind="storage-unavailable",
                )

    def signed_url(self, name: str, seconds: int, *, media_type: str, disposition: str) -> str:
        """Return a URL with which everyone can download a file from storage at s3:// for some time.

        Args:
            name: The file.
            seconds: Time for which the URL is valid.
            media_type: Content-Type of the download.
            disposition: Content-Disposition of the download.

        Raises:
            StorageError: The storage cannot be reached.
        """
        import fsspec

        with self.errors(name):
            # Without this the URL has a signature of version 2 at some endpoints, which many storages refuse.
            signing = fsspec.filesystem("s3", config_kwargs={"signature_version": "s3v4"})
            url: str = signing.sign(
                self._path(name),
                expiration=seconds,
                ResponseContentType=media_type,
                ResponseContentDisposition=disposition,
            )
            return url

    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None if it is not known (object storage)."""
        if not self.local:
            return None
        folder = Path(self._root)
        while not folder.exists():
            folder = folder.parent
        with storage_errors(self.location):
            return shutil.disk_usage(folder).free


@contextmanager
def _in_use(path: Path, place: str) -> Iterator[None]:
    """Create a file and lock it, so that `Store.remove_abandoned` leaves it. The system ends the lock of a killed process."""
    if sys.platform == "win32":
        yield
        return
    with storage_errors(place):
        file = path.open("xb")
    with file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


@contextmanager
def storage_errors(place: str, *, only_full: bool = False, remote: bool = False) -> Iterator[None]:
    """Turn exceptions of a storage into StorageErrors.

    Args:
        place: Path or URL, for messages.
        only_full: Whether only errors about a full disk are turned, for blocks that also run other code.
        remote: Whether the storage is not a local folder. Drivers of such storage have exceptions of their own.
    """
    ahead = _clock_ahead_of_monotonic()
    try:
        yield
    except Exception as error:
        problem = storage_error(error, place, remote=remote, clock_change=_clock_ahead_of_monotonic() - ahead)
        if problem is None or (only_full and problem.kind != "storage-full"):
            raise
        raise problem from error


def storage_error(error: Exception, place: str, *, remote: bool, clock_change: float = 0.0) -> StorageError | None:
    """Return the StorageError for an exception about `place`; None if it does not come from the storage.

    Args:
        error: The exception.
        place: Path or URL, for messages.
        remote: Whether the storage is not a local folder.
        clock_change: Seconds by which the clock was changed during the call, which was signed before that.
    """
    if isinstance(error, DermisError) or (not isinstance(error, OSError) and not remote):
        return None
    number = error.errno if isinstance(error, OSError) else None
    status = _http_status(error)
    if number in _FULL or status == 507:
        return StorageError(f"{place}: no space left; free some and try again", kind="storage-full")
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    seconds = _clock_difference(error)
    if seconds is not None and max(abs(seconds), abs(seconds - clock_change)) > _CLOCK_DIFFERENCE_SECONDS:
        text = f"it refuses signatures, as the clock of this machine differs by {seconds:+.0f} s; correct the clock"
        if abs(seconds) <= _CLOCK_DIFFERENCE_SECONDS:
            text = "it refused a signature from before the clock of this machine was set"
        return StorageError(f"{place}: cannot be reached at the moment ({text})", kind="storage-unavailable")
    if isinstance(error, _FINAL_TYPES):
        return StorageError(f"{place}: {text}")
    if isinstance(error, ConnectionError | TimeoutError) or number in _TRANSIENT:
        transient = True
    elif isinstance(error, OSError):
        transient = remote and number in (None, errno.EIO)  # s3fs and others report unknown errors like this
    elif type(error).__module__ == "builtins":
        return None
    elif status is not None:
        transient = status >= 500 or status in _TRANSIENT_STATUSES
    else:
        transient = _FINAL_NAMES.search(type(error).__name__) is None
    if transient:
        return StorageError(f"{place}: cannot be reached at the moment ({text})", kind="storage-unavailable")
    return StorageError(f"{place}: {text}")


def _http_status(error: Exception) -> int | None:
    """Return the HTTP status in an exception of a driver, if it has one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        return _status(response.get("HTTPStatusCode")) if isinstance(response, dict) else None
    candidates = [
        getattr(source, name, None) for source in (error, response) for name in ("status", "status_code", "code")
    ]
    return next((status for status in map(_status, candidates) if status is not None), None)


def _clock_ahead_of_monotonic() -> float:
    """Return a number of seconds that changes only when the clock is set."""
    return time.time() - time.monotonic()


def _clock_difference(error: Exception) -> float | None:
    """Return the seconds by which the clock is ahead of that of an S3 storage that refused a request (403), if known."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        details = response.get("ResponseMetadata") if isinstance(response, dict) else None
        if isinstance(details, dict) and details.get("HTTPStatusCode") == 403:
            try:
                # A HEAD request has no other sign of it than this header.
                return time.time() - parsedate_to_datetime(details["HTTPHeaders"]["date"]).timestamp()
            except (KeyError, TypeError, ValueError):
                return None
    return None


def _status(value: object) -> int | None:
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if 400 <= number < 600 else None


def hash_file(file: IO[bytes]) -> str:
    """Return the SHA-256 (hex) of an open file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
