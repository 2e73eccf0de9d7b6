"""Divide images into parts by patient: no patient is in two parts, and parts have the required sizes and the same classes.

Assigning whole patients so that sizes and class counts are as required is a multi-way number partitioning problem. It is
solved by a greedy pass in random order, and then by moving and exchanging patients between parts while this reduces the
error.
"""

from __future__ import annotations

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
from training.data.tables import ID_COLUMNS, csv_text, find_column, read_grid, read_image_names

TRAIN_VALIDATION: Mapping[str, float] = {"train": 0.8, "validation": 0.2}
TRAIN_VALIDATION_TEST: Mapping[str, float] = {"train": 0.7, "validation": 0.1, "test": 0.2}
HOSPITALS: Mapping[str, float] = {"hospital-1": 2_000, "hospital-2": 12_000, "hospital-3": 20_000}
PRESETS: Mapping[str, Mapping[str, float]] = {
    "train-validation": TRAIN_VALIDATION,
    "train-validation-test": TRAIN_VALIDATION_TEST,
    "hospitals": HOSPITALS,
}
REST = "rest"

_MAX_ROUNDS = 50  # rounds of moves and exchanges; a table of 33,000 images needs fewer than ten
_CANDIDATES = 64  # patients of each part that are tried for an exchange
_GROUP_WEIGHT = 0.2
_ALONE = "image "  # begins the name of the group of an image of which neither patient nor lesion are known


@dataclass(frozen=True)
class SplitPart:
    """Counts of one part of a split."""

    name: str
    target: float  # required number of images
    images: int
    groups: int
    classes: Mapping[str, int]

    def share(self, class_name: str) -> float:
        """Share of a class among the images of the part, in [0, 1]."""
        return self.classes[class_name] / self.images if self.images else 0.0


@dataclass(frozen=True)
class Split:
    """Assignment of records to parts, with counts."""

    parts: tuple[str, ...]  # name of the part of each record; REST for records beyond the required sizes
    summary: tuple[SplitPart, ...]
    whole: SplitPart
    seed: int | None  # None if the parts were changed afterwards


def split_by_patient(records: Sequence[Record], sizes: Mapping[str, float], seed: int = 0) -> Split:
    """Assign every record to one of the parts named in `sizes`.

    Records of one patient, or of one lesion, are in the same part; a record with neither is a group of its own. Parts have
    each class (unlabelled records count as one) in the proportion of the whole, as closely as whole patients allow. The
    result depends on the arguments only, and not on the order of the records.

    Args:
        records: The images.
        sizes: Numbers of images by part, or shares of the whole if all are at most 1. Numbers that add up to more than
            there are images are scaled down together; if they add up to fewer, the other images are the part "rest".
        seed: Seed of the random order.

    Raises:
        DataError: The sizes are not valid, or there are fewer patients than parts.
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
    """Count images, groups and classes of every part of a split.

    Args:
        records: All images.
        parts: Name of the part of each record.
        targets: Required number of images by part, in the order of the parts.
        seed: Seed of the split; None if the parts were changed afterwards.
    """
    groups = group_of(records)
    classes = Counter((part, record.class_name) for part, record in zip(parts, records, strict=True))
    members = Counter(part for part, _ in set(zip(parts, groups, strict=True)))
    class_names = sorted({record.class_name for record in records})
    summary = []
    for name, target in targets.items():
        counts = {cls: classes[name, cls] for cls in class_names}
        summary.append(SplitPart(name, target, sum(counts.values()), members[name], counts))
    totals = dict(sorted(Counter(record.class_name for record in records).items()))
    whole = SplitPart("whole", float(len(records)), len(records), len(set(groups)), totals)
    return Split(tuple(parts), tuple(summary), whole, seed)


def part_targets(sizes: Mapping[str, float], images: int) -> dict[str, float]:
    """Required number of images by part, with the part "rest" if the sizes do not cover all images."""
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
    """Name of the group of each record. Records that share a patient or a lesion, directly or through others, have one group.

    So an image without a known patient is in the group of the patient with the same lesion.
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
        key = patient or lesion or f"{_ALONE}{record.id}"
        keys.append(key)
        if patient and lesion:
            first, second = sorted((root(patient), root(lesion)))
            parent[second] = first
    return [root(key) for key in keys]


