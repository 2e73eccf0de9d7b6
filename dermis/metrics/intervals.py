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

from dermis.metrics.fidelity import frechet, subset_weights
from dermis.metrics.kernels import Gaussian, polynomial, squared_discrepancies

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


@dataclass(frozen=True)
class KernelEstimate:
    """A squared MMD with its interval. deviation: over subsets, of KID only."""

    value: float
    interval: Interval
    deviation: float = 0.0


def kernel_estimate(
    real: NDArray[np.float32], generated: NDArray[np.float32], replicates: int = 200, seed: int = 0
) -> KernelEstimate:
    """`fidelity.kernel_distance` of features [N, dim] and [M, dim] with its interval, exact in all dimensions.

    How often a replicate drew each image are integer weights, so subsets and replicates are computed from one pass over
    the kernel of the whole sets. Pairs of an image with itself are left out, in a replicate as in KID itself, so the bias
    is close to nothing.
    """
    rng = np.random.default_rng(seed)
    drawn = _weights(len(real), replicates, rng), _weights(len(generated), replicates, rng)
    subsets = subset_weights(len(real), len(generated))
    w, v = (np.concatenate([of_subsets, all_drawn]) for of_subsets, all_drawn in zip(subsets, drawn, strict=True))
    mmd = squared_discrepancies(real, generated, w, v, polynomial)
    of_subsets, whole, of_replicates = np.split(mmd, [len(subsets[0]), len(subsets[0]) + 1])
    value = float(of_subsets.mean())
    interval = _about(value, of_replicates, float(of_replicates.mean() - whole[0]))
    return KernelEstimate(value, interval, float(of_subsets.std()))


def gaussian_estimate(
    real: NDArray[np.float32], generated: NDArray[np.float32], kernel: Gaussian, replicates: int = 200, seed: int = 0
) -> KernelEstimate:
    """The unbiased MMD^2 of all images with a Gaussian kernel, 0 on average for equal distributions, with its interval."""
    rng = np.random.default_rng(seed)
    w, v = _weights(len(real), replicates, rng), _weights(len(generated), replicates, rng)
    mmd = squared_discrepancies(kernel.prepare(real), kernel.prepare(generated), w, v, kernel)
    return KernelEstimate(float(mmd[0]), _about(float(mmd[0]), mmd[1:], float(mmd[1:].mean() - mmd[0])))


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
