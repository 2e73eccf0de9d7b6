"""Find and remove near-duplicates in a source and across the parts of a split."""

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
from dermis.image_reading import read_training_image
from dermis.perceptual_hash import perceptual_hashes
from training.data.cache import new_array, read_array
from training.data.duplicates import (
    CORRELATION,
    Pairs,
    confirmed,
    embedding_pairs,
    hash_pairs,
    union,
)
from training.data.embedding import CHUNK, progress_bar
from training.data.images import BROKEN_IMAGE, in_threads
from training.data.sources import Record, Source
from training.data.splits import describe_split, group_of, write_records, write_rows, write_split

if TYPE_CHECKING:  # importing it loads torch, which the hash does not need
    from dermis.features import FeatureExtractor

SIDE = 224  # px of the compared images, which are the centred squares that training uses
COLUMNS = (
    *("id_a", "id_b", "part_a", "part_b", "class_a", "class_b"),
    *("same_patient", "identical", "correlation", "hash_distance", "similarity"),
)


@dataclass(frozen=True)
class Pair:
    """Two near-duplicates; a and b are indices into `Leaks.records`."""

    a: int
    b: int
    across: bool  # the images are in different parts of the split
    same_patient: bool  # the metadata state the same patient or lesion
    identical: bool  # both files are equal
    correlation: float  # correlation of the two images when aligned, at most 1
    hash_distance: int | None  # differing bits of 64; None if the hash did not propose the pair
    similarity: float | None  # cosine of whitened features; None if the embedding did not propose the pair


@dataclass(frozen=True)
class Leaks:
    """Near-duplicates among the records of a source."""

    records: tuple[Record, ...]
    parts: tuple[str, ...]  # part of each record; "" without a split
    pairs: tuple[Pair, ...]  # across parts first, then identical files, then by falling correlation
    broken: tuple[tuple[str, str], ...]  # (id, reason) of images that cannot be read

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
    """Propose pairs by perceptual hash and by embedding, and keep those whose images match when aligned.

    Images that are missing or broken are left out and listed.

    Args:
        source: The images.
        parts: Part of each id, as `read_split` returns it; images in no part are left out.
        extractor: Feature space that proposes pairs; None for the hash alone.
        min_correlation: Smallest correlation of a pair that counts.
        mirrors: Whether to find copies that are mirrored or turned by 180 degrees, too.
        cache: Folder for features, stored with the hash of the pixels, so that only changed images are embedded again.
        progress: Whether to show progress bars.
    """
    if parts is not None:
        source = source.select(parts)
    records, digests, hashes, features, broken = _hash_and_embed(source.records, extractor, cache, progress)
    by_hash, by_embedding = hash_pairs(hashes, mirrors=mirrors), None
    candidates = by_hash
    if features is not None:
        by_embedding = embedding_pairs(features)
        candidates = union(by_hash, by_embedding)
    matches = confirmed(candidates, lambda i: _pixels(records[i]), min_correlation, mirrors=mirrors, progress=progress)
    bits, similar = _by_ends(by_hash), _by_ends(by_embedding) if by_embedding else {}
    part_of = tuple(parts[record.id] if parts else "" for record in records)
    groups = group_of(records)
    pairs = [
        Pair(
            a,
            b,
            across=part_of[a] != part_of[b],
            same_patient=groups[a] == groups[b],
            identical=digests[a] == digests[b],
            correlation=1 - distance,
            hash_distance=int(bits[a, b]) if (a, b) in bits else None,
            similarity=1 - similar[a, b] if (a, b) in similar else None,
        )
        for (a, b), distance in _by_ends(matches).items()
    ]
    pairs.sort(key=lambda pair: (not pair.across, not pair.identical, -pair.correlation, pair.a, pair.b))
    return Leaks(tuple(records), part_of, tuple(pairs), tuple(broken))


