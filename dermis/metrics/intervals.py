"""Bootstrap confidence intervals of FID and KID: how much they would move had other images been drawn.

Both sets are resampled with replacement (Efron 1979), the real and the generated one apart, `replicates` times. An
interval is the spread of the replicates about their own mean, laid about the number that is reported: resampling
repeats images, which lifts every FID replicate above the FID itself, so the raw percentiles would often not even
contain it. What the interval does not cover is FID's own bias, which is shared by all sets of the same size;
`Interval.bias` estimates it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

LEVEL = 0.95
DIRECTIONS = 128
KERNEL_ROWS = 512


@dataclass(frozen=True)
class Interval:
    """[low, high] at the level 0.95 about the reported number, which has `bias` too much (an estimate)."""

    low: float
    high: float
    bias: float


def frechet_interval(
    real: NDArray[np.float32],
    generated: NDArray[np.float32],
    fid: float,
    replicates: int = 200,
    directions: int = DIRECTIONS,
    seed: int = 0,
) -> Interval:
    """Interval of `fid`, the Fréchet distance of features [N, dim] and [M, dim].

    A replicate needs a matrix root, which at 1,280 or 2,048 dimensions takes seconds. So replicates are computed in the
    `directions` principal directions of both sets pooled, which hold nearly all variance, hence nearly all of the
    sampling noise; `docs/evaluation.md` has the comparison with the full one. The bias is the replicates' mean above
    the distance in these directions: that of the directions left out is not in it, so it is an underestimate.
    """
    basis = _principal_directions(np.concatenate([real, generated]), directions)
    x, y = (features.astype(np.float64) @ basis for features in (real, generated))
    rng = np.random.default_rng(seed)
    drawn = np.array([_frechet(_resample(x, rng), _resample(y, rng)) for _ in range(replicates)])
    return _about(fid, drawn, float(drawn.mean() - _frechet(x, y)))


def kernel_interval(
    real: NDArray[np.float32], generated: NDArray[np.float32], kid: float, replicates: int = 200, seed: int = 0
) -> Interval:
    """Interval of `kid`, the kernel distance of features [N, dim] and [M, dim], exact in all dimensions.

    How often a replicate drew each image are integer weights, so all replicates are read off the kernel of the whole
    sets, which is computed once, KERNEL_ROWS rows at a time. Pairs of an image with itself are left out, of a replicate
    as of KID itself, so the bias is close to nothing.
    """
    rng = np.random.default_rng(seed)
    w, v = _weights(len(real), replicates, rng), _weights(len(generated), replicates, rng)
    within = _mean_kernel(real, real, w, w) + _mean_kernel(generated, generated, v, v)
    mmd = within - 2 * _mean_kernel(real, generated, w, v)
    return _about(kid, mmd[1:], float(mmd[1:].mean() - mmd[0]))


def _weights(n: int, replicates: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """How often each of n images stands in a set [1 + replicates, n]: once each in the first, which is the set itself."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=replicates)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float32)


def _mean_kernel(
    a: NDArray[np.float32], b: NDArray[np.float32], w: NDArray[np.float32], v: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Means of (a_i.b_j / dim + 1)^3 over i, j (i != j if a is b), one under each row of weights w [R, N], v [R, M]."""
    total = np.zeros(len(w))
    for start in range(0, len(a), KERNEL_ROWS):
        rows = slice(start, start + KERNEL_ROWS)
        kernel = (a[rows] @ b.T / np.float32(a.shape[1]) + 1) ** 3
        if a is b:
            kernel[np.arange(len(kernel)), np.arange(start, start + len(kernel))] = 0
        total += np.einsum("rj,rj->r", w[:, rows].astype(np.float64), (v @ kernel.T).astype(np.float64))
    sums: NDArray[np.float64] = w.sum(axis=1, dtype=np.float64) * v.sum(axis=1, dtype=np.float64)
    if a is b:
        sums -= np.square(w, dtype=np.float64).sum(axis=1)
    return total / sums


def _about(value: float, replicates: NDArray[np.float64], bias: float) -> Interval:
    low, high = np.quantile(replicates - replicates.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value + float(low), value + float(high), bias)


def _resample(x: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    return x[rng.integers(0, len(x), len(x))]


def _principal_directions(x: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """The eigenvectors [dim, count] of the largest eigenvalues of the covariance of x [N, dim]."""
    dim = x.shape[1]
    covariance = np.cov(x, rowvar=False, dtype=np.float64).reshape(dim, dim)
    vectors: NDArray[np.float64] = scipy.linalg.eigh(covariance, subset_by_index=(max(dim - count, 0), dim - 1))[1]
    return vectors


def _frechet(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The Fréchet distance of two sets, with tr (AB)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), which symmetric solvers do."""
    mean, a, b = x.mean(axis=0) - y.mean(axis=0), np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return float(mean @ mean + np.trace(a) + np.trace(b) - 2 * overlap)
