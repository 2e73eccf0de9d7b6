"""The images of a finished dataset, with what its table says of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from dermis.dataset.containers import read_container
from dermis.dataset.manifest import CARD, MANIFEST, METADATA, PREVIEW, Manifest, read_manifest
from dermis.dataset.plan import plan
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.errors import DataError

Row = dict[str, str]


def open_dataset(location: str | Path) -> tuple[Manifest, dict[str, Row]]:
    """The manifest of a dataset in a folder (or fsspec URL), every file verified, and its table's rows by file name.

    DataError if a file is not what the manifest says, StorageError if there is no manifest.
    """
    report = verify(location)
    if report.changed or report.missing:
        first = [*report.changed, *report.missing][0]
        raise DataError(f"{location}: {first} is not what {MANIFEST} says; `dermis generate` makes it again")
    store = Store(location)
    table = csv.DictReader(io.StringIO(store.read(METADATA).decode(), newline=""))
    return read_manifest(store), {row["file_name"]: row for row in table}


def read_samples(location: str | Path) -> Iterator[tuple[Row, bytes]]:
    """The row of metadata.csv and the encoded image of every sample, in order. Raises as `open_dataset`."""
    manifest, rows = open_dataset(location)
    store = Store(location)
    layout = plan(manifest.request, manifest.bundle_digest, manifest.class_names)
    for file in manifest.files:
        if file.name not in (METADATA, PREVIEW, CARD):
            with store.open(file.name) as container:
                for name, data in read_container(layout, container):
                    yield rows[name], data