def ids_to_remove(leaks: Leaks, *, within_parts: bool = True) -> set[str]:
    """Ids to remove so that no pair is left or, without `within_parts`, no pair across parts.

    Images are visited from the smallest part to the largest, then by id. An image is kept unless one of its
    near-duplicates is kept already. So held-out parts stay complete, and images are removed from the training part.
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
    """Write the pairs as a CSV in their order.

    Raises:
        DataError: The file cannot be written.
    """
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
    """Write the rows of a source without the removed ids: a split folder if there are parts, else `out`/cleaned.csv."""
    kept = source.select(parts if parts else [record.id for record in source.records])
    kept = kept.select(record.id for record in kept.records if record.id not in removed)
    if parts:
        targets = {name: float(count) for name, count in Counter(parts.values()).items()}
        part_of = [parts[record.id] for record in kept.records]
        write_split(kept, describe_split(kept.records, part_of, targets), out)
        return
    file = out / "cleaned.csv"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_records(file, kept.records, kept)
    except OSError as error:
        raise DataError(f"{file}: cannot be written ({error.strerror})") from error


@dataclass(frozen=True)
class _HashedImage:
    """Hashes of one image."""

    file: str  # SHA-256 of the file
    digest: bytes  # SHA-256 of the pixels
    hash: np.uint64
    pixels: NDArray[np.uint8] | None  # None if they need not be embedded


def _hash_and_embed(
    records: Sequence[Record], extractor: FeatureExtractor | None, cache: Path | None, progress: bool
) -> tuple[list[Record], list[str], NDArray[np.uint64], NDArray[np.float32] | None, list[tuple[str, str]]]:
    """Read, hash and embed images. Each file is read and decoded once, in threads ahead of the network.

    Returns:
        For images that can be read: records, SHA-256 of the files, perceptual hashes, and features [N, dim] (None
        without an extractor). For the others: (id, reason).
    """
    rows = np.zeros(len(records), _row(extractor)) if extractor else None
    file = _cache_file(records, extractor, cache) if extractor and cache else None
    kept = None if file is None or rows is None else _kept_rows(file, rows)

    def hash_image(place: int) -> _HashedImage | str:
        try:
            data = records[place].read_bytes()
            pixels = read_training_image(data, SIDE)
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
        for place, result in enumerate(in_threads(hash_image, range(len(records)))):
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
        raise DataError(f"none of the {len(records)} images can be read")
    if file is not None and rows is not None and (kept is None or not np.array_equal(rows, kept)):
        with new_array(file, rows.shape, rows.dtype) as array:
            array[:] = rows
    readable, digests, hashes = (list(column) for column in zip(*good, strict=True))
    features = None if rows is None else np.ascontiguousarray(rows["features"][places])
    return readable, digests, np.array(hashes, dtype=np.uint64), features, broken


def _row(extractor: FeatureExtractor) -> np.dtype[np.void]:
    """Type of a row of the cache: SHA-256 of the pixels (zeros if the image could not be read), and features."""
    return np.dtype([("digest", np.uint8, (32,)), ("features", np.float32, (extractor.dim,))])


def _cache_file(records: Sequence[Record], extractor: FeatureExtractor, cache: Path) -> Path:
    key = hashlib.sha256("\n".join([extractor.identity, str(SIDE), *(record.id for record in records)]).encode())
    return cache / f"leaks-{key.hexdigest()[:24]}.npy"


def _kept_rows(file: Path, like: NDArray[np.void]) -> NDArray[np.void] | None:
    """Rows of the cache for the same images, whose files can have changed since; None if there are none."""
    kept: NDArray[np.void] | None = read_array(file, like.shape)
    return kept if kept is not None and kept.dtype == like.dtype else None


def _pixels(record: Record) -> NDArray[np.uint8]:
    return read_training_image(record.read_bytes(), SIDE)


def _by_ends(pairs: Pairs) -> dict[tuple[int, int], float]:
    return dict(zip(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True), pairs.distance.tolist(), strict=True))
