"""Fréchet distance, kernel distances, precision and recall of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dermis.frechet import frechet_of_moments
from dermis.metrics.kernels import Floats, polynomial, squared_discrepancies
from dermis.metrics.neighbourhoods import compare_neighbourhoods

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def frechet_distance(real: NDArray[np.float32], generated: NDArray[np.float32]) -> float:
    """Compute the Fréchet distance of Gaussians fitted to features [N, dim] and [M, dim] (Heusel et al., arXiv 1706.08500).

        |m_r - m_g|^2 + tr(C_r + C_g - 2 (C_r C_g)^(1/2))

    of the means and covariances, in float64. In the feature space `inception` it is the FID. It is biased upwards, and more
    so for fewer images: compare it only at equal numbers.

    The trace of the root is computed as tr (C_r^(1/2) C_g C_r^(1/2))^(1/2) with solvers for symmetric matrices. That is
    faster than the eigenvalues of C_r C_g, which torch-fidelity uses, and differs only by rounding.
    """
    return frechet(real.astype(np.float64), generated.astype(np.float64))


def frechet(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Compute `frechet_distance` of float64 features."""
    return frechet_of_moments(x.mean(axis=0), np.atleast_2d(np.cov(x.T)), y.mean(axis=0), np.atleast_2d(np.cov(y.T)))


def kernel_distance(
    real: NDArray[np.float32], generated: NDArray[np.float32], subsets: int = KID_SUBSETS
) -> tuple[float, float]:
    """Compute the KID of features (Bińkowski et al., arXiv 1801.01401): mean and standard deviation over subsets.

    The unbiased MMD^2 with the kernel (x.y / dim + 1)^3. Subsets have 1,000 images, or all of the smaller set. They are
    the subsets of torch-fidelity, so that results differ from its results only by rounding. The kernel is computed once for
    all subsets.
    """
    values = squared_discrepancies(real, generated, *subset_weights(len(real), len(generated), subsets), polynomial)
    return float(values.mean()), float(values.std())


def subset_weights(real: int, generated: int, subsets: int = KID_SUBSETS) -> tuple[Floats, Floats]:
    """Draw the subsets of KID: 0 or 1 for each image, [subsets, real] and [subsets, generated]."""
    size = min(real, generated, KID_SUBSET_SIZE)
    rng = np.random.RandomState(0)
    w, v = np.zeros((subsets, real), np.float32), np.zeros((subsets, generated), np.float32)
    for i in range(subsets):
        for weights in (w, v):
            weights[i, rng.choice(weights.shape[1], size, replace=False)] = 1
    return w, v


def precision_recall(real: NDArray[np.float32], generated: NDArray[np.float32], k: int = 3) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2).

    Precision is the share of generated features [M, dim] inside the balls of radius NND_k around the real ones
    [N, dim]; recall is the share of real ones inside such balls around the generated ones. Radii shrink with the size of a
    set: compare only at equal numbers, best with N = M.
    """
    neighbourhoods = compare_neighbourhoods(real, generated, k_precision=k)
    return neighbourhoods.precision, neighbourhoods.recall
