"""Files on disk: safe names, hashes, atomic writes, and downloads that can be resumed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

from dermis_client._untrusted import one_line
from dermis_client.errors import DownloadError, IntegrityError

_BLOCK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_O_BINARY: int = getattr(os, "O_BINARY", 0)


def is_safe_name(name: str) -> bool:
    """Return whether a name is a plain file name on every system: no folder, device, hidden file or trailing dot."""
    return bool(_NAME.fullmatch(name)) and not name.endswith(".") and not _DEVICE.fullmatch(name)


def check_names(names: Iterable[str], source: str) -> None:
    """Check file names that come from a service or a manifest.

    Args:
        names: The file names.
        source: Where they come from, for the error message.

    Raises:
        IntegrityError: A name is not safe to write, ends in .part, or occurs twice.
    """
    seen: set[str] = set()
    for name in names:
        if not is_safe_name(name) or name.endswith(".part"):
            raise IntegrityError(f"{source} names a file {one_line(repr(name), 120)}: not safe to write", name=name)
        if name.casefold() in seen:  # some file systems ignore case
            raise IntegrityError(f"{source} names the file {name} twice", name=name)
        seen.add(name.casefold())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(content: bytes, expected: str, label: str, name: str) -> None:
    """Compare received bytes with the SHA-256 that the service sent.

    Args:
        content: The received bytes.
        expected: SHA-256 in hex.
        label: The subject of the error message, such as "image 3".
        name: The `name` of the error.

    Raises:
        IntegrityError: The hashes differ.
    """
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise IntegrityError(
            f"{label}: arrived with SHA-256 {actual[:12]}..., expected {expected[:12]}...",
            name=name,
            expected=expected,
            actual=actual,
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete or absent; create its folder.

    Raises:
        DownloadError: The file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DownloadError(f"{path}: cannot be written ({error.strerror or error})") from error


class PartFile:
    """An unfinished download: NAME.part, renamed to NAME once its SHA-256 has been verified.

    Bytes are written at their own offset, not appended: two downloads of the same file at the same time write the same
    bytes.

    Attributes:
        size: Number of bytes present.
        resumed: Whether the file had content when it was opened.
    """

    def __init__(self, target: Path, max_bytes: int) -> None:
        """Open or create NAME.part and hash its content.

        Args:
            target: The path of NAME.
            max_bytes: Size of the whole file. A longer NAME.part cannot be its beginning and is emptied.

        Raises:
            OSError: NAME.part cannot be opened, or is not a regular file.
        """
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | _O_BINARY, 0o666), "r+")
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise OSError(errno.EINVAL, f"{self.path.name} is not a regular file; remove it")
        self.size = 0
        self._hash = hashlib.sha256()
        if os.fstat(self._file.fileno()).st_size > max_bytes:
            self._file.truncate(0)
        while block := self._file.read(_BLOCK):
            self._hash.update(block)
            self.size += len(block)
        self.resumed = self.size > 0

    def write(self, data: bytes) -> None:
        """Write the next bytes."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self.size += len(data)

    def restart(self) -> None:
        """Write again from offset 0.

        The file is not truncated: another download of the same file may have published it in the meantime.
        """
        self._file.seek(0)
        self.size, self.resumed, self._hash = 0, False, hashlib.sha256()

    def hexdigest(self) -> str:
        """Return the SHA-256 of the bytes present, in hex."""
        return self._hash.hexdigest()

    def publish(self) -> None:
        """Close the file and rename it to NAME."""
        self._file.truncate(self.size)
        self.close()
        try:
            self.path.replace(self.target)
        except FileNotFoundError:  # another download of the same file was faster
            if not self.target.is_file():
                raise

    def discard(self) -> None:
        """Close and remove NAME.part."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and keep NAME.part."""
        self._file.close()
