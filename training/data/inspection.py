"""Inspect a collection: classes, sizes, missing metadata, skin tones, and artefacts that are associated with classes."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.artefacts import NAMES, THRESHOLDS, Artefacts, artefacts_of, frame_mask, working_size
from dermis.errors import DataError
from dermis.files import atomic_write
from dermis.image_reading import read_training_image
from dermis.imaging import encode
from dermis.skin_tone import CLASSES, skin_tone, skin_tone_of, tone_class
from training.data.artefacts import Summary, artefact_sheet, summarise
from training.data.attributes import ITA, ITA_CLASS, METADATA_COLUMNS, preferred_spellings, value_of
from training.data.images import BROKEN_IMAGE
from training.data.sources import Record, Source
from training.data.splits import write_rows

CHECKED = ("patient_id", "lesion_id", *METADATA_COLUMNS)
_MIN_IMAGES_FOR_PROCESSES = 64  # for fewer images, starting processes takes longer than the measurement
_NO_CLASS = "(no class)"
_Measured = tuple[tuple[int, int], Artefacts, float | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Inspection:
    """Results of `dermis data inspect`."""

    source: Source
    classes: Mapping[str, int]
    missing: Mapping[str, Mapping[str, int]]  # column -> class -> images without a value
    opened: tuple[Record, ...]  # records whose images could be opened; `sizes` and `artefacts` describe these images
    sizes: Mapping[tuple[int, int], int]  # (width, height) -> images
    artefacts: tuple[Artefacts, ...]
    skin_tones: tuple[float | None, ...]  # individual typology angle in degrees; None if no skin is visible
    by_class: Summary | None  # None if no image could be opened
    by_source: Summary | None  # None unless the metadata name several sources
    broken: tuple[tuple[str, str], ...]  # (id, reason)


def inspect_source(source: Source, *, workers: int | None = None, progress: bool = True) -> Inspection:
    """Open and measure every image of a source. Images that are missing or broken are listed.

    If the source is a table without images, only the metadata are counted.
    """
    records = source.records
    missing = {
        column: dict(Counter(_class(record) for record in records if not value_of(record.row, column)))
        for column in CHECKED
    }
    opened: list[Record] = []
    artefacts: list[Artefacts] = []
    skin_tones: list[float | None] = []
    sizes: Counter[tuple[int, int]] = Counter()
    broken: list[tuple[str, str]] = []
    with_images = () if source.layout == "table" else records
    for record, result in zip(with_images, _measure_all(with_images, workers, progress, _measure), strict=True):
        if isinstance(result, str):
            broken.append((record.id, result))
        else:
            opened.append(record)
            sizes[result[0]] += 1
            artefacts.append(result[1])
            skin_tones.append(result[2])
    classes = Counter(map(_class, records))
    named = [value_of(record.row, "source") for record in opened]
    spellings = preferred_spellings(named)
    origins = [spellings[name.casefold()] or "(unknown)" for name in named]
    return Inspection(
        source,
        {name: classes[name] for name in sorted(classes)},
        missing,
        tuple(opened),
        dict(sizes.most_common()),
        tuple(artefacts),
        tuple(skin_tones),
        summarise(artefacts, [_class(record) for record in opened]) if opened else None,
        summarise(artefacts, origins) if len(set(origins)) > 1 else None,
        tuple(broken),
    )


def with_skin_tones(
    source: Source, *, workers: int | None = None, progress: bool = True
) -> tuple[Source, tuple[tuple[str, str], ...]]:
    """Estimate the skin tone of each image, and add it to its metadata as the columns `ita` and `ita_class`.

    Images that have these columns already, as in a prepared set, are not opened.

    Returns:
        The source with the columns, and id and reason of each image that cannot be opened. Its columns are empty, as are those
        of an image without visible skin.

    Raises:
        DataError: The source is a table without images.
    """
    if source.layout == "table":
        raise DataError(f"{source.path}: has no images, so their skin tones cannot be estimated; leave out --skin-tone")
    unknown = [record for record in source.records if not value_of(record.row, ITA_CLASS)]
    tones = dict(zip((r.id for r in unknown), _measure_all(unknown, workers, progress, _tone), strict=True))
    records, broken = [], []
    for record in source.records:
        angle = tones.get(record.id)
        if isinstance(angle, str):
            broken.append((record.id, angle))
            angle = None
        known = {} if record.id not in tones else {ITA: "", ITA_CLASS: ""}
        if angle is not None:
            known = {ITA: f"{angle:.1f}", ITA_CLASS: tone_class(angle)}
        records.append(replace(record, row={**record.row, **known}))
    return replace(source, records=tuple(records)), tuple(broken)


def attribute_counts(inspection: Inspection) -> dict[str, dict[str, dict[str, int]]]:
    """Count images by attribute, value and class: skin types as the table states them, and skin tones of the images.

    An attribute is missing if no image has it.
    """
    records = inspection.source.records
    types = Counter((value_of(record.row, "skin_type"), _class(record)) for record in records)
    tones = Counter(
        ("" if angle is None else tone_class(angle), _class(record))
        for record, angle in zip(inspection.opened, inspection.skin_tones, strict=True)
    )
    values = {"skin_type": sorted({value for value, _ in types} - {""}), "skin_tone": CLASSES}
    counts = {"skin_type": types, "skin_tone": tones}
    return {
        name: {value: {each: counts[name][value, each] for each in inspection.classes} for value in values[name]}
        for name in counts
        if any(value for value, _ in counts[name])
    }


def write_inspection(inspection: Inspection, out: Path) -> None:
    """Write artefacts.csv (scores of each image), contact-sheet.png (examples) and report.json.

    Raises:
        DataError: A file cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if inspection.opened:
            rows = [
                {"id": record.id, "class": record.class_name, "found": " ".join(each.present)}
                | {name: f"{getattr(each, name):.4f}" for name in NAMES}
                | {"ita": "" if angle is None else f"{angle:.1f}"}
                for record, each, angle in zip(
                    inspection.opened, inspection.artefacts, inspection.skin_tones, strict=True
                )
            ]
            write_rows(out / "artefacts.csv", ("id", "class", *NAMES, "ita", "found"), rows)
            classes = [_class(record) for record in inspection.opened]
            sheet = artefact_sheet(lambda i: _pixels(inspection.opened[i]), inspection.artefacts, classes)
            with atomic_write(out / "contact-sheet.png") as partial:
                partial.write_bytes(encode(sheet))
        with atomic_write(out / "report.json") as partial:
            partial.write_text(json.dumps(_report(inspection), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error


def _measure_all(
    records: Sequence[Record], workers: int | None, progress: bool, measure: Callable[[Record], T]
) -> list[T]:
    show = functools.partial(tqdm, desc="inspecting", total=len(records), disable=not progress, unit="img")
    workers = workers or os.cpu_count() or 1
    # Without the metadata, which the other processes do not need.
    bare = [Record(record.id, "", "", "", record.image, {}) for record in records]
    if workers == 1 or len(records) < _MIN_IMAGES_FOR_PROCESSES:
        return list(show(map(measure, bare)))
    # Spawned, not forked, as this process can have threads. Only this process handles Ctrl-C.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        return list(show(pool.map(measure, bare, chunksize=16)))
    finally:
        pool.shutdown(cancel_futures=True)


def _measure(record: Record) -> _Measured | str:
    """(width, height), artefacts and skin tone of one image, or the reason why it cannot be opened."""
    try:
        pixels = _pixels(record)
    except BROKEN_IMAGE as error:
        return " ".join(str(error).split())
    rgb = working_size(pixels)
    frame = frame_mask(rgb)
    return (pixels.shape[1], pixels.shape[0]), artefacts_of(rgb, frame), skin_tone_of(rgb, frame)


def _tone(record: Record) -> float | str | None:
    """The individual typology angle of one image, None without visible skin, or the reason why it cannot be opened."""
    try:
        return skin_tone(_pixels(record))
    except BROKEN_IMAGE as error:
        return " ".join(str(error).split())


def _pixels(record: Record) -> NDArray[np.uint8]:
    return read_training_image(record.read_bytes())


def _class(record: Record) -> str:
    return record.class_name or _NO_CLASS


def _report(inspection: Inspection) -> dict[str, Any]:
    records = inspection.source.records
    return {
        "source": inspection.source.path.resolve().name,
        "layout": inspection.source.layout,
        "class_column": inspection.source.class_column,
        "images": len(records),
        "classes": dict(inspection.classes),
        "patients": len({record.patient_id for record in records} - {""}),
        "lesions": len({record.lesion_id for record in records} - {""}),
        "missing": {column: dict(counts) for column, counts in inspection.missing.items()},
        "sizes": {f"{width}x{height}": count for (width, height), count in inspection.sizes.items()},
        "broken": [{"id": name, "reason": reason} for name, reason in inspection.broken],
        "attributes": attribute_counts(inspection),
        "artefact_thresholds": THRESHOLDS,
        "artefacts_by_class": asdict(inspection.by_class) if inspection.by_class else None,
        "artefacts_by_source": asdict(inspection.by_source) if inspection.by_source else None,
    }
