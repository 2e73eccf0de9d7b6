"""Exact nearest neighbours and distances between large sets of features, in blocks.

Everything is float64: squared distances are |a|^2 + |b|^2 - 2ab, whose rounding in float32 would hide how near a copy is. A
block has at most BLOCK distances, so 40,000 images against 40,000 need no more memory than their features.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Features = NDArray[np.float32] | NDArray[np.float64]
BLOCK = 1 << 22
SLACK = 1 + 1e-9  # factor of a radius, so that points at exactly this distance count as inside whatever the rounding is
ROUNDING = 1e-12  # share of |a|^2 + |b|^2 that is not distinguishable from zero over thousands of dimensions


def squared_distances(queries: Features, base: Features, block: int = BLOCK) -> Iterator[tuple[slice, Tensor]]:
    """Compute squared Euclidean distances from queries [N, dim] to base [M, dim], in blocks. Equal vectors have exactly 0.

    Yields:
        A slice of rows, and their distances [rows, M].

    Raises:
        ValueError: A set is empty, or dimensions differ.
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
    """Find the k nearest rows of base [M, dim] for each row of queries [N, dim].

    Args:
        queries: Rows [N, dim].
        base: Rows [M, dim].
        k: Number of neighbours.
        exclude_self: Whether queries and base are the same set, and row i is not a neighbour of itself. Its duplicates are.

    Returns:
        Distances [N, k], ascending, and indices [N, k].

    Raises:
        ValueError: `base` has too few rows.
    """
    if k < 1 or k > len(base) - exclude_self:
        raise ValueError(f"{k} neighbours were requested, but there are only {len(base) - exclude_self}")
    distances = np.empty((len(queries), k))
    indices = np.empty((len(queries), k), dtype=np.int64)
    for rows, squared in squared_distances(queries, base):
        if exclude_self:
            squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = torch.inf
        values, positions = squared.topk(k, dim=1, largest=False)
        distances[rows], indices[rows] = values.sqrt().numpy(), positions.numpy()
    return distances, indices


def radii(base: Features, k: int) -> NDArray[np.float64]:
    """Compute NND_k [M]: the distance from each row of base [M, dim] to its k-th nearest other row.

    It is larger by a factor of 1 + 1e-9, so that points at exactly this distance count as inside whatever the rounding is.
    """
    return nearest(base, base, k, exclude_self=True)[0][:, -1] * SLACK


def distinct_radii(base: Features, same: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Compute the distance [M] from each row of base [M, dim] to the nearest other row farther than `same`.

    It is infinite if all others are within `same`, and larger by a factor of 1 + 1e-9, as in `radii`.

    Returns:
        The distances, and whether another row is within `same`, bool [M].
    """
    nearest, near = np.empty(len(base)), np.empty(len(base), dtype=bool)
    for rows, squared in squared_distances(base, base):
        squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = torch.inf
        within = squared <= same**2
        near[rows] = within.any(dim=1).numpy()
        nearest[rows] = squared.masked_fill_(within, torch.inf).min(dim=1).values.sqrt().numpy()
    return nearest * SLACK, near
