"""Where an export is written: a new folder or a new zip, complete or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dermis.dataset.containers import add_to_zip, zip_of_many
from dermis.dataset.store import storage_errors
from dermis.errors import StorageError
from dermis.files import atomic_write

Write = Callable[[str, bytes], None]
"""Writes a file of the export: its name with slashes, and its content."""


@contextmanager
def export_output(out: Path) -> Iterator[Write]:
    """Give a function that writes the files of an export.

    If the block ends with an exception, nothing is left. A killed process can leave a folder or file `.NAME.partial`, which
    the next export to the same place replaces.

    Args:
        out: A folder that does not exist or is empty, or a file that does not exist and ends in .zip.

    Raises:
        StorageError: The place is taken, or cannot be written to.
    """
    zipped = out.suffix.lower() == ".zip"
    if out.exists() and (zipped or not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out}: exists already; choose another place or remove it")
    with storage_errors(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
    with storage_errors(str(out), only_full=True):
        if zipped:
            with atomic_write(out) as partial, zip_of_many(partial) as archive:
                yield lambda name, data: add_to_zip(archive, name, data)
            return
        partial = out.with_name(f".{out.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()

            def write(name: str, data: bytes) -> None:
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

            yield write
            if out.exists():
                out.rmdir()
            partial.replace(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
