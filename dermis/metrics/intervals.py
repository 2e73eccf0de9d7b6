"""Bootstrap confidence intervals of Fréchet and kernel distances: how much they would move had other images been drawn.

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

from dermis.metrics.fidelity import frechet
from dermis.metrics.kernels import Gaussian, Kernel, polynomial, squared_discrepancies

LEVEL = 0.95
DIRECTIONS = 128


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
    drawn = np.array([frechet(_resample(x, rng), _resample(y, rng)) for _ in range(replicates)])
    return _about(fid, drawn, float(drawn.mean() - frechet(x, y)))


def kernel_interval(
    real: NDArray[np.float32],
    generated: NDArray[np.float32],
    value: float,
    replicates: int = 200,
    seed: int = 0,
    kernel: Kernel = polynomial,
) -> Interval:
    """Interval of `value`, a squared MMD of features [N, dim] and [M, dim] (KID by default), exact in all dimensions.

    How often a replicate drew each image are integer weights, so all replicates are computed from the kernel of the
    whole sets, which is computed once. Pairs of an image with itself are left out, in a replicate as in the number
    itself, so the bias is close to nothing.
    """
    if isinstance(kernel, Gaussian):
        real, generated = kernel.prepare(real), kernel.prepare(generated)
    rng = np.random.default_rng(seed)
    w, v = _weights(len(real), replicates, rng), _weights(len(generated), replicates, rng)
    mmd = squared_discrepancies(real, generated, w, v, kernel)
    return _about(value, mmd[1:], float(mmd[1:].mean() - mmd[0]))


def _weights(n: int, replicates: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """How often each of n images stands in a set [1 + replicates, n]: once each in the first, which is the set itself."""
    drawn = rng.multinomial(n, np.full(n, 1 / n), size=replicates)
    return np.concatenate([np.ones((1, n)), drawn]).astype(np.float32)


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
