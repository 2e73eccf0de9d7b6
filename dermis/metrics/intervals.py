"""Bootstrap confidence intervals of Fréchet and kernel distances: how much they vary with the choice of images.

The real and the generated set are each resampled with replacement (Efron 1979), `replicates` times. An interval is the
spread of the replicates around their mean, centred on the reported number: resampling repeats images, which raises every
FID replicate above the FID, so that the raw percentiles would often not contain it. The interval does not cover the bias of
the FID, which is the same for all sets of one size; `Interval.bias` estimates it.
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
    """[low, high] at the level 0.95 around the reported number, which is too large by about `bias`."""

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
    """Compute the interval of `fid`, the Fréchet distance of features [N, dim] and [M, dim].

    A replicate needs a matrix root, which at 1,280 or 2,048 dimensions takes seconds. So replicates are computed in the
    `directions` principal directions of both sets together, which have nearly all variance and so nearly all sampling
    noise; `docs/evaluation.md` compares this with all dimensions. The bias is the mean of the replicates less the distance
    in these directions. It is an underestimate, as the other directions are not in it.
    """
    basis = _principal_directions(np.concatenate([real, generated]), directions)
    x, y = (features.astype(np.float64) @ basis for features in (real, generated))
    rng = np.random.default_rng(seed)
    distances = np.array([frechet(_resample(x, rng), _resample(y, rng)) for _ in range(replicates)])
    return _interval(fid, distances, float(distances.mean() - frechet(x, y)))


@dataclass(frozen=True)
class KernelEstimate:
    """A squared MMD with its interval. `deviation` is the standard deviation over subsets, for KID only."""

    value: float
    interval: Interval
    deviation: float = 0.0


def kernel_estimate(
    real: NDArray[np.float32], generated: NDArray[np.float32], replicates: int = 200, seed: int = 0
) -> KernelEstimate:
    """Compute `fidelity.kernel_distance` of features [N, dim] and [M, dim] with its interval, in all dimensions.

    A replicate has an integer weight for each image, so that subsets and replicates are computed in one pass over the kernel
    of the whole sets. Pairs of an image with itself are left out, as in KID, so the bias is close to zero.
    """
    rng = np.random.default_rng(seed)
    weights = _weights(len(real), replicates, rng), _weights(len(generated), replicates, rng)
    subsets = subset_weights(len(real), len(generated))
    w, v = (np.concatenate([of_subsets, all_drawn]) for of_subsets, all_drawn in zip(subsets, weights, strict=True))
    mmd = squared_discrepancies(real, generated, w, v, polynomial)
    of_subsets, whole, of_replicates = np.split(mmd, [len(subsets[0]), len(subsets[0]) + 1])
    value = float(of_subsets.mean())
    interval = _interval(value, of_replicates, float(of_replicates.mean() - whole[0]))
    return KernelEstimate(value, interval, float(of_subsets.std()))


def gaussian_estimate(
    real: NDArray[np.float32], generated: NDArray[np.float32], kernel: Gaussian, replicates: int = 200, seed: int = 0
) -> KernelEstimate:
    """Compute the unbiased MMD^2 with a Gaussian kernel and its interval. Its mean is 0 for equal distributions."""
    rng = np.random.default_rng(seed)
    w, v = _weights(len(real), replicates, rng), _weights(len(generated), replicates, rng)
    mmd = squared_discrepancies(kernel.prepare(real), kernel.prepare(generated), w, v, kernel)
    return KernelEstimate(float(mmd[0]), _interval(float(mmd[0]), mmd[1:], float(mmd[1:].mean() - mmd[0])))


def _weights(n: int, replicates: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw how often each of n images is in a set, [1 + replicates, n]. The first row is the set itself: once each."""
    counts = rng.multinomial(n, np.full(n, 1 / n), size=replicates)
    return np.concatenate([np.ones((1, n)), counts]).astype(np.float32)


def _interval(value: float, replicates: NDArray[np.float64], bias: float) -> Interval:
    low, high = np.quantile(replicates - replicates.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value + float(low), value + float(high), bias)


def _resample(x: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    return x[rng.integers(0, len(x), len(x))]


def _principal_directions(x: NDArray[np.float32], count: int) -> NDArray[np.float64]:
    """Return the eigenvectors [dim, count] of the largest eigenvalues of the covariance of x [N, dim]."""
    dim = x.shape[1]
    covariance = np.cov(x, rowvar=False, dtype=np.float64).reshape(dim, dim)
    vectors: NDArray[np.float64] = scipy.linalg.eigh(covariance, subset_by_index=(max(dim - count, 0), dim - 1))[1]
    return vectors
