"""Real images for a classifier: divided by patient into training, validation and test, and decoded once.

Classes are benign and malignant (melanoma, as in `dermis data prepare --binary`). Validation and test are always real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from dermis.errors import DataError
from training.data.attributes import ITA_CLASS, preferred_spellings, value_of
from training.data.images import ImageDataset, load_images
from training.data.sources import ReadOptions, Record, Source, read_source
from training.data.splits import group_of, read_split, read_split_values, split_by_patient

CLASS_NAMES = ("benign", "malignant")
SHARES: Mapping[str, float] = {"train": 0.65, "validation": 0.15, "test": 0.2}
UNKNOWN = "unknown"
AGE_BANDS = ((0, 30), (30, 50), (50, 70), (70, 200))
ATTRIBUTES = ("source", "sex", "age", "site")
SKIN_ATTRIBUTES = {"skin_type": "skin_type", "skin_tone": ITA_CLASS}
"""Attributes that only some collections have, and their columns. `dermis data prepare` and `split --skin-tone` estimate the
skin tone."""


@dataclass(frozen=True)
class RealPart:
    """One part of the real images.

    Args:
        images: uint8 [N, S, S, 3].
        labels: int64 [N], 1 for malignant.
        ids: Id of each image.
        groups: Patient of each image; the lesion, or the image itself, if the patient is not known.
        attributes: Values of each attribute of ATTRIBUTES, and of SKIN_ATTRIBUTES that an image has, one for each image;
            "unknown" if it is not stated.
        sha256: SHA-256 of ids, classes and files, as in `ImageDataset`.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]]
    sha256: str

    @property
    def classes(self) -> dict[str, int]:
        """Images of each class."""
        return {name: int((self.labels == k).sum()) for k, name in enumerate(CLASS_NAMES)}

    @property
    def positive_share(self) -> float:
        return float(self.labels.mean())


@dataclass(frozen=True)
class RealData:
    """The three parts of the real images."""

    name: str
    train: RealPart
    validation: RealPart
    test: RealPart
    split: str  # text for the card on how the images were divided

    @property
    def parts(self) -> dict[str, RealPart]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load_real(
    path: Path,
    size: int,
    *,
    split: Path | None = None,
    shares: Mapping[str, float] = SHARES,
    split_seed: int = 0,
    cache: Path | None = None,
    keep_digests: bool = False,
    progress: bool = True,
    **options: Unpack[ReadOptions],
) -> RealData:
    """Read a source, divide it and decode it at `size` px.

    Args:
        path: The source.
        size: Side of the decoded images in pixels.
        split: Folder that `dermis data split` (or `leaks --remove`) wrote, with the parts train, validation and test. Images
            that are in no part are not used. None: the source is divided by patient into `shares`.
        shares: Share of each part.
        split_seed: Seed of the division into shares.
        cache: Folder for decoded images.
        keep_digests: As of `load_images`.
        progress: Show progress bars.
        options: Options of `read_source`.

    Raises:
        DataError: The source cannot be used, or a part lacks one of the classes.
    """
    options["binary"] = True
    source = read_source(path, **options)
    absent = sorted(set(CLASS_NAMES) - set(source.class_names))
    if absent:
        raise DataError(f"{path}: has no {absent[0]} images; a classifier needs images of both classes")
    parts = _parts(source, split, shares, split_seed)
    if split is not None:
        source = _with_skin_tones(source, read_split_values(split, ITA_CLASS))
    spellings = preferred_spellings(value_of(record.row, "source") for record in source.records)
    decoded = {}
    for name, ids in parts.items():
        part_source = source.select(ids)
        dataset = load_images(part_source, size, cache=cache, keep_digests=keep_digests, progress=progress)
        part = _part(part_source, dataset, spellings)
        if 0 in part.classes.values():
            raise DataError(f"{path}: the part {name} has {part.classes}; each part needs images of both classes")
        decoded[name] = part
    division = f"as in the split `{split.resolve().name}`" if split else f"by patient, seed {split_seed}"
    return RealData(path.resolve().name, decoded["train"], decoded["validation"], decoded["test"], division)


def age_band(age: str) -> str:
    """The band of an age in years, such as "30 to 49"; "unknown" if it is not a number."""
    try:
        years = float(age)
    except ValueError:
        return UNKNOWN
    for low, high in AGE_BANDS:
        if low <= years < high:
            return f"{low} to {high - 1}" if high < 200 else f"{low} or more"
    return UNKNOWN


def _parts(
    source: Source, split: Path | None, shares: Mapping[str, float], split_seed: int
) -> dict[str, tuple[str, ...]]:
    """Ids of each part."""
    if split is None:
        names: Sequence[str] = split_by_patient(source.records, shares, split_seed).parts
        part_of = dict(zip((record.id for record in source.records), names, strict=True))
    else:
        part_of = read_split(split)
    sizes = Counter(part_of.values())
    absent = [name for name in SHARES if not sizes[name]]
    if absent:
        raise DataError(
            f"{split or source.path}: has no part {absent[0]}; make the three parts with "
            "dermis data split --parts train=0.65,validation=0.15,test=0.2"
        )
    _check_groups(source, part_of)
    return {name: tuple(sorted(key for key, part in part_of.items() if part == name)) for name in SHARES}


def _check_groups(source: Source, part_of: Mapping[str, str]) -> None:
    """Raise DataError if a patient is in two parts, since the test would then not be independent."""
    part_of_group: dict[str, str] = {}
    for record, group in zip(source.records, group_of(source.records), strict=True):
        part = part_of.get(record.id, "")
        if part in SHARES and part_of_group.setdefault(group, part) != part:
            raise DataError(
                f"{record.id}: its {group} is both in {part_of_group[group]} and in {part}; split by patient with "
                "dermis data split"
            )


def _with_skin_tones(source: Source, tones: Mapping[str, str]) -> Source:
    """The source with the skin tones that a split has, by id, unless it has its own."""
    records = tuple(
        replace(record, row={**record.row, ITA_CLASS: tones[record.id]})
        if tones.get(record.id) and not value_of(record.row, ITA_CLASS)
        else record
        for record in source.records
    )
    return replace(source, records=records)


def _part(source: Source, dataset: ImageDataset, spellings: Mapping[str, str]) -> RealPart:
    """One part with its decoded images. spellings: the spelling of each source in lower case."""
    to_label = np.array([CLASS_NAMES.index(name) for name in dataset.class_names], dtype=np.int64)
    attributes = {name: tuple(_attribute(record, name) for record in source.records) for name in ATTRIBUTES}
    attributes["source"] = tuple(spellings.get(value.casefold(), value) for value in attributes["source"])
    for name, column in SKIN_ATTRIBUTES.items():
        values = tuple(value_of(record.row, column) or UNKNOWN for record in source.records)
        if set(values) - {UNKNOWN}:
            attributes[name] = values
    groups = tuple(group_of(source.records))
    return RealPart(dataset.images, to_label[dataset.labels], dataset.ids, groups, attributes, dataset.sha256)


def _attribute(record: Record, name: str) -> str:
    if name == "age":
        return age_band(value_of(record.row, "age_approx"))
    return value_of(record.row, {"site": "anatom_site"}.get(name, name)) or UNKNOWN
