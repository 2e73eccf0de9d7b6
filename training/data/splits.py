"""Divide images into parts by patient: no patient in two parts, every part of its size and with the classes of the whole.

Assigning whole patients so that sizes and class counts come out right is a multi-way number partitioning problem. It is
solved by a greedy pass in random order, then by moving and exchanging patients between parts as long as that helps.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.errors import DataError
from dermis.files import atomic_write
from training.data.sources import SPLIT, Record, Source
from training.data.tables import ID_COLUMNS, find_column, read_image_names

TRAIN_VALIDATION: Mapping[str, float] = {"train": 0.8, "validation": 0.2}
TRAIN_VALIDATION_TEST: Mapping[str, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}
HOSPITALS: Mapping[str, float] = {"hospital-1": 2_000, "hospital-2": 12_000, "hospital-3": 20_000}
PRESETS: Mapping[str, Mapping[str, float]] = {
    "train-validation": TRAIN_VALIDATION,
    "train-validation-test": TRAIN_VALIDATION_TEST,
    "hospitals": HOSPITALS,
}
REST = "rest"


_ROUNDS = 50  # of improvement; a table of 33,000 images needs fewer than ten
_CANDIDATES = 64  # patients that an exchange is tried with
_GROUP_WEIGHT = 0.2


@dataclass(frozen=True)
class Part:
    """What a part of a split has, beside what it should have."""

    name: str
    target: float  # images
    images: int
    groups: int
    classes: Mapping[str, int]

    def share(self, class_name: str) -> float:
        """Of the part's images, in 0..1."""
        return self.classes[class_name] / self.images if self.images else 0.0


@dataclass(frozen=True)
class Split:
    """parts[i] is the name of the part that record i is in; REST is what is left over where the sizes ask for less."""

    parts: tuple[str, ...]
    summary: tuple[Part, ...]
    whole: Part
    seed: int | None  # None if the parts were changed after


def split_by_patient(records: Sequence[Record], sizes: Mapping[str, float], seed: int = 0) -> Split:
    """Assign every record to one of the parts named in `sizes`.

    Sizes are images, or shares of the whole where all are at most 1. Sizes that ask for more than there is are scaled
    down together; if they ask for less, the remainder is the part "rest". Records of one patient, or of one lesion,
    stay together; a record with neither stands alone. Parts get each class (unlabelled records count as one) in the
    proportion of the whole, as closely as whole patients allow. A pure function: the order of the records does not
    matter. Raises DataError if the sizes make no sense or there are fewer patients than parts.
    """
    if not records:
        raise DataError("there are no images to split")
    targets = part_targets(sizes, len(records))
    groups = group_of(records)
    class_names = sorted({record.class_name for record in records})
    column = {name: k for k, name in enumerate(class_names)}
    names = sorted(set(groups))
    if len(names) < len(targets):
        raise DataError(f"{len(names)} patients cannot be divided into the {len(targets)} parts {', '.join(targets)}")
    row = {name: g for g, name in enumerate(names)}
    counts = np.zeros((len(names), len(class_names)), dtype=np.int64)
    for group, record in zip(groups, records, strict=True):
        counts[row[group], column[record.class_name]] += 1
    assigned = assign(counts, np.array(list(targets.values())), seed)
    part_names = list(targets)
    return describe_split(records, [part_names[assigned[row[group]]] for group in groups], targets, seed)


def describe_split(
    records: Sequence[Record], parts: Sequence[str], targets: Mapping[str, float], seed: int | None = None
) -> Split:
    """Count what every part of a split has. parts[i] is that of records[i]; targets name the parts in their order."""
    groups = group_of(records)
    classes = Counter((part, record.class_name) for part, record in zip(parts, records, strict=True))
    members = Counter(part for part, _ in set(zip(parts, groups, strict=True)))
    class_names = sorted({record.class_name for record in records})
    summary = []
    for name, target in targets.items():
        has = {cls: classes[name, cls] for cls in class_names}
        summary.append(Part(name, target, sum(has.values()), members[name], has))
    totals = dict(sorted(Counter(record.class_name for record in records).items()))
    whole = Part("whole", float(len(records)), len(records), len(set(groups)), totals)
    return Split(tuple(parts), tuple(summary), whole, seed)


