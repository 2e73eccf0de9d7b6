"""Near-duplicates in a source and across the parts of a split: found, put in order, and taken out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.errors import DataError
from training.data.cache import new_array, read_array
from training.data.duplicates import (
    CORRELATION,
    Pairs,
    confirmed,
    embedding_pairs,
    hash_pairs,
    perceptual_hashes,
    union,
)
from training.data.images import BROKEN_IMAGE, in_threads, square
from training.data.sources import Record, Source
from training.data.splits import describe_split, group_of, write_records, write_rows, write_split

if TYPE_CHECKING:  # importing it takes torch, which the hash does without
    from dermis.features import FeatureExtractor

SIDE = 224  # px: near-duplicates are looked for in the centred square that training sees, at this size
COLUMNS = (
    *("id_a", "id_b", "part_a", "part_b", "class_a", "class_b"),
    *("same_patient", "identical", "correlation", "hash_distance", "similarity"),
)
_BATCH = 32


@dataclass(frozen=True)
class Pair:
    """Two near-duplicates: a and b index `Leaks.records`."""

    a: int
    b: int
    across: bool  # in two parts of the split
    same_patient: bool  # or lesion, by the metadata
    identical: bool  # the same file
    correlation: float  # of the two laid over each other, at most 1
    hash_distance: int | None  # bits of 64, if the hash made them a candidate
    similarity: float | None  # cosine of whitened features, if the embedding did


@dataclass(frozen=True)
class Leaks:
    """Pairs across parts first, then the closest first. parts are '' without a split; broken is (id, reason)."""

    records: tuple[Record, ...]
    parts: tuple[str, ...]
    pairs: tuple[Pair, ...]
    broken: tuple[tuple[str, str], ...]

    @property
    def across(self) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair.across)


def find_leaks(
    source: Source,
    parts: Mapping[str, str] | None = None,
    *,
    extractor: FeatureExtractor | None = None,
    min_correlation: float = CORRELATION,
    mirrors: bool = False,
    cache: Path | None = None,
    progress: bool = True,
) -> Leaks:
    """Compare every image with every other by perceptual hash and, with an extractor, by embedding; confirm what is near.

    `parts` gives the part of each id, as `read_split` does; the images in no part are left out. Images that are missing
    or broken are left out and listed. `mirrors` also finds copies that are mirrored or turned by 180 degrees. Features
    are kept in `cache`, keyed by the files and the extractor.
    """
    if parts is not None:
        source = source.select(parts)
    records, digests, hashes, broken = _hashed(source.records, progress)
    by_hash, by_embedding = hash_pairs(hashes, mirrors=mirrors), None
    candidates = by_hash
    if extractor:
        by_embedding = embedding_pairs(_features(records, digests, extractor, cache, progress))
        candidates = union(by_hash, by_embedding)
    near = confirmed(candidates, lambda i: _pixels(records[i]), min_correlation, mirrors=mirrors, progress=progress)
    bits, similar = _by_ends(by_hash), _by_ends(by_embedding) if by_embedding else {}
    of = tuple(parts[record.id] if parts else "" for record in records)
    groups = group_of(records)
    pairs = [
        Pair(
            a,
            b,
            across=of[a] != of[b],
            same_patient=groups[a] == groups[b],
            identical=digests[a] == digests[b],
            correlation=1 - distance,
            hash_distance=int(bits[a, b]) if (a, b) in bits else None,
            similarity=1 - similar[a, b] if (a, b) in similar else None,
        )
        for (a, b), distance in _by_ends(near).items()
    ]
    pairs.sort(key=lambda pair: (not pair.across, not pair.identical, -pair.correlation, pair.a, pair.b))
    return Leaks(tuple(records), of, tuple(pairs), tuple(broken))


def surplus(leaks: Leaks, *, within_parts: bool = True) -> set[str]:
    """Ids to remove so that no pair is left; without `within_parts`, no pair across parts.

    Images are kept in order, the smallest part first and then by id, unless a near-duplicate is kept already: a held-out
    part stays whole and the training part gives way.
    """
    sizes = Counter(leaks.parts)
    neighbours: dict[int, set[int]] = {}
    for pair in leaks.pairs:
        if within_parts or pair.across:
            neighbours.setdefault(pair.a, set()).add(pair.b)
            neighbours.setdefault(pair.b, set()).add(pair.a)
    kept: set[int] = set()
    for i in sorted(neighbours, key=lambda i: (sizes[leaks.parts[i]], leaks.parts[i], leaks.records[i].id)):
        if not neighbours[i] & kept:
            kept.add(i)
    return {leaks.records[i].id for i in neighbours.keys() - kept}


def write_leaks(leaks: Leaks, file: Path) -> None:
    """The pairs as a CSV, in their order. DataError if it cannot be written."""
    rows = []
    for pair in leaks.pairs:
        a, b = leaks.records[pair.a], leaks.records[pair.b]
        values = (
            *(a.id, b.id, leaks.parts[pair.a], leaks.parts[pair.b], a.class_name, b.class_name),
            *("yes" if pair.same_patient else "no", "yes" if pair.identical else "no"),
            f"{pair.correlation:.4f}",
            "" if pair.hash_distance is None else str(pair.hash_distance),
            "" if pair.similarity is None else f"{pair.similarity:.4f}",
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(file, COLUMNS, rows)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error


def write_cleaned(source: Source, parts: Mapping[str, str] | None, removed: set[str], out: Path) -> None:
    """The source's rows without the removed: a split folder like the one given, or cleaned.csv in `out` without one."""
    kept = source.select(parts if parts else [record.id for record in source.records])
    kept = kept.select(record.id for record in kept.records if record.id not in removed)
    if parts:
        targets = {name: float(count) for name, count in Counter(parts.values()).items()}
        of = [parts[record.id] for record in kept.records]
        write_split(kept, describe_split(kept.records, of, targets), out)
        return
    file = out / "cleaned.csv"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_records(file, kept.records, kept)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error


