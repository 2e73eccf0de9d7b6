"""Storage of a dataset: a local folder or an fsspec URL. Files are written completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
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
_TEMPORARY = f"dermis-{_WRITING}"  # in the folder of temporary files
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
# Not botocore's CredentialRetrievalError: the service that issues credentials to machines and pods did not answer.
_FINAL_NAMES = re.compile("Credential(?!Retrieval)|Authenti|Validation|Profile|Region")
# botocore and aiobotocore have no class for this answer of that service, which they raise as a RuntimeError.
_EXPIRED_CREDENTIALS = "refreshed credentials are still expired"
# S3 accepts signatures of the last 15 minutes; other storages have shorter limits.
_CLOCK_DIFFERENCE_SECONDS = 240.0
# Drivers read this much ahead and keep it until the next block has arrived. s3fs's default of 50 MiB would be up to 100 MiB for
# each open file, also for a few bytes of it. Requests for smaller blocks would take longer than the transfer of their bytes.
_BLOCK_BYTES = 4 << 20
_REMOVALS = 5  # attempts to remove a local folder
_DELETED_AT_ONCE = 1000  # the most that one request to S3 may delete


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
        # s3fs asks for sizes and folders that are not needed here. Each request to S3 takes some milliseconds of a processor.
        self._is_s3 = hasattr(self._fs, "call_s3")
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
            root = self._fs._strip_protocol(self._root).strip("/") + "/"
            paths = (path.lstrip("/") for path in self._files_below(self._root))
            # Some object storages list a folder as a file of its own name.
            return sorted(path.removeprefix(root) for path in paths if path.rstrip("/") != root.rstrip("/"))

    def _files_below(self, path: str) -> dict[str, dict[str, Any]]:
        """Return what the driver knows of each file below a path."""
        self._fs.invalidate_cache()
        try:
            if not self._is_s3:
                self._fs.info(path)  # `exists` would also be False if the storage cannot be reached
            files: dict[str, dict[str, Any]] = self._fs.find(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return files

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if there is no such file."""
        with self.errors(name):
            path = self._current_path(name)
            try:
                if self._is_s3:  # where `info` finds no file, it also looks for a folder
                    bucket, key, _ = self._fs.split_path(path)
                    return int(self._fs.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])
                info: dict[str, Any] = self._fs.info(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(info["size"]) if info["type"] == "file" else None

    def total_bytes(self) -> int:
        """Return the size of all files together."""
        with storage_errors(self.location, remote=not self.local):
            return sum(int(info["size"]) for info in self._files_below(self._root).values())

    @contextmanager
    def open(self, name: str, *, size: int | None = None) -> Iterator[IO[bytes]]:
        """Open a file for reading and seeking. In a local folder only regular files of that folder are opened.

        Args:
            name: The file.
            size: Its size in bytes, if the caller knows it. A small file is then read with a single request to S3.
        """
        with self.errors(name):
            if self.local:
                file = open_regular(self._root, name)
            elif self._is_s3 and size is not None and size <= _BLOCK_BYTES:
                file = io.BytesIO(self._content(self._path(name), size))
            else:
                file = self._fs.open(self._current_path(name), "rb", block_size=_BLOCK_BYTES)
        with file:
            yield file

    def _content(self, path: str, most: int | None) -> bytes:
        """Return the content of a file in S3, or its first `most` bytes and one more."""
        try:
            data: bytes = self._fs.cat_file(path, start=0, end=None if most is None else most + 1)
        except OSError as error:
            if _http_status(error.__cause__ or error) != 416:
                raise
            return b""  # it is empty, so no byte of it can be asked for
        return data

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """Read a small file.

        Raises:
            StorageError: The file cannot be read, or is larger than `limit` bytes.
        """
        data = self.read_if_exists(name, limit=limit)
        if data is None:
            raise StorageError(f"{self.where(name)}: {os.strerror(errno.ENOENT)}")
        return data

    def read_if_exists(self, name: str, *, limit: int | None = None) -> bytes | None:
        """Read a small file; None if there is no such file.

        Raises:
            StorageError: The file cannot be read, or is larger than `limit` bytes.
        """
        try:
            with self.errors(name):
                if self._is_s3:
                    data = self._content(self._path(name), limit)
                else:
                    with Store.open(self, name) as file:  # subclasses count each `open` that fails as an error
                        data = file.read() if limit is None else file.read(limit + 1)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise
        if limit is not None and len(data) > limit:
            raise StorageError(f"{self.where(name)}: is larger than allowed ({limit:,} bytes)")
        return data

    def sha256(self, name: str, *, size: int | None = None) -> str:
        """Return the SHA-256 (hex) of a file. The size is that of `open`."""
        with self.errors(name), self.open(name, size=size) as file:
            return hash_file(file)

    @contextmanager
    def writing(self, name: str, check: Callable[[], None] | None = None, *, staged: bool = False) -> Iterator[Path]:
        """Give a local path to write to, which becomes the file `name` if the block ends without an exception.

        A local file is renamed. For other storage it is uploaded from the temporary folder (`tempfile.gettempdir()`),
        which needs enough space for it.

        Args:
            name: The file.
            check: Called before each attempt to rename or upload the file. An exception of it ends the writing.
            staged: Whether a file in S3 is first uploaded to the folder `PARTIAL`, and copied from there after `check`. So an
                upload that is late, perhaps by hours, replaces nothing once another process has removed that folder, as the
                last step of a dataset.

        Raises:
            StorageError: The file cannot be written.
            Exception: Those of `check`.
        """
        if not self.local:
            place = tempfile.gettempdir()
            with storage_errors(place):
                # Each killed part of a dataset leaves a file as large as a shard, or as all images.
                _remove_abandoned(Path(place), _TEMPORARY)
                handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY)
                os.close(handle)
        else:
            place = self.where(name)
            temporary = self._path(f"{PARTIAL}/{_WRITING}{uuid.uuid4().hex}")
            with storage_errors(place):
                Path(temporary).parent.mkdir(parents=True, exist_ok=True)
        created = False
        try:
            with _in_use(Path(temporary), place, new=self.local):
                created = True
                yield Path(temporary)
                self._put(Path(temporary), name, check, staged)
        except (StorageError, FileNotFoundError) as error:
            with storage_errors(place):  # the folder may not be reached at the moment
                is_gone = created and not Path(temporary).exists()
            if is_gone:
                raise self._removed_elsewhere(name) from error
            raise
        finally:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)

    def remove_abandoned(self) -> None:
        """Remove what processes that were killed have left of `writing` in a local folder, and nothing that is being written.

        Where processes cannot see each other's locks, a file in use can be removed. `writing` then fails in such a way that it
        is tried again. For other storage each `writing` does the same in the temporary folder.
        """
        if self.local:
            with storage_errors(self.location):
                _remove_abandoned(Path(self._path(PARTIAL)), _WRITING)

    def _put(self, temporary: Path, name: str, check: Callable[[], None] | None, staged: bool) -> None:
        """Move or upload a local file to `name`. The arguments are those of `writing`."""
        if staged and self._is_s3:
            self._put_staged(temporary, name, check)
            return
        if check is not None:
            check()
        with self.errors(name):
            if self.local:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())  # so that a power failure cannot leave the name without the content
                temporary.replace(self._path(name))
            else:
                self._fs.put_file(str(temporary), self._path(name))

    def _put_staged(self, temporary: Path, name: str, check: Callable[[], None] | None) -> None:
        """Do the same by way of the folder `PARTIAL` in S3."""
        staged = self._path(f"{PARTIAL}/{_WRITING}{uuid.uuid4().hex}")
        with self.errors(name):
            self._fs.put_file(str(temporary), staged)
        try:
            if check is not None:
                check()
            try:
                with self.errors(name):
                    self._fs.cp_file(staged, self._path(name))
            except StorageError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise self._removed_elsewhere(name) from error
                raise
        finally:
            with suppress(Exception):  # of any driver; the last step of the dataset removes it as well
                self._fs.rm_file(staged)

    def _removed_elsewhere(self, name: str) -> StorageError:
        """Return the error for an unfinished file that another process has removed.

        It is not the end of a job: the other process may have ended it, or this one can write the file again.
        """
        message = f"{self.where(name)}: another process removed the unfinished file; try again"
        return StorageError(message, kind="storage-unavailable")

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
        if self.local:
            with self.errors(name), suppress(FileNotFoundError):
                for _ in range(_REMOVALS):  # one ends early if another process removes the same files
                    with suppress(FileNotFoundError):
                        self._fs.rm(self._path(name), recursive=True)
                    Path(self._path(name)).lstat()
                raise StorageError(
                    f"{self.where(name)}: is left after its deletion; try again", kind="storage-unavailable"
                )
            return
        with self.errors(name), suppress(FileNotFoundError):
            left = []
            if self._is_s3:
                # Some storages have an object for a folder. It is no error if there is none of this name.
                paths = [*(self._files_below(self._path(name)).keys() - {self._path(name)}), self._path(name)]
                self.abort_uploads(name)
                for first in range(0, len(paths), _DELETED_AT_ONCE):
                    left += self._delete_objects(paths[first : first + _DELETED_AT_ONCE])
            else:
                self._fs.rm(self._current_path(name), recursive=True)
                left = [path for path, info in self._files_below(self._path(name)).items() if info["type"] == "file"]
            if left:
                raise StorageError(
                    f"{self.where(name)}: {len(left):,} objects are left after their deletion ({left[0]}); the account needs "
                    "the permission to delete; try again",
                    kind="storage-unavailable",
                )

    def abort_uploads(self, name: str = "") -> None:
        """Abort the uploads in parts of a file in S3, or below a folder, that killed processes have left.

        S3 keeps their parts, which no listing of files shows. A process whose upload still runs repeats it. Nothing fails if
        this does: some storages and permissions do not allow it, and a lifecycle rule of the bucket does the same.
        """
        if not self._is_s3:
            return
        bucket, key, _ = self._fs.split_path(self._path(name).rstrip("/"))
        uploads: list[dict[str, str]] = []
        with suppress(Exception):
            after: dict[str, str] = {}
            while True:
                page = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key, **after)
                uploads += page.get("Uploads", [])
                last, after = after, {each: page.get(f"Next{each}", "") for each in ("KeyMarker", "UploadIdMarker")}
                if not page.get("IsTruncated") or after == last:
                    break
        for upload in uploads:
            if f"{upload['Key']}/".startswith(f"{key}/"):
                with suppress(Exception):
                    self._fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _delete_objects(self, paths: Sequence[str]) -> list[str]:
        """Delete objects in S3, and return the reason for each that is left. S3 answers 200 too then, and s3fs ignores it."""
        bucket, _, _ = self._fs.split_path(paths[0])
        objects = [{"Key": self._fs.split_path(path)[1]} for path in paths]
        answer = self._fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": objects, "Quiet": True})
        return [str(error.get("Message") or error.get("Code")) for error in answer.get("Errors", [])]

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

    def check(self) -> None:
        """Find out by one request whether a bucket of S3 can be reached, with these credentials. Other storage is not checked.

        Raises:
            StorageError: It cannot, or the bucket does not exist.
        """
        if self._is_s3:
            with self.errors(""):
                bucket, prefix, _ = self._fs.split_path(self._root)
                self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)

    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None if it is not known (object storage)."""
        if not self.local:
            return None
        folder = Path(self._root)
        with storage_errors(self.location):
            while True:
                try:
                    return shutil.disk_usage(folder).free
                except (FileNotFoundError, NotADirectoryError):  # it is made later
                    if folder == folder.parent:
                        raise
                    folder = folder.parent


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the files of a folder with this prefix that no process has locked, but for new ones."""
    if sys.platform == "win32":
        return
    for path in folder.glob(f"{prefix}*"):
        with suppress(OSError):  # such as that of a lock, or of a file of another user
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                with path.open("r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()


@contextmanager
def _in_use(path: Path, place: str, *, new: bool) -> Iterator[None]:
    """Lock a file, so that `_remove_abandoned` leaves it. The system ends the lock of a killed process.

    Args:
        path: The file.
        place: Path or URL, for messages.
        new: Whether the file does not exist yet, and is created.
    """
    if sys.platform == "win32":
        yield
        return
    with storage_errors(place):
        file = path.open("xb" if new else "r+b")
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
    lost_upload = _error_code(error) == "NoSuchUpload"  # s3fs: FileNotFoundError; the whole file can be uploaded again
    if isinstance(error, _FINAL_TYPES) and not lost_upload:
        return StorageError(f"{place}: {text}")
    if lost_upload or isinstance(error, ConnectionError | TimeoutError) or number in _TRANSIENT:
        transient = True
    elif isinstance(error, OSError):
        transient = remote and number in (None, errno.EIO)  # s3fs and others report unknown errors like this
    elif type(error).__module__ == "builtins":
        if _EXPIRED_CREDENTIALS not in text:
            return None
        transient = True
    elif status is not None:
        transient = status >= 500 or status in _TRANSIENT_STATUSES
    else:
        transient = _FINAL_NAMES.search(type(error).__name__) is None
    if transient:
        return StorageError(f"{place}: cannot be reached at the moment ({text})", kind="storage-unavailable")
    return StorageError(f"{place}: {text}")


def _http_status(error: BaseException) -> int | None:
    """Return the HTTP status in an exception of a driver, if it has one."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        return _status(response.get("HTTPStatusCode")) if isinstance(response, dict) else None
    candidates = [
        getattr(source, name, None) for source in (error, response) for name in ("status", "status_code", "code")
    ]
    return next((status for status in map(_status, candidates) if status is not None), None)


def _error_code(error: BaseException) -> str | None:
    """Return the code of S3 in an exception of s3fs or botocore, if it has one."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        details = response.get("Error") if isinstance(response, dict) else None
        if isinstance(details, dict):
            return str(details.get("Code"))
    return None


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
