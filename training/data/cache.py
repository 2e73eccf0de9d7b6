"""Arrays kept on disk between runs. They are written completely or not at all, and a damaged one counts as missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import DTypeLike, NDArray

from dermis.errors import DataError
from dermis.files import atomic_write


def read_array(file: Path, shape: tuple[int, ...], *, mapped: bool = False) -> NDArray[Any] | None:
    """Read the array in a .npy file.

    Args:
        file: The file.
        shape: Expected shape.
        mapped: Whether to map it into memory, read-only, instead of reading it.

    Returns:
        The array; None if the file is missing, damaged, or has another shape.
    """
    try:
        array: NDArray[Any] = np.load(file, mmap_mode="r" if mapped else None)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape else None


@contextmanager
def new_array(file: Path, shape: tuple[int, ...], dtype: DTypeLike) -> Iterator[NDArray[Any]]:
    """Give an array on disk to fill, which becomes `file` if the block ends without an exception.

    Raises:
        DataError: The folder cannot be written or the disk is full.
    """
    with atomic_write(file, concurrent=True) as partial:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            array = open_memmap(partial, "w+", dtype, shape)
            reserve_space(partial)
        except OSError as error:
            raise DataError(
                f"--cache: {file.parent}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        yield array
        array.flush()


def reserve_space(file: Path) -> None:
    """Allocate the file on the disk, except on macOS. Otherwise a full disk would end the program (SIGBUS) later."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as whole:
            os.posix_fallocate(whole.fileno(), 0, file.stat().st_size)
