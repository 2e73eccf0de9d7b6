"""Read the images of a finished dataset with their rows of metadata.csv."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dermis.dataset.containers import read_container
from dermis.dataset.manifest import METADATA, SINGLE_FILES, Manifest, read_manifest
from dermis.dataset.plan import DatasetPlan, plan
from dermis.dataset.store import MANIFEST, Store
from dermis.dataset.verify import verify
from dermis.errors import DataError, escape, quote
from dermis.provenance.canonical import canonical_sha256

Row = dict[str, str]
_NUMBERS = ("label", "seed", "index")
_COLUMNS = ("isic_id", "target", "file_name", *_NUMBERS)  # those that are read
_ROW_BYTES = 4096  # largest size of a row of metadata.csv


def open_dataset(location: str | Path) -> tuple[Manifest, dict[str, Row]]:
    """Verify every file of a dataset and read its manifest and table.

    Args:
        location: A folder or an fsspec URL.

    Returns:
        The manifest, and the rows of metadata.csv by file name.

    Raises:
        DataError: A file differs from the manifest.
        StorageError: There is no manifest.
    """
    report = verify(location)
    if report.changed or report.missing:
        first = [*report.changed, *report.missing][0]
        raise DataError(
            f"{location}: {first} differs from {MANIFEST}; run the same `dermis generate` command again to repair it"
        )
    store = Store(location)
    manifest = read_manifest(store)
    records = {file.name: file for file in manifest.files}
    if METADATA not in records or records[METADATA].bytes > _ROW_BYTES * (manifest.request.samples + 1):
        raise DataError(f"{location}: {MANIFEST} lists no {METADATA}, or one that is too large for its images")
    table = store.read(METADATA, limit=records[METADATA].bytes)
    if hashlib.sha256(table).hexdigest() != records[METADATA].sha256:
        raise DataError(f"{store.where(METADATA)}: was changed while the dataset was read; try again")
    return manifest, _rows(table, store.where(METADATA))


def read_samples(location: str | Path) -> Iterator[tuple[Row, bytes]]:
    """Yield the row of metadata.csv and the encoded image of every sample, in order.

    Raises:
        DataError: A file differs from the manifest, or has other images than the table.
        StorageError: There is no manifest.
    """
    return samples_of(location, *open_dataset(location))


def samples_of(location: str | Path, manifest: Manifest, rows: Mapping[str, Row]) -> Iterator[tuple[Row, bytes]]:
    """Yield the samples of a dataset that `open_dataset` has opened.

    Raises:
        DataError: A file has other images than the table.
    """
    store = Store(location)
    layout = plan(manifest.request, manifest.bundle_digest, manifest.class_names)
    for file in manifest.files:
        if file.name not in SINGLE_FILES:
            yield from _of_container(layout, store, file.name, rows)


def _rows(table: bytes, where: str) -> dict[str, Row]:
    """Parse metadata.csv into rows by file name. Raises DataError, which names `where`, if it is not such a table."""
    try:
        reader = csv.DictReader(io.StringIO(table.decode(), newline=""), strict=True)
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
            raise DataError(f"{where}: has no column {missing[0]}; `dermis generate` makes it again")
        rows: dict[str, Row] = {}
        for number, row in enumerate(reader, start=2):
            if None in row or None in row.values():
                raise DataError(f"{where}: row {number} has another number of cells than the header")
            if bad := [name for name in _NUMBERS if not re.fullmatch(r"[0-9]{1,20}", row[name])]:
                raise DataError(f"{where}: row {number}: {bad[0]} must be a whole number, not {quote(row[bad[0]])}")
            if row["file_name"] in rows:
                raise DataError(f"{where}: row {number}: {quote(row['file_name'])} occurs more than once")
            rows[row["file_name"]] = row
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{where}: is not a table of images ({escape(error)})") from None
    return rows


def _of_container(
    layout: DatasetPlan, store: Store, container: str, rows: Mapping[str, Row]
) -> Iterator[tuple[Row, bytes]]:
    """Yield the samples of one file. Errors of the format's library become DataErrors."""
    with store.open(container) as file:
        images = read_container(layout, file)
        while True:
            try:
                name, data = next(images)
            except StopIteration:
                return
            except Exception as error:  # zipfile, tarfile and Arrow have different exceptions
                raise DataError(f"{store.where(container)}: cannot be read ({escape(error)})") from None
            if name not in rows:
                raise DataError(f"{store.where(container)}: holds {escape(str(name))}, which {METADATA} does not list")
            # The file can have been replaced after it was verified.
            if rows[name].get("sha256") not in (None, canonical_sha256(data)):
                raise DataError(f"{store.where(container)}: {escape(name)} is not the image that {METADATA} lists")
            yield rows[name], data
