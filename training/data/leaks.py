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
from training.data.embedding import CHUNK, ahead, progress_bar
from training.data.images import BROKEN_IMAGE, square
from training.data.sources import Record, Source
from training.data.splits import describe_split, group_of, write_records, write_rows, write_split

if TYPE_CHECKING:  # importing it takes torch, which the hash does without
    from dermis.features import FeatureExtractor

SIDE = 224  # px: near-duplicates are looked for in the centred square that training sees, at this size
COLUMNS = (
    *("id_a", "id_b", "part_a", "part_b", "class_a", "class_b"),
    *("same_patient", "identical", "correlation", "hash_distance", "similarity"),
)


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
    are kept in `cache` by the images' pixels and the extractor, so that only images that have changed are embedded again.
    """
    if parts is not None:
        source = source.select(parts)
    records, digests, hashes, features, broken = _hash_and_embed(source.records, extractor, cache, progress)
    by_hash, by_embedding = hash_pairs(hashes, mirrors=mirrors), None
    candidates = by_hash
    if features is not None:
        by_embedding = embedding_pairs(features)
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


@dataclass(frozen=True)
class _HashedImage:
    """One image: the SHA-256 of its file and of its pixels, its hash, and its pixels if they are still to be embedded."""

    file: str
    digest: bytes
    hash: np.uint64
    pixels: NDArray[np.uint8] | None


def _hash_and_embed(
    records: Sequence[Record], extractor: FeatureExtractor | None, cache: Path | None, progress: bool
) -> tuple[list[Record], list[str], NDArray[np.uint64], NDArray[np.float32] | None, list[tuple[str, str]]]:
    """Records that can be read, with the SHA-256 of their files, hashes and features; and (id, reason) of those that cannot.

    Each file is read and decoded once, in threads ahead of the network.
    """
    rows = np.zeros(len(records), _row(extractor)) if extractor else None
    file = _cache_file(records, extractor, cache) if extractor and cache else None
    kept = None if file is None or rows is None else _kept_rows(file, rows)

    def hash_image(place: int) -> _HashedImage | str:
        try:
            data = records[place].read_bytes()
            pixels = square(data, SIDE)
            digest = hashlib.sha256(pixels.tobytes()).digest()
            known = extractor is None or (kept is not None and kept[place]["digest"].tobytes() == digest)
            return _HashedImage(
                hashlib.sha256(data).hexdigest(), digest, perceptual_hashes([pixels])[0], None if known else pixels
            )
        except BROKEN_IMAGE as error:
            return " ".join(str(error).split())

    good: list[tuple[Record, str, np.uint64]] = []
    broken: list[tuple[str, str]] = []
    places: list[int] = []
    waiting: list[tuple[int, NDArray[np.uint8]]] = []

    def embed_waiting() -> None:
        if extractor is not None and rows is not None and waiting:
            rows["features"][[place for place, _ in waiting]] = extractor.over([np.stack([x for _, x in waiting])])
            waiting.clear()

    name = "hashing and embedding" if extractor else "hashing"
    with progress_bar(len(records), name, disable=None if progress else True) as bar:
        for place, result in enumerate(ahead(hash_image, range(len(records)))):
            bar.update()
            if isinstance(result, str):
                broken.append((records[place].id, result))
                continue
            good.append((records[place], result.file, result.hash))
            places.append(place)
            if rows is not None:
                if result.pixels is None and kept is not None:
                    rows[place] = kept[place]
                elif result.pixels is not None:
                    waiting.append((place, result.pixels))
                rows["digest"][place] = np.frombuffer(result.digest, np.uint8)
            if len(waiting) == CHUNK:
                embed_waiting()
        embed_waiting()
    if not good:
        raise DataError(f"not one of {len(records)} images can be read")
    if file is not None and rows is not None and (kept is None or not np.array_equal(rows, kept)):
        with new_array(file, rows.shape, rows.dtype) as array:
            array[:] = rows
    readable, digests, hashes = (list(column) for column in zip(*good, strict=True))
    features = None if rows is None else np.ascontiguousarray(rows["features"][places])
    return readable, digests, np.array(hashes, dtype=np.uint64), features, broken


def _row(extractor: FeatureExtractor) -> np.dtype[np.void]:
    """What the cache holds of an image: the SHA-256 of its pixels, all zero where it could not be read, and its features."""
    return np.dtype([("digest", np.uint8, (32,)), ("features", np.float32, (extractor.dim,))])


def _cache_file(records: Sequence[Record], extractor: FeatureExtractor, cache: Path) -> Path:
    key = hashlib.sha256("\n".join([extractor.identity, str(SIDE), *(record.id for record in records)]).encode())
    return cache / f"leaks-{key.hexdigest()[:24]}.npy"


def _kept_rows(file: Path, like: NDArray[np.void]) -> NDArray[np.void] | None:
    """The cache's rows of the same images, whose files may have changed since; None if there are none."""
    kept: NDArray[np.void] | None = read_array(file, like.shape)
    return kept if kept is not None and kept.dtype == like.dtype else None


def _pixels(record: Record) -> NDArray[np.uint8]:
    return square(record.read_bytes(), SIDE)


def _by_ends(pairs: Pairs) -> dict[tuple[int, int], float]:
    return dict(zip(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True), pairs.distance.tolist(), strict=True))
