"""The dataset of an export: verified, with its digest and its samples in order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermis.dataset.containers import folder_name
from dermis.dataset.manifest import CROISSANT, Manifest
from dermis.dataset.reading import Row, open_dataset, samples_of
from dermis.dataset.store import MANIFEST, Store
from dermis.errors import DataError, escape, quote
from dermis.image_reading import ImageError, read_image
from dermis.imaging import Images
from dermis.strict_json import parse_json

UNSTATED = "not stated"
_MAX_CROISSANT_BYTES = 4 << 20


@dataclass(frozen=True)
class ExportSample:
    """A sample of a dataset that is exported.

    Attributes:
        number: Position in the dataset, from 0. Samples that are missing leave gaps.
        label: Number of its class.
        row: Its row of metadata.csv.
        data: The encoded image.
    """

    number: int
    label: int
    row: Row
    data: bytes

    @property
    def name(self) -> str:
        """Name of the image without folder and suffix, such as SYN_00000012."""
        return self.row["isic_id"]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image, px. Raises DataError if it cannot be read."""
        height, width = self.pixels().shape[:2]
        return width, height

    def pixels(self) -> Images:
        """Decode the image.

        Returns:
            uint8 [H, W, 3].

        Raises:
            DataError: It is not an image that can be read.
        """
        try:
            return read_image(self.data)
        except ImageError as error:
            raise DataError(f"{escape(self.row['file_name'])}: {error}") from None

    @property
    def suffix(self) -> str:
        """Suffix of the image file, such as .png."""
        return Path(self.row["file_name"]).suffix


@dataclass(frozen=True)
class ExportSource:
    """A verified dataset.

    Attributes:
        location: Its folder or fsspec URL.
        manifest: Its manifest.
        digest: SHA-256 (hex) of its manifest.json, which identifies every file of it.
        images: Number of its images.
        licence: Its licence as an address or a name.
        attribution: Whom to name.
    """

    location: str
    manifest: Manifest
    digest: str
    images: int
    licence: str
    attribution: str
    _rows: dict[str, Row]

    def folder(self, label: int) -> str:
        """Return the name of a class as the name of a folder."""
        return folder_name(self.manifest.class_names[label])

    def samples(self) -> Iterator[ExportSample]:
        """Yield the samples in order.

        Raises:
            DataError: A file was changed, or the table contradicts the manifest.
        """
        for row, data in samples_of(self.location, self.manifest, self._rows):
            name, label = row["isic_id"], int(row["label"])
            if not (name.startswith("SYN_") and name[4:].isascii() and name[4:].isdigit() and len(name) <= 20):
                raise DataError(f"{self.location}: metadata.csv: isic_id must be SYN_ and a number, not {quote(name)}")
            if label >= len(self.manifest.class_names):
                raise DataError(f"{self.location}: metadata.csv: label {label} is not a class of {MANIFEST}")
            yield ExportSample(int(name[4:]), label, row, data)


def open_source(location: str | Path) -> ExportSource:
    """Verify a finished dataset and open it for an export.

    Raises:
        DataError: A file differs from the manifest.
        StorageError: There is no manifest.
    """
    store = Store(location)
    manifest, rows = open_dataset(location)
    document = read_croissant(store, manifest)
    licence, attribution = (str(document.get(name) or UNSTATED) for name in ("license", "creditText"))
    return ExportSource(str(location), manifest, store.sha256(MANIFEST), len(rows), licence, attribution, rows)


def read_croissant(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Read croissant.json of a verified dataset; empty if the dataset is older than this file.

    Raises:
        DataError: It differs from the manifest, or is not a JSON object.
    """
    record = next((file for file in manifest.files if file.name == CROISSANT), None)
    if record is None:
        return {}
    data = store.read(CROISSANT, limit=_MAX_CROISSANT_BYTES)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise DataError(f"{store.where(CROISSANT)}: differs from {MANIFEST}; see `dermis verify`")
    try:
        document = parse_json(data)
    except ValueError as error:
        raise DataError(f"{store.where(CROISSANT)}: is not JSON that can be used ({error})") from None
    if not isinstance(document, dict):
        raise DataError(f"{store.where(CROISSANT)}: is not a JSON object")
    return document
