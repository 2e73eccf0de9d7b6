"""Fréchet distance of two normal distributions, from their means and covariances. Imports no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def frechet_of_moments(mean_x: Doubles, covariance_x: Doubles, mean_y: Doubles, covariance_y: Doubles) -> float:
    """Compute |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of means [dim] and covariances [dim, dim].

    The trace of the root is computed as tr (C_x^(1/2) C_y C_x^(1/2))^(1/2) with solvers for symmetric matrices.
    """
    values, vectors = np.linalg.eigh(covariance_x)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return frechet_of_root(mean_x, covariance_x, root, mean_y, covariance_y)


def frechet_of_root(
    mean_x: Doubles, covariance_x: Doubles, root_x: Doubles, mean_y: Doubles, covariance_y: Doubles
) -> float:
    """Compute `frechet_of_moments` if the root of the first covariance is known already."""
    overlap = np.sqrt(np.linalg.eigvalsh(root_x @ covariance_y @ root_x).clip(0)).sum()
    difference = mean_x - mean_y
    return float(difference @ difference + np.trace(covariance_x) + np.trace(covariance_y) - 2 * overlap)