def part_targets(sizes: Mapping[str, float], images: int) -> dict[str, float]:
    """Images that each part should have; "rest" is added if the sizes leave some over."""
    if not sizes or REST in sizes or not all(np.isfinite(size) and size > 0 for size in sizes.values()):
        raise DataError(f"parts need names other than {REST!r} and sizes above 0, not {dict(sizes)}")
    shares = all(size <= 1 for size in sizes.values())
    if shares and sum(sizes.values()) > 1 + 1e-9:
        raise DataError(f"the shares {', '.join(f'{size:g}' for size in sizes.values())} add up to more than 1")
    scale = float(images) if shares else min(1.0, images / sum(sizes.values()))
    targets = {name: size * scale for name, size in sizes.items()}
    rest = images - sum(targets.values())
    return targets | ({REST: rest} if rest >= 0.5 else {})


def group_of(records: Sequence[Record]) -> list[str]:
    """A name of the group of each record: records that share a patient or a lesion, also through others, share it.

    Thus an image whose patient is not known stays with the known patient of the same lesion.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys = []
    for record in records:
        patient = f"patient {record.patient_id}" if record.patient_id else ""
        lesion = f"lesion {record.lesion_id}" if record.lesion_id else ""
        key = patient or lesion or f"image {record.id}"
        keys.append(key)
        if patient and lesion:
            first, second = sorted((root(patient), root(lesion)))
            parent[second] = first
    return [root(key) for key in keys]


def assign(counts: NDArray[np.int64], targets: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Part of every group. counts int [groups, classes]: images; targets float [parts]: images of each part.

    Minimises the sum of (images - wanted)^2 / wanted over parts, and over parts and classes: the chi-square distance to
    the ideal split, in which a rare class counts as much as a common one. With a small weight it also counts the
    groups, for else a small part would be filled with patients of few images.
    """
    rng = np.random.default_rng(seed)
    amounts = np.column_stack([counts, counts.sum(axis=1), np.ones(len(counts))])  # [groups, classes, size, 1]
    wanted = targets[:, None] * amounts.sum(axis=0) / counts.sum()  # the same columns for each part
    weight = 1.0 / np.maximum(wanted, 1e-9)
    weight[:, -1] *= _GROUP_WEIGHT
    have = np.zeros_like(wanted)
    part = np.zeros(len(counts), dtype=np.int64)
    for g in rng.permutation(len(counts)):
        part[g] = np.argmin(_cost_of_adding(amounts[g], have - wanted, weight))
        have[part[g]] += amounts[g]
    for _ in range(_ROUNDS):
        moved = _move(amounts, have, wanted, weight, part, rng)
        exchanged = _exchange(amounts, have, wanted, weight, part, rng)
        if not moved and not exchanged:
            break
    _fill_empty(amounts, have, wanted, weight, part)
    return part


