"""Fréchet distance, kernel distances, precision and recall of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.kernels import Floats, polynomial, squared_discrepancies
from dermis.metrics.neighbourhoods import compare_neighbourhoods

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def frechet_distance(real: NDArray[np.float32], generated: NDArray[np.float32]) -> float:
    """Fréchet distance of Gaussians fitted to features [N, dim] and [M, dim] (Heusel et al., arXiv 1706.08500).

        |m_r - m_g|^2 + tr(C_r + C_g - 2 (C_r C_g)^(1/2))

    of the means and covariances, in float64. In the feature space `inception` it is the FID. Biased upwards, the more so
    the fewer images there are: compare it at equal numbers only.

    The trace of the root is computed as tr (C_r^(1/2) C_g C_r^(1/2))^(1/2) with solvers for symmetric matrices. That is
    faster than the eigenvalues of C_r C_g, which torch-fidelity takes, and differs from it by rounding only.
    """
    return frechet(real.astype(np.float64), generated.astype(np.float64))


def frechet(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """`frechet_distance` of features that are float64 already."""
    mean, a, b = x.mean(axis=0) - y.mean(axis=0), np.atleast_2d(np.cov(x.T)), np.atleast_2d(np.cov(y.T))
    values, vectors = np.linalg.eigh(a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    return float(mean @ mean + np.trace(a) + np.trace(b) - 2 * overlap)


def kernel_distance(
    real: NDArray[np.float32], generated: NDArray[np.float32], subsets: int = KID_SUBSETS
) -> tuple[float, float]:
    """KID of features (Bińkowski et al., arXiv 1801.01401): mean and deviation over subsets.

    The unbiased MMD^2 with the kernel (x.y / dim + 1)^3. Subsets hold 1,000 images, or all of the smaller set; they are
    the subsets that torch-fidelity draws, so the numbers are its numbers but for rounding. The kernel is computed once
    for all subsets.
    """
    values = squared_discrepancies(real, generated, *subset_weights(len(real), len(generated), subsets), polynomial)
    return float(values.mean()), float(values.std())


def subset_weights(real: int, generated: int, subsets: int = KID_SUBSETS) -> tuple[Floats, Floats]:
    """Which images are in the subsets of KID: 0 or 1, [subsets, real] and [subsets, generated]."""
    size = min(real, generated, KID_SUBSET_SIZE)
    rng = np.random.RandomState(0)
    w, v = np.zeros((subsets, real), np.float32), np.zeros((subsets, generated), np.float32)
    for i in range(subsets):
        for weights in (w, v):
            weights[i, rng.choice(weights.shape[1], size, replace=False)] = 1
    return w, v


def precision_recall(real: NDArray[np.float32], generated: NDArray[np.float32], k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2).

    Precision is the share of generated features [M, dim] inside the balls of radius NND_k about the real ones [N, dim],
    recall the share of real ones inside such balls about the generated ones. Radii shrink with the size of a set:
    compare them at equal numbers only, best with N = M.
    """
    found = compare_neighbourhoods(real, generated, k_precision=k)
    return found.precision, found.recall