def count_without_ids(groups: Sequence[str]) -> int:
    """Count the images of which neither patient nor lesion are known: `group_of` gives each a group of its own."""
    return sum(group.startswith(_ALONE) for group in groups)


def assign(counts: NDArray[np.int64], targets: NDArray[np.float64], seed: int) -> NDArray[np.int64]:
    """Assign groups of images to parts.

    Minimises the sum of (images - ideal)^2 / ideal over parts, and over parts and classes: the chi-square distance to the
    ideal split, in which a rare class has the same influence as a common one. The number of groups is included with a
    small weight: otherwise a small part would consist of patients with few images.

    Args:
        counts: [groups, classes], numbers of images.
        targets: [parts], required numbers of images.
        seed: Seed of the random order.

    Returns:
        Part of every group, [groups].
    """
    rng = np.random.default_rng(seed)
    amounts = np.column_stack([counts, counts.sum(axis=1), np.ones(len(counts))])
    ideal = targets[:, None] * amounts.sum(axis=0) / counts.sum()
    weight = 1.0 / np.maximum(ideal, 1e-9)
    weight[:, -1] *= _GROUP_WEIGHT
    state = _Assignment(amounts, ideal, weight, np.zeros_like(ideal), np.zeros(len(counts), dtype=np.int64))
    for g in rng.permutation(len(counts)):
        state.part[g] = np.argmin(_cost_of_adding(amounts[g], state.totals - ideal, weight))
        state.totals[state.part[g]] += amounts[g]
    for _ in range(_MAX_ROUNDS):
        moved = _move(state, rng)
        exchanged = _exchange(state, rng)
        if not moved and not exchanged:
            break
    _fill_empty(state)
    return state.part


@dataclass(frozen=True)
class _Assignment:
    """Groups and their parts. Columns are the classes, the number of images and the number of groups."""

    amounts: NDArray[np.float64]  # [groups, columns]
    ideal: NDArray[np.float64]  # [parts, columns]
    weight: NDArray[np.float64]  # [parts, columns]
    totals: NDArray[np.float64]  # [parts, columns], changed with every move
    part: NDArray[np.int64]  # [groups], changed with every move

    def move(self, group: int, part: int) -> None:
        self.totals[self.part[group]] -= self.amounts[group]
        self.totals[part] += self.amounts[group]
        self.part[group] = part


