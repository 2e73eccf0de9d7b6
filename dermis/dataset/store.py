"""Where a dataset lies: a local folder or an fsspec URL. A file is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dermis.errors import DermisError, StorageError
from dermis.files import names_below, open_regular

PARTIAL = ".partial"
"""Folder of everything that is gone once the dataset is complete."""

_FULL = {errno.ENOSPC, errno.EDQUOT}
# A network file system that is away, a server that is restarting, too many open files, a folder that somebody writes into while
# it is removed: the same call may succeed later.
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


class Store:
    """A folder named by a local path or by a URL that fsspec understands (`s3://bucket/prefix`, `memory://name`)."""

    def __init__(self, location: str | Path) -> None:
        """StorageError if the URL names a protocol that is not installed."""
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
        """A file's place, for messages."""
        return f"{self.location.rstrip('/')}/{name}"

    def errors(self, name: str) -> AbstractContextManager[None]:
        """Turn what the storage raises about the file `name` into a StorageError, whatever classes its driver has."""
        return storage_errors(self.where(name), remote=not self.local)

    @property
    def folder(self) -> Path | None:
        """The folder itself, if it is a local one."""
        return Path(self._root) if self.local else None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def entries(self) -> list[str]:
        """Relative names of all files below, sorted; of empty folders too, with a slash at the end."""
        with storage_errors(self.location, remote=not self.local):
            if self.local:
                return sorted(names_below(Path(self._root))) if Path(self._root).is_dir() else []
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return []
            root = self._fs._strip_protocol(self._root).rstrip("/") + "/"
            return sorted(path.removeprefix(root) for path in self._fs.find(self._root))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        with self.errors(name):
            try:
                info: dict[str, Any] = self._fs.info(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(info["size"]) if info["type"] == "file" else None

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Read a file; it can seek. In a local folder only regular files of that folder are opened."""
        with self.errors(name):
            file = open_regular(self._root, name) if self.local else self._fs.open(self._path(name), "rb")
        with file:
            yield file

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """All bytes of a small file. StorageError if there are more than `limit`."""
        with self.errors(name), self.open(name) as file:
            data: bytes = file.read() if limit is None else file.read(limit + 1)
        if limit is not None and len(data) > limit:
            raise StorageError(f"{self.where(name)}: is larger than it may be ({limit:,} bytes)")
        return data

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, hex."""
        with self.errors(name), self.open(name) as file:
            return hash_file(file)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A local path to write to; what lies there becomes the file `name` if the block ends without an exception.

        Locally that is a rename; for other storage the file is uploaded, so that it takes as much temporary space
        (`tempfile.gettempdir()`; the service has a private one) as it is large.
        """
        if not self.local:
            with storage_errors(tempfile.gettempdir()):
                handle, temporary = tempfile.mkstemp(prefix="dermis-")
                os.close(handle)
        else:
            temporary = self._path(f"{PARTIAL}/writing-{uuid.uuid4().hex}")
            with storage_errors(self.where(name)):
                Path(temporary).parent.mkdir(parents=True, exist_ok=True)
        try:
            yield Path(temporary)
            self._put(Path(temporary), name)
        finally:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)

    def _put(self, temporary: Path, name: str) -> None:
        """Make a local file the file `name`."""
        with self.errors(name):
            if self.local:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())  # so that a power cut cannot leave the name without the bytes
                temporary.replace(self._path(name))
            else:
                self._fs.put_file(str(temporary), self._path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a small file. Unlike `writing` it needs no temporary file where the storage is not a local folder."""
        if not self.local:
            with self.errors(name):
                self._fs.pipe_file(self._path(name), data)
            return
        with self.writing(name) as path, self.errors(name):
            path.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder, if it is there."""
        with self.errors(name), suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def free_bytes(self) -> int | None:
        """Free space for files here; None where nobody can tell (object storage)."""
        if not self.local:
            return None
        folder = Path(self._root)
        while not folder.exists():
            folder = folder.parent
        with storage_errors(self.location):
            return shutil.disk_usage(folder).free


@contextmanager
def storage_errors(place: str, *, only_full: bool = False, remote: bool = False) -> Iterator[None]:
    """Turn what a storage raises into a StorageError that names the place and says what to do.

    `only_full` leaves all but a full disk as they are, for blocks that also run code of others. `remote` is for storage that
    is not a local folder: its drivers have error classes of their own.
    """
    try:
        yield
    except Exception as error:
        problem = storage_error(error, place, remote=remote)
        if problem is None or (only_full and problem.kind != "storage-full"):
            raise
        raise problem from error


def storage_error(error: Exception, place: str, *, remote: bool) -> StorageError | None:
    """The StorageError for an exception about `place`; None if it does not come from the storage."""
    if isinstance(error, DermisError) or (not isinstance(error, OSError) and not remote):
        return None
    number = error.errno if isinstance(error, OSError) else None
    status = _http_status(error)
    if number in _FULL or status == 507:
        return StorageError(f"{place}: no space left; free some and try again", kind="storage-full")
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    if isinstance(error, _FINAL_TYPES):
        return StorageError(f"{place}: {text}")
    if isinstance(error, ConnectionError | TimeoutError) or number in _TRANSIENT:
        transient = True
    elif isinstance(error, OSError):
        transient = remote and number in (None, errno.EIO)  # how s3fs and others pass on what they do not know
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
    """The HTTP status that a driver's exception carries, wherever its library puts it."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        return _status(response.get("HTTPStatusCode")) if isinstance(response, dict) else None
    candidates = [
        getattr(source, name, None) for source in (error, response) for name in ("status", "status_code", "code")
    ]
    return next((status for status in map(_status, candidates) if status is not None), None)


def _status(value: object) -> int | None:
    try:
        number = int(str(value))
    except ValueError:
        return None
    return number if 400 <= number < 600 else None


def hash_file(file: IO[bytes]) -> str:
    """SHA-256 of an open file, hex."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
