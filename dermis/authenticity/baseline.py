"""The real-to-real baseline: radius of each training image (distance to the nearest other one). Near-duplicates are grouped.

The distance of two copies of an image says nothing about how similar images of two patients are. If copies counted as
neighbours, two per cent of them would make the first percentile of the radii zero, and every copy of a training image would
pass a gate that is based on it. So near-duplicates, and images of one patient or lesion if these are known, form a group (a
connected component), and the radius of an image is its distance to the nearest image of another group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dermis.authenticity.index import Floats, import_faiss, products_of_matrices, search
from dermis.authenticity.verdict import SAME_SHARE
from dermis.bundle.index import Duplicates
from dermis.errors import RequestError

MAX_COPY_SHARE = 0.5
"""Upper bound for the distance of a copy, as a share of the typical distance. It limits the value from re-compression."""
COPY_PERCENTILE = 99
EXACT_RADII = 200_000  # largest number of vectors for which every pair is compared
_VERIFIED = 1000  # radii that an exact search checks
_PAIRS = 2000  # images from which the typical distance is computed
_FIRST, _BLOCK = 16, 1 << 23  # neighbours of the first search; largest number of results of one search

Pairs = NDArray[np.int64]


@dataclass(frozen=True)
class Copies:
    """Measurements on the pixels of training images, to find copies.

    Attributes:
        features: Features [S, feature_dim] of re-compressed training images.
        indices: Indices [S] of the originals in the training set.
        similar_pairs: Pairs [P, 2] of training images with nearly the same perceptual hash.
    """

    features: Floats
    indices: NDArray[np.int64]
    similar_pairs: Pairs


@dataclass(frozen=True)
class Baseline:
    """The baseline of N training images.

    Attributes:
        radii: Distance [N] of each image to the nearest one of another group.
        duplicates: Near-duplicates among the images.
        exact: Share of the radii that an exact search confirms.
    """

    radii: Floats
    duplicates: Duplicates
    exact: float


def baseline(
    base: Any,
    rows: Floats,
    *,
    groups: Sequence[str] | None,
    similar_pairs: Pairs | None,
    copy_distances: Floats | None,
    threads: int,
) -> Baseline:
    """Compute the baseline of an index.

    Args:
        base: FAISS index of N vectors.
        rows: The same embeddings [N, dim] in the space of the index, not rounded.
        groups: Patient or lesion of each image, if known.
        similar_pairs: Pairs [P, 2] of images with nearly the same pixels.
        copy_distances: Distances of re-compressed images to their originals.
        threads: CPU cores to use.

    Raises:
        RequestError: So many images are near-duplicates that no radius can be trusted.
    """
    count = len(rows)
    typical = typical_distance(rows)
    if typical <= 0:
        raise RequestError(
            "images",
            f"nearly all of the {count:,} images are copies of one image, so distances between them are meaningless",
        )
    same = SAME_SHARE * typical
    copy = 0.0
    if copy_distances is not None and len(copy_distances):
        copy = min(float(np.percentile(copy_distances, COPY_PERCENTILE)), MAX_COPY_SHARE * typical)
    searched, exact = (_exact(base, rows.shape[1]), True) if count <= EXACT_RADII else (base, False)
    near = _near_pairs(searched, rows, same, threads)
    if similar_pairs is not None and len(similar_pairs):
        pair_distances = np.linalg.norm(rows[similar_pairs[:, 0]] - rows[similar_pairs[:, 1]], axis=1)
        near = np.concatenate([near, similar_pairs[pair_distances <= max(copy, same)]])
    component = _components(count, near)
    sizes = np.bincount(component)
    _check_largest(int(sizes.max()), count)
    group = component
    if groups is not None:
        _, first, number = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        group = _components(count, np.concatenate([near, np.stack([np.arange(count), first[number]], axis=1)]))
    distinct = int(group.max()) + 1
    if distinct < 2:
        raise RequestError("images", f"the {count:,} images are all of one patient, or copies of such images")
    radii = _radii(searched, rows, group, threads)
    share = 1.0 if exact else _confirmed(base, rows, group, radii)
    duplicates = Duplicates(
        images=int(sizes[sizes > 1].sum()),
        groups=int((sizes > 1).sum()),
        largest=int(sizes.max()) if sizes.max() > 1 else 0,
        distinct=distinct,
        held_out=0,
        typical_distance=typical,
        same_distance=same,
        copy_distance=copy,
        copy_median=0.0 if copy_distances is None or not len(copy_distances) else float(np.median(copy_distances)),
        copies=0 if copy_distances is None else len(copy_distances),
        copies_nearer=0.0,
    )
    return Baseline(radii, duplicates, share)


def typical_distance(rows: NDArray[np.floating]) -> float:
    """Return the median distance between two rows of [N, dim], from at most 2,000 evenly chosen ones."""
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _PAIRS)).round().astype(np.int64))]
    x = chosen.astype(np.float64) - chosen.mean(axis=0, dtype=np.float64)
    norms = (x**2).sum(axis=1)
    squared = norms[:, None] + norms[None] - 2 * (x @ x.T)
    median = float(np.median(squared[np.triu_indices(len(x), 1)]))
    return float(np.sqrt(median)) if median > 1e-9 * max(float(norms.mean()), 1e-30) else 0.0


def _exact(base: Any, width: int) -> Any:
    """Return an index of the same vectors that searches exactly, which can be `base` itself."""
    faiss = import_faiss()
    if isinstance(base, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        return base
    flat = faiss.IndexFlatL2(width)
    flat.add(base.reconstruct_n(0, base.ntotal))
    return flat


def _near_pairs(index: Any, rows: Floats, limit: float, threads: int) -> Pairs:
    """Find pairs [P, 2] that are at most `limit` apart. Raises RequestError if a row has more than N / 2 such neighbours."""
    count = len(rows)
    pairs = [np.empty((0, 2), np.int64)]
    pending = np.arange(count)
    k = min(_FIRST, count)
    while len(pending):
        left = []
        for numbers, distances, neighbours in _searches(index, rows, pending, k, threads):
            near = (distances <= limit) & (neighbours >= 0)
            more = near[:, -1] & (k < count)
            left.append(numbers[more])
            row, column = np.nonzero(near & ~more[:, None])
            indices = np.stack([numbers[row], neighbours[row, column]], axis=1)
            pairs.append(indices[indices[:, 0] != indices[:, 1]])
        pending = np.concatenate(left)
        if len(pending) and 2 * k > count:
            _check_largest(k, count)
        k = min(4 * k, count)
    return np.concatenate(pairs)


def _radii(index: Any, rows: Floats, group: NDArray[np.int64], threads: int) -> Floats:
    """Return the distance [N] of each row to the nearest vector of another group. There must be at least two groups."""
    radii = np.zeros(len(rows), np.float32)
    pending = np.arange(len(rows))
    k = min(_FIRST, len(rows))
    while len(pending):
        left = []
        for numbers, distances, neighbours in _searches(index, rows, pending, k, threads):
            other = (group[np.maximum(neighbours, 0)] != group[numbers][:, None]) & (neighbours >= 0)
            known = other.any(axis=1)
            first = other.argmax(axis=1)
            radii[numbers[known]] = distances[known, first[known]]
            if k == len(rows):  # an approximate index returned fewer vectors than it has: the farthest is a lower bound
                reached = np.where(neighbours >= 0, distances, 0).max(axis=1)
                radii[numbers[~known]] = reached[~known]
            else:
                left.append(numbers[~known])
        pending = np.concatenate(left) if left else np.empty(0, np.int64)
        k = min(4 * k, len(rows))
    return radii


def _searches(index: Any, rows: Floats, numbers: NDArray[np.int64], k: int, threads: int) -> Any:
    """Search in parts that fit into memory. Yields (numbers [n], distances [n, k], neighbours [n, k])."""
    step = max(1, _BLOCK // k)
    for start in range(0, len(numbers), step):
        part = numbers[start : start + step]
        squared, neighbours = search(index, np.ascontiguousarray(rows[part]), k, threads)
        yield part, np.sqrt(np.maximum(squared, 0)), neighbours


def _confirmed(base: Any, rows: Floats, group: NDArray[np.int64], radii: Floats) -> float:
    """Return the share of 1,000 evenly chosen radii that an exact search confirms within 1 %."""
    faiss = import_faiss()
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _VERIFIED)).round().astype(np.int64))
    best = np.full(len(chosen), np.inf)
    step = 100_000
    with products_of_matrices():
        for start in range(0, len(rows), step):
            stored = base.reconstruct_n(start, min(step, len(rows) - start))
            k = min(64, len(stored))
            squared, neighbours = faiss.knn(rows[chosen], stored, k)
            other = group[neighbours + start] != group[chosen][:, None]
            nearest = np.where(other, np.sqrt(np.maximum(squared, 0)), np.inf).min(axis=1)
            best = np.minimum(best, nearest)
    return float((np.abs(radii[chosen] - best) <= 0.01 * best + 1e-4).mean())


def _components(count: int, pairs: Pairs) -> NDArray[np.int64]:
    """Return the number of the connected component of each image, [count]."""
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    number: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return number


def _check_largest(largest: int, count: int) -> None:
    if largest > 2 and 2 * largest > count:
        raise RequestError(
            "images",
            f"more than half of the {count:,} images are near-duplicates of one another, so that no distance between "
            "training images can be trusted; remove them with `dermis data leaks --remove`, or choose another --extractor "
            "if they are different images",
        )
