"""Nearest neighbours by cosine, exact, block by block. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROWS = 512


def unit(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Rows [N, D] scaled to length 1; a row of zeros stays as it is."""
    x = features.astype(np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    found: NDArray[np.float64] = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return found


def nearest_by_cosine(
    features: NDArray[np.float32], k: int, *, groups: Sequence[str] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Similarities [N, k], descending, and indices [N, k] of the k other rows of features [N, D] nearest to each.

    With groups [N] rows of one group are no neighbours of one another ("" is no group). Of equals the first come first.
    ValueError if a row has fewer than k others to offer.
    """
    x = unit(features)
    n = len(x)
    _, member = np.unique(
        [group or f"\0{i}" for i, group in enumerate(groups)] if groups is not None else np.arange(n),
        return_inverse=True,
    )
    most = n - int(np.bincount(member).max(initial=0))
    if not 1 <= k <= most:
        raise ValueError(f"{k} neighbours asked for among {most}")
    similarities, indices = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    for start in range(0, n, _ROWS):
        rows = slice(start, min(start + _ROWS, n))
        cosine = x[rows] @ x.T
        cosine[member[rows, None] == member] = -np.inf
        order = _first(cosine, k)
        indices[rows] = order
        similarities[rows] = np.take_along_axis(cosine, order, axis=1)
    return similarities, indices


def _first(values: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Columns of the k largest of each row, in order; ties by column."""
    limit = np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k]
    found = np.empty((len(values), k), np.int64)
    for i, row in enumerate(values):
        candidates = np.flatnonzero(row >= limit[i])
        found[i] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    return found
