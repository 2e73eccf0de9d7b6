"""Where a dataset lies: a local folder or an fsspec URL. A file is there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dermis.errors import StorageError
from dermis.files import names_below, open_regular

PARTIAL = ".partial"
"""Folder of everything that is gone once the dataset is complete."""


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

    @property
    def folder(self) -> Path | None:
        """The folder itself, if it is a local one."""
        return Path(self._root) if self.local else None

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def entries(self) -> list[str]:
        """Relative names of all files below, sorted; of empty folders too, with a slash at the end."""
        with storage_errors(self.location):
            if self.local:
                return sorted(names_below(Path(self._root))) if Path(self._root).is_dir() else []
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return []
            root = self._fs._strip_protocol(self._root).rstrip("/") + "/"
            return sorted(path.removeprefix(root) for path in self._fs.find(self._root))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        with storage_errors(self.where(name)):
            try:
                info: dict[str, Any] = self._fs.info(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return int(info["size"]) if info["type"] == "file" else None

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Read a file; it can seek. In a local folder only regular files of that folder are opened."""
        with storage_errors(self.where(name)):
            file = open_regular(self._root, name) if self.local else self._fs.open(self._path(name), "rb")
        with file:
            yield file

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """All bytes of a small file. StorageError if there are more than `limit`."""
        with storage_errors(self.where(name)), self.open(name) as file:
            data: bytes = file.read() if limit is None else file.read(limit + 1)
        if limit is not None and len(data) > limit:
            raise StorageError(f"{self.where(name)}: is larger than it may be ({limit:,} bytes)")
        return data

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, hex."""
        with storage_errors(self.where(name)), self.open(name) as file:
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
            with storage_errors(self.where(name)):
                if self.local:
                    with Path(temporary).open("rb") as file:
                        os.fsync(file.fileno())  # so that a power cut cannot leave the name without the bytes
                    Path(temporary).replace(self._path(name))
                else:
                    self._fs.put_file(temporary, self._path(name))
        finally:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.writing(name) as path, storage_errors(self.where(name)):
            path.write_bytes(data)

    def remove(self, name: str) -> None:
        """Remove a file or a whole folder, if it is there."""
        with storage_errors(self.where(name)), suppress(FileNotFoundError):
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
def storage_errors(place: str, *, only_full: bool = False) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the place and says what to do.

    `only_full` leaves all but a full disk as they are, for blocks that also run code of others.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{place}: no space left; free some and try again"
            raise StorageError(message, kind="storage-full") from error
        if only_full:
            raise
        raise StorageError(f"{place}: {error.strerror or error}") from error


def hash_file(file: IO[bytes]) -> str:
    """SHA-256 of an open file, hex."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
