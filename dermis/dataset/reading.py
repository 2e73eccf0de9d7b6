"""The images of a finished dataset, with what its table says of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from dermis.dataset.containers import read_container
from dermis.dataset.manifest import CARD, MANIFEST, METADATA, PREVIEW, Manifest, read_manifest
from dermis.dataset.plan import Plan, plan
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.errors import DataError, escape

Row = dict[str, str]
_ROW_BYTES = 4096  # of metadata.csv for one image, at most


def open_dataset(location: str | Path) -> tuple[Manifest, dict[str, Row]]:
    """The manifest of a dataset in a folder (or fsspec URL), every file verified, and its table's rows by file name.

    DataError if a file is not what the manifest says, StorageError if there is no manifest.
    """
    report = verify(location)
    if report.changed or report.missing:
        first = [*report.changed, *report.missing][0]
        raise DataError(f"{location}: {first} is not what {MANIFEST} says; `dermis generate` makes it again")
    store = Store(location)
    manifest = read_manifest(store)
    records = {file.name: file for file in manifest.files}
    if METADATA not in records or records[METADATA].bytes > _ROW_BYTES * (manifest.request.samples + 1):
        raise DataError(f"{location}: {MANIFEST} lists no {METADATA}, or one that is too large for its images")
    try:
        text = store.read(METADATA, limit=records[METADATA].bytes).decode()
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        found = {row["file_name"]: row for row in rows}
    except (csv.Error, KeyError, UnicodeDecodeError) as error:
        reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{store.where(METADATA)}: is no table of images ({escape(reason)})") from None
    if len(found) != len(rows) or None in found:
        raise DataError(f"{store.where(METADATA)}: an image is there more than once, or a row has no file_name")
    return manifest, found


def read_samples(location: str | Path) -> Iterator[tuple[Row, bytes]]:
    """The row of metadata.csv and the encoded image of every sample, in order. Raises as `open_dataset`."""
    manifest, rows = open_dataset(location)
    store = Store(location)
    layout = plan(manifest.request, manifest.bundle_digest, manifest.class_names)
    for file in manifest.files:
        if file.name not in (METADATA, PREVIEW, CARD):
            yield from _of_container(layout, store, file.name, rows)


def _of_container(layout: Plan, store: Store, container: str, rows: dict[str, Row]) -> Iterator[tuple[Row, bytes]]:
    """The samples of one file. What its library says of damage becomes a DataError."""
    with store.open(container) as file:
        images = read_container(layout, file)
        while True:
            try:
                name, data = next(images)
            except StopIteration:
                return
            except Exception as error:  # zipfile, tarfile and Arrow have an error class each
                raise DataError(f"{store.where(container)}: cannot be read ({escape(error)})") from None
            if name not in rows:
                raise DataError(f"{store.where(container)}: holds {escape(str(name))}, which {METADATA} does not list")
            yield rows[name], data
