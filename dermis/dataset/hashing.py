"""The SHA-256 of a file while a program reads it."""

from __future__ import annotations

import hashlib
import io
from typing import IO

_MAX_GAP = 1 << 16  # bytes that a program may skip, such as headers between the members of a zip
_BLOCK = 1 << 20


class HashingReader(io.BufferedIOBase):
    """An open file that computes its SHA-256 from what is read of it, so that a file is hashed and parsed in one pass.

    Bytes that are not read in their order, such as those of a directory at the end, are read again for the hash.

    Args:
        file: A file for reading and seeking, from its beginning. It stays open.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self._hashed = 0  # bytes at the beginning of the file that are in the digest

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._file.tell()
        if 0 < start - self._hashed <= _MAX_GAP:
            self._hash_until(start)
            self._file.seek(start)
        data = self._file.read(-1 if size is None else size)
        if start <= self._hashed < start + len(data):
            self._digest.update(memoryview(data)[self._hashed - start :])
            self._hashed = start + len(data)
        return data

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the whole file. It reads what has not been read."""
        self._hash_until(None)
        return self._digest.hexdigest()

    def _hash_until(self, end: int | None) -> None:
        self._file.seek(self._hashed)
        while block := self._file.read(_BLOCK if end is None else min(_BLOCK, end - self._hashed)):
            self._digest.update(block)
            self._hashed += len(block)
