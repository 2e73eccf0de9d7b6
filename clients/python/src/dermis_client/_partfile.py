"""A file on its way: NAME.part grows beside NAME and takes its place once its SHA-256 is right."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import FileIO
from pathlib import Path

_BLOCK = 1 << 20


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PartFile:
    """NAME.part, open for going on where an earlier download ended.

    Bytes are written at their own place, not appended: two downloads of the same file at the same time write the same
    bytes. size: how many are there; hexdigest(): their SHA-256.
    """

    def __init__(self, target: Path, most: int) -> None:
        """Open or create NAME.part and hash what it holds; more than `most` bytes cannot be a beginning: start anew."""
        self.target = target
        self.path = target.with_name(target.name + ".part")
        self._file = FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT | _O_BINARY, 0o666), "r+")
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._file.close()
            raise OSError(errno.EINVAL, f"{self.path.name} is no regular file; remove it")
        self.size = 0
        self._hash = hashlib.sha256()
        if os.fstat(self._file.fileno()).st_size > most:
            self._file.truncate(0)
        while block := self._file.read(_BLOCK):
            self._hash.update(block)
            self.size += len(block)
        self.resumed = self.size > 0

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        self._hash.update(data)
        self.size += len(data)

    def restart(self) -> None:
        """Write again from the start. Not emptied: another download may have put this very file in its place by now."""
        self._file.seek(0)
        self.size, self.resumed, self._hash = 0, False, hashlib.sha256()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def publish(self) -> None:
        """Close, and put the file in its place in one step."""
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
        self._file.close()


_O_BINARY: int = getattr(os, "O_BINARY", 0)