def _hashed(
    records: Sequence[Record], progress: bool
) -> tuple[list[Record], list[str], NDArray[np.uint64], list[tuple[str, str]]]:
    """Records that can be read, with the sha256 of their files and their hashes; and (id, reason) of those that cannot."""

    def hashed(record: Record) -> tuple[str, np.uint64] | str:
        try:
            data = record.read_bytes()
            return hashlib.sha256(data).hexdigest(), perceptual_hashes([square(data, SIDE)])[0]
        except BROKEN_IMAGE as error:
            return " ".join(str(error).split())

    good: list[tuple[Record, str, np.uint64]] = []
    broken: list[tuple[str, str]] = []
    results = tqdm(in_threads(hashed, records), "hashing", len(records), disable=not progress, unit="img")
    for record, result in zip(records, results, strict=True):
        if isinstance(result, str):
            broken.append((record.id, result))
        else:
            good.append((record, *result))
    if not good:
        raise DataError(f"not one of {len(records)} images can be read")
    readable, digests, hashes = (list(column) for column in zip(*good, strict=True))
    return readable, digests, np.array(hashes, dtype=np.uint64), broken


def _features(
    records: Sequence[Record], digests: Sequence[str], extractor: FeatureExtractor, cache: Path | None, progress: bool
) -> NDArray[np.float32]:
    key = hashlib.sha256("\n".join([extractor.identity, str(SIDE), *digests]).encode()).hexdigest()
    file = cache / f"leaks-{key[:24]}.npy" if cache else None
    shape = (len(records), extractor.dim)
    if file and (kept := read_array(file, shape)) is not None:
        return kept
    starts = tqdm(range(0, len(records), _BATCH), "embedding", disable=not progress, unit="batch")
    features = extractor.over(np.stack([_pixels(record) for record in records[i : i + _BATCH]]) for i in starts)
    if file:
        with new_array(file, shape, np.float32) as array:
            array[:] = features
    return features


def _pixels(record: Record) -> NDArray[np.uint8]:
    return square(record.read_bytes(), SIDE)


def _by_ends(pairs: Pairs) -> dict[tuple[int, int], float]:
    return dict(zip(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True), pairs.distance.tolist(), strict=True))
