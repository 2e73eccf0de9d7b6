"""Near-duplicates in a source and across the parts of a split: found, put in order, and taken out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.errors import DataError
from dermis.features import FeatureExtractor
from training.data.duplicates import (
    EMBEDDING_SIMILARITY,
    HASH_DISTANCE,
    Pairs,
    embedding_pairs,
    hash_pairs,
    perceptual_hashes,
)
from training.data.images import BROKEN_IMAGE, square
from training.data.sources import Record, Source
from training.data.splits import describe_split, group_of, write_rows, write_split

SIDE = 224  # px: near-duplicates are looked for in the centred square that training sees, at this size
COLUMNS = (
    *("id_a", "id_b", "part_a", "part_b", "class_a", "class_b"),
    *("same_patient", "identical", "found_by", "hash_distance", "similarity"),
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
    hash_distance: int | None  # bits of 64, if the hash found them
    similarity: float | None  # cosine, if the embedding found them


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
    max_distance: int = HASH_DISTANCE,
    min_similarity: float = EMBEDDING_SIMILARITY,
    mirrors: bool = False,
    progress: bool = True,
) -> Leaks:
    """Compare every image with every other by perceptual hash and, with an extractor, by embedding.

    `parts` gives the part of each id, as `read_split` does; the images in no part are left out. Thresholds and
    `mirrors` are those of `training.data.duplicates`. Images that are missing or broken are left out and listed.
    """
    if parts is not None:
        source = source.select(parts)
    records, digests, hashes, features, broken = _signatures(source.records, extractor, progress)
    by_hash = _found(hash_pairs(hashes, max_distance, mirrors=mirrors))
    by_embedding = _found(embedding_pairs(features, min_similarity)) if extractor else {}
    of = tuple(parts[record.id] if parts else "" for record in records)
    groups = group_of(records)
    pairs = []
    for a, b in sorted(by_hash.keys() | by_embedding.keys()):
        bits, distance = by_hash.get((a, b)), by_embedding.get((a, b))
        pairs.append(
            Pair(
                a,
                b,
                of[a] != of[b],
                groups[a] == groups[b],
                digests[a] == digests[b],
                None if bits is None else int(bits),
                None if distance is None else 1 - distance,
            )
        )
    pairs.sort(key=lambda pair: (not pair.across, not pair.identical, -(pair.similarity or 0), pair.hash_distance or 0))
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
    """The pairs as a CSV, in their order."""
    rows = []
    for pair in leaks.pairs:
        a, b = leaks.records[pair.a], leaks.records[pair.b]
        by_hash, by_embedding = pair.hash_distance is not None, pair.similarity is not None
        values = (
            *(a.id, b.id, leaks.parts[pair.a], leaks.parts[pair.b], a.class_name, b.class_name),
            *("yes" if pair.same_patient else "no", "yes" if pair.identical else "no"),
            "both" if by_hash and by_embedding else "hash" if by_hash else "embedding",
            "" if pair.hash_distance is None else str(pair.hash_distance),
            "" if pair.similarity is None else f"{pair.similarity:.4f}",
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    write_rows(file, COLUMNS, rows)


def write_cleaned(source: Source, parts: Mapping[str, str] | None, removed: set[str], out: Path) -> None:
    """The source's rows without the removed: a split folder like the one given, or cleaned.csv in `out` without one."""
    kept = source.select(parts if parts else [record.id for record in source.records])
    kept = kept.select(record.id for record in kept.records if record.id not in removed)
    if parts:
        targets = {name: float(count) for name, count in Counter(parts.values()).items()}
        of = [parts[record.id] for record in kept.records]
        write_split(kept, describe_split(kept.records, of, targets), out)
        return
    columns = list(dict.fromkeys(column for record in kept.records for column in record.row))
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "cleaned.csv", columns, [record.row for record in kept.records])


def _signatures(
    records: Sequence[Record], extractor: FeatureExtractor | None, progress: bool
) -> tuple[list[Record], list[str], NDArray[np.uint64], NDArray[np.float32], list[tuple[str, str]]]:
    """Records that can be read, with the sha256 of their files, their hashes and features; and those that cannot."""
    good: list[Record] = []
    digests: list[str] = []
    hashes: list[NDArray[np.uint64]] = []
    features: list[NDArray[np.float32]] = []
    broken: list[tuple[str, str]] = []

    def read(record: Record) -> tuple[str, NDArray[np.uint8]] | str:
        try:
            data = record.read_bytes()
            return hashlib.sha256(data).hexdigest(), square(data, SIDE)
        except (DataError, *BROKEN_IMAGE) as error:
            return " ".join(str(error).split())

    bar = tqdm(total=len(records), desc="comparing", disable=not progress, unit="img")
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(records), _BATCH):
            batch = records[start : start + _BATCH]
            images = []
            for record, result in zip(batch, pool.map(read, batch), strict=True):
                if isinstance(result, str):
                    broken.append((record.id, result))
                else:
                    good.append(record)
                    digests.append(result[0])
                    images.append(result[1])
            if images:
                hashes.append(perceptual_hashes(images))
                if extractor:
                    features.append(extractor.extract(np.stack(images)))
            bar.update(len(batch))
    if not good:
        raise DataError(f"not one of {len(records)} images can be read")
    dim = extractor.dim if extractor else 0
    stacked = np.concatenate(features) if features else np.zeros((len(good), dim), dtype=np.float32)
    return good, digests, np.concatenate(hashes), stacked, broken


def _found(pairs: Pairs) -> dict[tuple[int, int], float]:
    return dict(zip(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True), pairs.distance.tolist(), strict=True))