def _cost_of_adding(
    amount: NDArray[np.float64], excess: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Change of sum(weight * excess^2) over the last axis when `amount` is added."""
    change: NDArray[np.float64] = (weight * amount * (2 * excess + amount)).sum(axis=-1)
    return change


def _move(
    amounts: NDArray[np.float64],
    have: NDArray[np.float64],
    wanted: NDArray[np.float64],
    weight: NDArray[np.float64],
    part: NDArray[np.int64],
    rng: np.random.Generator,
) -> bool:
    """Move each group, in random order, to the part where it fits best. Was any moved?"""
    moved = False
    for g in rng.permutation(len(amounts)):
        source, excess = part[g], have - wanted
        change = _cost_of_adding(amounts[g], excess, weight)
        change += _cost_of_adding(-amounts[g], excess[source], weight[source])
        change[source] = 0.0
        target = int(np.argmin(change))
        if change[target] < -1e-9:
            have[source] -= amounts[g]
            have[target] += amounts[g]
            part[g] = target
            moved = True
    return moved


def _exchange(
    amounts: NDArray[np.float64],
    have: NDArray[np.float64],
    wanted: NDArray[np.float64],
    weight: NDArray[np.float64],
    part: NDArray[np.int64],
    rng: np.random.Generator,
) -> bool:
    """Exchange groups of two parts where that helps, which mends what no single move can. Was any exchanged?"""
    exchanged = False
    for a in range(len(wanted)):
        for b in range(a + 1, len(wanted)):
            in_a, in_b = (rng.permutation(np.flatnonzero(part == p))[:_CANDIDATES] for p in (a, b))
            if not len(in_a) or not len(in_b):
                continue
            amount = amounts[in_b][None] - amounts[in_a][:, None]  # [in_a, in_b, columns]: what a would gain
            change = _cost_of_adding(amount, have[a] - wanted[a], weight[a])
            change += _cost_of_adding(-amount, have[b] - wanted[b], weight[b])
            i, j = np.unravel_index(int(np.argmin(change)), change.shape)
            if change[i, j] < -1e-9:
                have[a] += amount[i, j]
                have[b] -= amount[i, j]
                part[in_a[i]], part[in_b[j]] = b, a
                exchanged = True
    return exchanged


def _fill_empty(
    amounts: NDArray[np.float64],
    have: NDArray[np.float64],
    wanted: NDArray[np.float64],
    weight: NDArray[np.float64],
    part: NDArray[np.int64],
) -> None:
    """A part that is smaller than the smallest patient would be empty: give it the patient that does least harm."""
    for p in range(len(wanted)):
        if (part == p).any():
            continue
        groups = np.flatnonzero(np.bincount(part, minlength=len(wanted))[part] > 1)
        excess = have - wanted
        change = _cost_of_adding(amounts[groups], excess[p], weight[p])
        change += _cost_of_adding(-amounts[groups], excess[part[groups]], weight[part[groups]])
        g = groups[int(np.argmin(change))]
        have[part[g]] -= amounts[g]
        have[p] += amounts[g]
        part[g] = p


def write_split(source: Source, split: Split, out: Path) -> None:
    """A CSV of its rows for each part, and split.json, written last. DataError if the folder is not empty.

    A CSV has the columns that the source has, so `--metadata OUT/train.csv` beside the same source reads that part.
    """
    check_empty(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for part in split.summary:
            records = [record for record, name in zip(source.records, split.parts, strict=True) if name == part.name]
            write_records(out / f"{part.name}.csv", records, source)
        summary = {"source": source.path.name, "seed": split.seed, "whole": _described(split.whole, split.whole)}
        summary["parts"] = {part.name: _described(part, split.whole) for part in split.summary}
        (out / SPLIT).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error


def check_empty(out: Path) -> None:
    """DataError unless a split can be written there: a split is not to be mixed with an older one."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty; choose another --out or remove it")


def write_records(file: Path, records: Sequence[Record], source: Source) -> None:
    """A CSV of the records' rows, with the columns of all rows of the source; read beside it, it gives these records.

    Where the table calls images otherwise than by their ids (by paths, say), the ids come first, as `isic_id`.
    """
    columns = list(dict.fromkeys(column for record in source.records for column in record.row))
    id_column = find_column(columns, ID_COLUMNS)
    if id_column is not None and all(record.row.get(id_column) == record.id for record in source.records):
        write_rows(file, columns, [record.row for record in records])
        return
    rows = [{**record.row, "isic_id": record.id} for record in records]
    write_rows(file, ["isic_id", *(column for column in columns if column != "isic_id")], rows)


def write_rows(file: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    """Write a CSV file completely or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(file) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


def read_split(folder: Path) -> dict[str, str]:
    """Part of each id in a folder that `write_split` wrote. DataError if it is none or an id is in two parts."""
    try:
        names = list(json.loads((folder / SPLIT).read_text(encoding="utf-8"))["parts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: no split; `dermis data split` writes one with its {SPLIT}") from error
    parts: dict[str, str] = {}
    for name in names:
        for record_id in read_image_names(folder / f"{name}.csv")[0]:
            if record_id in parts:
                raise DataError(f"{folder}: {record_id} is in both {parts[record_id]} and {name}")
            parts[record_id] = name
    return parts


def _described(part: Part, whole: Part) -> dict[str, Any]:
    return {
        "images": part.images,
        "wanted": round(part.target, 2),
        "groups": part.groups,
        "classes": dict(part.classes),
        "share": {cls: round(part.share(cls), 6) for cls in part.classes},
        "off_by_points": {cls: round(100 * (part.share(cls) - whole.share(cls)), 4) for cls in part.classes},
    }
