"""Exact nearest neighbours and distances between large sets of features, block by block.

Everything is float64: squared distances come from |a|^2 + |b|^2 - 2ab, whose rounding in float32 would hide how near a
copy is. A block is at most BLOCK distances, so 40,000 images against 40,000 need no more memory than the features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float32] | NDArray[np.float64]
BLOCK = 1 << 22
SLACK = 1 + 1e-9  # of a radius: what is exactly as far away counts as within, whichever way rounding went
ROUNDING = 1e-12  # of |a|^2 + |b|^2: what float64 cannot tell from zero over thousands of dimensions


def squared_distances(queries: Features, base: Features, block: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
    """Squared Euclidean distances from rows of queries [N, dim] to all of base [M, dim], as (rows, [rows, M]) blocks.

    Equal vectors are at exactly 0. Raises ValueError if the sets are empty or of different dimension.
    """
    if queries.ndim != 2 or base.ndim != 2 or queries.shape[1] != base.shape[1] or not len(queries) or not len(base):
        raise ValueError(f"features of shape {queries.shape} and {base.shape} have no distances")
    b = torch.from_numpy(np.asarray(base, dtype=np.float64))
    b_norms = b.square().sum(dim=1)
    step = max(1, block // len(b))
    for start in range(0, len(queries), step):
        rows = slice(start, min(start + step, len(queries)))
        a = torch.from_numpy(np.asarray(queries[rows], dtype=np.float64))
        norms = a.square().sum(dim=1, keepdim=True) + b_norms
        squared = torch.addmm(norms, a, b.T, alpha=-2)
        yield rows, squared.masked_fill_(squared < ROUNDING * norms, 0.0)


def nearest(
    queries: Features, base: Features, k: int = 1, *, exclude_self: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distances [N, k], ascending, and indices [N, k] of the k nearest rows of base [M, dim] to queries [N, dim].

    exclude_self: queries and base are the same set, and row i is no neighbour of itself (a duplicate of it is).
    Raises ValueError if base has fewer than k rows to offer.
    """
    if k < 1 or k > len(base) - exclude_self:
        raise ValueError(f"{k} neighbours asked for among {len(base) - exclude_self}")
    distances = np.empty((len(queries), k))
    indices = np.empty((len(queries), k), dtype=np.int64)
    for rows, squared in squared_distances(queries, base):
        if exclude_self:
            squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = torch.inf
        values, positions = squared.topk(k, dim=1, largest=False)
        distances[rows], indices[rows] = values.sqrt().numpy(), positions.numpy()
    return distances, indices


def radii(base: Features, k: int) -> NDArray[np.float64]:
    """NND_k [M]: the distance from each row of base [M, dim] to its k-th nearest other row.

    Longer by a part in 10^9, so that what is exactly as far away counts as within whichever way rounding went.
    """
    return nearest(base, base, k, exclude_self=True)[0][:, -1] * SLACK


def distinct_radii(base: Features, same: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """[M]: the distance from each row of base [M, dim] to the nearest other one farther than `same`, and whether any is nearer.

    Infinite where all others are within `same`. Longer by a part in 10^9, as in `radii`.
    """
    nearest, near = np.empty(len(base)), np.empty(len(base), dtype=bool)
    for rows, squared in squared_distances(base, base):
        squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = torch.inf
        within = squared <= same**2
        near[rows] = within.any(dim=1).numpy()
        nearest[rows] = squared.masked_fill_(within, torch.inf).min(dim=1).values.sqrt().numpy()
    return nearest * SLACK, near
