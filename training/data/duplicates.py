"""Near-duplicates: images of one lesion, or copies of one image, found by perceptual hash and by embedding.

A near-duplicate that stands in training and in validation makes every score too good, and a generator that is trained
on copies learns to repeat them. Each method gives `Pairs`; `groups` joins pairs to connected components. All pairs are
compared, in blocks: 40,000 images need a few hundred MB, never an N x N matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HASH_SIDE = 32  # pixels: images are shrunk to this square before the transform
HASH_DISTANCE = 6  # of 64 bits
EMBEDDING_SIMILARITY = 0.95  # cosine, lite0
_BLOCK = 2048  # rows compared at once


@dataclass(frozen=True)
class Pairs:
    """Pairs of images with i < j, in ascending order of (i, j). All three have length P."""

    i: NDArray[np.int64]
    j: NDArray[np.int64]
    distance: NDArray[np.float64]  # Hamming distance in bits, or 1 - cosine similarity

    def __len__(self) -> int:
        return len(self.i)


def perceptual_hashes(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    """pHash of RGB images [H, W, 3] of any sizes: uint64 [N], one bit for each of 64 low frequencies.

    Luminance at 32 x 32 px, type-II DCT, the signs of the coefficients with frequencies 1..8 in both directions. It is
    the hash of Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), section 3.2.1, but
    for the threshold, zero instead of the median: so mirroring the image only flips known bits (see `mirrored`).
    """
    return np.array([_hash(image) for image in images], dtype=np.uint64)


def _hash(image: NDArray[np.uint8]) -> int:
    grey = Image.fromarray(image).convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    low = dctn(np.asarray(grey, np.float64), type=2)[1:9, 1:9]  # row u: vertical frequency, column v: horizontal
    return int(np.packbits(low > 0).view(">u8")[0])


def mirrored(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64 [N] -> [N, 4]: the hashes of the images as they are, mirrored left-right, top-bottom, and turned by 180 degrees.

    A mirrored signal changes the signs of its odd DCT-II coefficients and of no others, so no image is needed.
    """
    odd = np.arange(1, 9) % 2 == 1
    masks = [np.broadcast_to(False, (8, 8)), np.broadcast_to(odd, (8, 8)), np.broadcast_to(odd[:, None], (8, 8))]
    masks.append(masks[1] ^ masks[2])
    return hashes[:, None] ^ np.array([np.packbits(mask).view(">u8")[0] for mask in masks], dtype=np.uint64)


def hash_pairs(hashes: NDArray[np.uint64], max_distance: int = HASH_DISTANCE, *, mirrors: bool = False) -> Pairs:
    """All pairs of hashes [N] that differ in at most `max_distance` of 64 bits; distance is their number.

    `mirrors`: also find images that are each other's mirror image or are turned by 180 degrees (the least distance
    of the four positions counts).
    """
    if not 0 <= max_distance <= 64:
        raise ValueError(f"max_distance {max_distance} is not between 0 and 64 bits")
    others = mirrored(hashes) if mirrors else hashes[:, None]

    def distances(start: int, stop: int) -> NDArray[np.uint8]:
        block = np.full((stop - start, len(hashes) - start), 65, dtype=np.uint8)
        for position in range(others.shape[1]):
            differing = hashes[start:stop, None] ^ others[None, start:, position]
            np.minimum(block, np.bitwise_count(differing), out=block)
        return block

    return _pairs_in_blocks(len(hashes), distances, max_distance, block=256)


def embedding_pairs(features: NDArray[np.float32], min_similarity: float = EMBEDDING_SIMILARITY) -> Pairs:
    """All pairs of features [N, dim] with cosine similarity of at least `min_similarity`; distance is 1 - similarity."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = (features / np.maximum(norms, 1e-12)).astype(np.float32)
    return _pairs_in_blocks(
        len(unit), lambda start, stop: np.maximum(1 - unit[start:stop] @ unit[start:].T, 0), 1 - min_similarity
    )


def groups(pairs: Pairs) -> list[list[int]]:
    """Connected components of the pairs: each a sorted list of at least two images, in order of their first."""
    if len(pairs) == 0:
        return []
    members, ends = np.unique(np.concatenate([pairs.i, pairs.j]), return_inverse=True)
    rows, columns = ends[: len(pairs)], ends[len(pairs) :]
    graph = coo_array((np.ones(len(pairs)), (rows, columns)), shape=(len(members), len(members)))
    number, component = connected_components(graph, directed=False)
    found: list[list[int]] = [[] for _ in range(number)]
    for member, of in zip(members.tolist(), component.tolist(), strict=True):
        found[of].append(member)
    return sorted(found)


def _pairs_in_blocks(
    number: int,
    distances: Callable[[int, int], NDArray[np.uint8] | NDArray[np.float32]],
    limit: float,
    block: int = _BLOCK,
) -> Pairs:
    """Pairs i < j with distance <= limit. distances(start, stop) -> [stop - start, number - start]: rows against the rest."""
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for start in range(0, number, block):
        near = distances(start, min(start + block, number))
        rows, columns = np.nonzero(near <= limit)
        above = columns > rows
        rows, columns = rows[above], columns[above]
        found.append((rows + start, columns + start, near[rows, columns].astype(np.float64)))
    empty = np.zeros(0, dtype=np.int64)
    i, j, distance = (np.concatenate(part) for part in zip(*found, strict=True)) if found else (empty, empty, empty)
    return Pairs(i.astype(np.int64), j.astype(np.int64), distance.astype(np.float64))
