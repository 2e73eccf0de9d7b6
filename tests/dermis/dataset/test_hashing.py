"""Tests of the SHA-256 that is computed while a file is read."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from typing import IO, cast

import pytest

from dermis.dataset.hashing import HashingReader


class CountingFile(io.BytesIO):
    """Counts the bytes that are read of it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for number in range(20):
            file.writestr(f"{number}.bin", bytes([number]) * (50_000 + number))
    return buffer.getvalue()


def members(file: IO[bytes]) -> None:
    with zipfile.ZipFile(file) as opened:
        for name in opened.namelist():
            assert opened.read(name)


def backwards(file: IO[bytes]) -> None:
    for start in range(900_000, -1, -100_000):
        file.seek(start)
        file.read(100_000)


def nothing(_: IO[bytes]) -> None:
    pass


def whole(file: IO[bytes]) -> None:
    file.read()


def overlapping(file: IO[bytes]) -> None:
    for start in (0, 5, 100, 300_000, 2, 200):
        file.seek(start)
        file.read(1000)


@pytest.mark.parametrize("read", [members, backwards, nothing, whole, overlapping])
def test_hash_is_that_of_the_whole_file_in_any_order_of_reading(read: Callable[[IO[bytes]], None]) -> None:
    data = archive()
    file = CountingFile(data)
    reader = HashingReader(file)
    read(cast(IO[bytes], reader))
    assert reader.sha256() == reader.sha256() == hashlib.sha256(data).hexdigest()
    if read in (members, whole):
        assert len(data) <= file.count < 1.1 * len(data), "read once, but for the directory at the end"