def _cost_of_adding(
    amount: NDArray[np.float64], excess: NDArray[np.float64], weight: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Change of sum(weight * excess^2) over the last axis if `amount` is added."""
    change: NDArray[np.float64] = (weight * amount * (2 * excess + amount)).sum(axis=-1)
    return change


def _move(state: _Assignment, rng: np.random.Generator) -> bool:
    """Move each group, in random order, to the part where it fits best. Returns whether any group was moved."""
    moved = False
    for g in rng.permutation(len(state.amounts)):
        amount, source, excess = state.amounts[g], state.part[g], state.totals - state.ideal
        change = _cost_of_adding(amount, excess, state.weight)
        change += _cost_of_adding(-amount, excess[source], state.weight[source])
        change[source] = 0.0
        target = int(np.argmin(change))
        if change[target] < -1e-9:
            state.move(g, target)
            moved = True
    return moved


def _exchange(state: _Assignment, rng: np.random.Generator) -> bool:
    """Exchange groups of two parts if this reduces the cost. Returns whether any were exchanged."""
    exchanged = False
    for a in range(len(state.ideal)):
        for b in range(a + 1, len(state.ideal)):
            in_a, in_b = (rng.permutation(np.flatnonzero(state.part == p))[:_CANDIDATES] for p in (a, b))
            if not len(in_a) or not len(in_b):
                continue
            excess = state.totals - state.ideal
            gain = state.amounts[in_b][None] - state.amounts[in_a][:, None]  # change of part a, [in_a, in_b, columns]
            change = _cost_of_adding(gain, excess[a], state.weight[a])
            change += _cost_of_adding(-gain, excess[b], state.weight[b])
            i, j = np.unravel_index(int(np.argmin(change)), change.shape)
            if change[i, j] < -1e-9:
                state.move(in_a[i], b)
                state.move(in_b[j], a)
                exchanged = True
    return exchanged


def _fill_empty(state: _Assignment) -> None:
    """Move one patient, the one with the smallest cost, to each part that is empty because it is smaller than any patient."""
    part = state.part
    for p in range(len(state.ideal)):
        if (part == p).any():
            continue
        groups = np.flatnonzero(np.bincount(part, minlength=len(state.ideal))[part] > 1)
        amount, source, excess = state.amounts[groups], part[groups], state.totals - state.ideal
        change = _cost_of_adding(amount, excess[p], state.weight[p])
        change += _cost_of_adding(-amount, excess[source], state.weight[source])
        state.move(groups[int(np.argmin(change))], p)


def write_split(source: Source, split: Split, out: Path) -> None:
    """Write a CSV for each part, and then split.json.

    A CSV has the columns of the source, so `--metadata OUT/train.csv` together with the same --data reads that part.

    Raises:
        DataError: The folder is not empty or cannot be written.
    """
    check_empty(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for part in split.summary:
            records = [record for record, name in zip(source.records, split.parts, strict=True) if name == part.name]
            write_records(out / f"{part.name}.csv", records, source)
        summary = {"source": source.path.name, "seed": split.seed, "whole": _summary(split.whole, split.whole)}
        summary["parts"] = {part.name: _summary(part, split.whole) for part in split.summary}
        with atomic_write(out / SPLIT) as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from error


def check_empty(out: Path) -> None:
    """Check that a folder is empty or does not exist, so that a split is not mixed with an earlier one.

    Raises:
        DataError: It is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is not empty; choose another --out or remove it")


def write_records(file: Path, records: Sequence[Record], source: Source) -> None:
    """Write the rows of records as a CSV with the columns of all rows of the source, to be used as its `--metadata`.

    If the table does not name images by their ids (but by paths, for instance), the first column is `isic_id` with the ids.
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
    with atomic_write(file) as partial:
        partial.write_text(csv_text(columns, rows), encoding="utf-8")


def read_split(folder: Path) -> dict[str, str]:
    """Read the part of each id from a folder that `write_split` wrote.

    Raises:
        DataError: The folder has no split, or an id is in two parts.
    """
    try:
        names = list(json.loads((folder / SPLIT).read_text(encoding="utf-8"))["parts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: contains no {SPLIT}; make a split with `dermis data split`") from error
    parts: dict[str, str] = {}
    for name in names:
        for record_id in read_image_names(folder / f"{name}.csv")[0]:
            if record_id in parts:
                raise DataError(f"{folder}: {record_id} is in both {parts[record_id]} and {name}")
            parts[record_id] = name
    return parts


def read_split_values(folder: Path, column: str) -> dict[str, str]:
    """Read the values of a column by id, from a folder that `write_split` wrote. Parts without the column have none.

    Raises:
        DataError: The folder has no split.
    """
    values: dict[str, str] = {}
    for name in dict.fromkeys(read_split(folder).values()):
        grid = read_grid(folder / f"{name}.csv")
        id_column = find_column(grid.header, ID_COLUMNS)
        if id_column is not None and column in grid.header:
            values |= dict(zip(grid.column(id_column), grid.column(column), strict=True))
    return values


def _summary(part: SplitPart, whole: SplitPart) -> dict[str, Any]:
    return {
        "images": part.images,
        "wanted": round(part.target, 2),
        "groups": part.groups,
        "classes": dict(part.classes),
        "share": {cls: round(part.share(cls), 6) for cls in part.classes},
        "off_by_points": {cls: round(100 * (part.share(cls) - whole.share(cls)), 4) for cls in part.classes},
    }
