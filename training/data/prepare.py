"""Write sources as one zip that the official StyleGAN code reads, with a table of metadata and a data card.

Each image is converted once, in a work folder next to the zip, and an interrupted run continues from there. The bytes of
the zip depend on the images, their metadata and the options only.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dermis.errors import DataError
from dermis.files import atomic_write
from dermis.image_reading import ImageError, read_training_image
from dermis.skin_tone import skin_tone, tone_class
from training.data.attributes import ITA, ITA_CLASS, METADATA_COLUMNS, value_of
from training.data.card import data_card
from training.data.images import BROKEN_IMAGE, DECODER_VERSION, in_threads
from training.data.sources import Record, Source
from training.data.tables import csv_text

COLUMNS = (
    "file_name", "isic_id", "class", "label", "patient_id", "lesion_id", *METADATA_COLUMNS, ITA, ITA_CLASS, "source",
)  # fmt: skip
# Columns with the rights to single images, in tables of the ISIC Archive.
RIGHTS = ("copyright_license", "attribution")


@dataclass(frozen=True)
class Skipped:
    """An image that was left out of the data set, and the reason."""

    id: str
    source: str
    reason: str


@dataclass(frozen=True)
class Prepared:
    """Content of a prepared zip."""

    path: Path
    sha256: str  # SHA-256 of ids, classes and files, as in `ImageDataset`
    classes: Mapping[str, int]  # number of images by class
    images: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Converted:
    file: Path
    ita: float | None  # skin tone of the converted image


@dataclass(frozen=True)
class _Item:
    record: Record
    source: Source

    @property
    def source_name(self) -> str:
        return self.record.row.get("source", "") or _name(self.source)


def _name(source: Source) -> str:
    return source.path.resolve().name


def prepare(
    sources: Sequence[Source],
    out: Path,
    resolution: int,
    *,
    licence: str = "unknown",
    attribution: str = "",
    skip_unlabelled: bool = False,
    strict: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> Prepared:
    """Crop, resize (Lanczos) and write all images of all sources into the zip `out`, in the order of their ids.

    Members of the zip: `00000/img00000000.png`, ... (uncompressed RGB), `dataset.json` (labels, or null if no image has a
    class), `metadata.csv`, `README.md` (the data card) and, if images were skipped, `skipped.csv`, which is also written
    next to the zip. Images that are missing or cannot be decoded are skipped.

    Args:
        sources: The images.
        out: The zip, which must not exist.
        resolution: Side of the images in pixels.
        licence: Licence for the data card.
        attribution: Attribution for the data card.
        skip_unlabelled: Skip images without a class.
        strict: Write no zip if an image would be skipped.
        workers: Number of threads; by default, one for each processor.
        progress: Whether to show progress bars.

    Raises:
        DataError: `out` exists, two images have the same id, or only some of the images have a class.
    """
    if out.suffix != ".zip" or resolution < 1:
        raise DataError(f"{out}: must be a .zip, and --resolution at least 1, not {resolution}")
    if out.exists():
        raise DataError(f"{out}: exists already; choose another --out or remove it")
    items, skipped = _labelled(_merged(sources), skip_unlabelled)
    for source in sources:  # unreadable files that may be images, which are not necessarily in a table
        skipped += [Skipped(name, _name(source), why) for name, why in source.report.unreadable.items()]
    work = out.with_name(f"{out.name}.partial")
    try:
        work.mkdir(parents=True, exist_ok=True)
        converted, broken = _convert_images(items, resolution, work, workers, progress)
    except OSError as error:
        raise DataError(
            f"{work}: cannot be written ({error.strerror}); run the same command again to continue"
        ) from error
    skipped = sorted([*skipped, *broken], key=lambda each: each.id)
    report = out.with_suffix(".skipped.csv")
    try:
        report.unlink(missing_ok=True)
        if skipped:
            with atomic_write(report) as partial:
                partial.write_bytes(_skipped_table(skipped).encode())
        if strict and skipped:
            raise DataError(f"{len(skipped)} images would be skipped, see {report}; replace them or omit --strict")
        if not converted:
            raise DataError(f"{out}: none of the images can be used, see {report}")
        prepared = _write_zip(converted, skipped, out, resolution, licence, attribution, progress)
        shutil.rmtree(work)
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); run the same command again to continue"
        ) from error
    return prepared


def _merged(sources: Sequence[Source]) -> list[_Item]:
    items: dict[str, _Item] = {}
    for source in sources:
        for record in source.records:
            if record.id in items:
                raise DataError(f"{record.id} is in both {items[record.id].source.path} and {source.path}")
            items[record.id] = _Item(record, source)
    return [items[name] for name in sorted(items)]


def _labelled(items: list[_Item], skip_unlabelled: bool) -> tuple[list[_Item], list[Skipped]]:
    unlabelled = [item for item in items if not item.record.class_name]
    if not unlabelled or len(unlabelled) == len(items):
        return items, []
    if not skip_unlabelled:
        first = unlabelled[0]
        raise DataError(
            f"{first.source.path}: {len(unlabelled)} of {len(items)} images have no class, the first is "
            f"{first.record.id}; leave them out with --skip-unlabelled"
        )
    skipped = [Skipped(item.record.id, item.source_name, "no class") for item in unlabelled]
    return [item for item in items if item.record.class_name], skipped


def _convert_images(
    items: Sequence[_Item], resolution: int, work: Path, workers: int | None, progress: bool
) -> tuple[list[tuple[_Item, _Converted]], list[Skipped]]:
    """Write a PNG for each usable item into the work folder, under the hash of its origin, so that a restart finds it."""

    def convert(item: _Item) -> _Converted | Skipped:
        try:
            if item.record.image is None:
                return Skipped(item.record.id, item.source_name, "the image does not exist")
            stamp = f"{item.record.image.stamp()}\t{resolution}\t{DECODER_VERSION}"
            file = work / f"{hashlib.sha256(stamp.encode()).hexdigest()[:32]}.png"
            if file.exists():
                return _Converted(file, _ita(np.asarray(Image.open(file))))
            pixels = read_training_image(item.record.read_bytes(), resolution)
        except BROKEN_IMAGE as error:
            # Other errors contain paths, which must not be in the bytes of the zip.
            reason = str(error) if isinstance(error, ImageError) else "the file cannot be read"
            return Skipped(item.record.id, item.source_name, reason)
        buffer = io.BytesIO()
        # Uncompressed, as the official tool writes: fast to read, and the same bytes with any version of zlib.
        Image.fromarray(pixels).save(buffer, "png", compress_level=0)
        with atomic_write(file, concurrent=True) as partial:
            partial.write_bytes(buffer.getvalue())
        return _Converted(file, _ita(pixels))

    converted, broken = [], []
    results = tqdm(in_threads(convert, items, workers), "images", len(items), disable=not progress, unit="img")
    for item, result in zip(items, results, strict=True):
        if isinstance(result, Skipped):
            broken.append(result)
        else:
            converted.append((item, result))
    return converted, broken


def _ita(pixels: NDArray[np.uint8]) -> float | None:
    angle = skin_tone(pixels)
    return None if angle is None else round(angle, 1)


def _write_zip(
    converted: Sequence[tuple[_Item, _Converted]],
    skipped: Sequence[Skipped],
    out: Path,
    resolution: int,
    licence: str,
    attribution: str,
    progress: bool,
) -> Prepared:
    class_names = sorted({item.record.class_name for item, _ in converted} - {""})
    rows, labels, digest = [], [], hashlib.sha256()
    with atomic_write(out) as partial, zipfile.ZipFile(partial, "w") as archive:
        for i, (item, image) in enumerate(tqdm(converted, "writing", disable=not progress, unit="img")):
            name, record = f"{i // 1000:05d}/img{i:08d}.png", item.record
            data = image.file.read_bytes()
            _add(archive, name, data)
            label = class_names.index(record.class_name) if class_names else None
            labels.append([name, label])
            rows.append(_row(name, item, "" if label is None else str(label), image.ita))
            digest.update(f"{record.id}\t{record.class_name}\t{hashlib.sha256(data).hexdigest()}\n".encode())
        columns = [*COLUMNS, *(column for column in RIGHTS if any(row[column] for row in rows))]
        _add(archive, "dataset.json", json.dumps({"labels": labels if class_names else None}).encode())
        _add(archive, "metadata.csv", csv_text(columns, rows).encode())
        if skipped:
            _add(archive, "skipped.csv", _skipped_table(skipped).encode())
        card = data_card(out.stem, rows, len(skipped), resolution, digest.hexdigest(), licence, attribution)
        _add(archive, "README.md", card.encode())
    classes = {name: sum(row["class"] == name for row in rows) for name in class_names}
    return Prepared(out, digest.hexdigest(), classes, len(rows), tuple(skipped))


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    info = zipfile.ZipInfo(name)  # dated 1980, so that the bytes do not depend on the time
    info.create_system = 3
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)


def _row(file_name: str, item: _Item, label: str, ita: float | None) -> dict[str, str]:
    record = item.record
    return {
        "file_name": file_name,
        "isic_id": record.id,
        "class": record.class_name,
        "label": label,
        "patient_id": record.patient_id,
        "lesion_id": record.lesion_id,
        **{name: value_of(record.row, name) for name in (*METADATA_COLUMNS, *RIGHTS)},
        ITA: "" if ita is None else f"{ita:.1f}",
        ITA_CLASS: "" if ita is None else tone_class(ita),
        "source": item.source_name,
    }


def _skipped_table(skipped: Sequence[Skipped]) -> str:
    rows = [{"isic_id": each.id, "source": each.source, "reason": each.reason} for each in skipped]
    return csv_text(("isic_id", "source", "reason"), rows)
