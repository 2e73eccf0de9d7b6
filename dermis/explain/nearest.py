"""Nearest neighbours by cosine, exact, block by block. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ROWS = 512


def unit(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale rows [N, D] to length 1. A row of zeros is not changed."""
    x = features.astype(np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    scaled: NDArray[np.float64] = np.divide(x, length, out=np.zeros_like(x), where=length > 0)
    return scaled


def nearest_by_cosine(
    features: NDArray[np.float32], k: int, *, groups: Sequence[str] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the k nearest other rows of each row.

    Args:
        features: Rows [N, D].
        k: Number of neighbours.
        groups: Group of each row, "" for none. Rows of one group are not neighbours of each other.

    Returns:
        Similarities [N, k], descending, and indices [N, k]. Equal similarities are in the order of indices.

    Raises:
        ValueError: A row has fewer than k possible neighbours.
    """
    x = unit(features)
    n = len(x)
    _, member = np.unique(
        [group or f"\0{i}" for i, group in enumerate(groups)] if groups is not None else np.arange(n),
        return_inverse=True,
    )
    most = n - int(np.bincount(member).max(initial=0))
    if not 1 <= k <= most:
        raise ValueError(f"{k} neighbours were requested, but there are only {most}")
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
    """Return the columns of the k largest values of each row, in order. Equal values are in the order of columns."""
    limit = np.partition(values, values.shape[1] - k, axis=1)[:, values.shape[1] - k]
    columns = np.empty((len(values), k), np.int64)
    for i, row in enumerate(values):
        candidates = np.flatnonzero(row >= limit[i])
        columns[i] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
    return columns
