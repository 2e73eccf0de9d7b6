"""Precision, recall, density and coverage of two sets together. Each of the three distance matrices is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.metrics.neighbours import SLACK, Features, nearest, radii, squared_distances

PRECISION_K, DENSITY_K = 3, 5


@dataclass(frozen=True)
class Neighbourhoods:
    """Shares of images in the neighbourhoods of others, and further values that beta-recall needs."""

    precision: float
    recall: float
    density: float
    coverage: float
    nearest_distance: NDArray[np.float64]
    """[N]: distance of each real image to its nearest generated image."""
    nearest_index: NDArray[np.int64]
    """[N]: index of that generated image."""
    real_radii: NDArray[np.float64]
    """[N]: NND_k of the real images, with the k of density."""


def compare_neighbourhoods(
    real: Features, generated: Features, *, k_precision: int = PRECISION_K, k_density: int = DENSITY_K
) -> Neighbourhoods:
    """Compute `fidelity.precision_recall` and `density.density_coverage` of real [N, dim] and generated features [M, dim].

    Raises:
        ValueError: A set has too few images for its neighbourhoods.
    """
    of_real = nearest(real, real, max(k_precision, k_density), exclude_self=True)[0] * SLACK
    of_generated = radii(generated, k_precision)
    small = torch.from_numpy(of_real[:, k_precision - 1] ** 2)[:, None]
    large = torch.from_numpy(of_real[:, k_density - 1] ** 2)[:, None]
    own = torch.from_numpy(of_generated**2)

    distance, index = np.empty(len(real)), np.empty(len(real), dtype=np.int64)
    precise = torch.zeros(len(generated), dtype=torch.bool)
    recalled = inside = 0
    for rows, squared in squared_distances(real, generated):
        values, positions = squared.min(dim=1)
        distance[rows], index[rows] = values.sqrt().numpy(), positions.numpy()
        precise |= (squared <= small[rows]).any(dim=0)
        recalled += int((squared <= own).any(dim=1).sum())
        inside += int((squared <= large[rows]).sum())
    real_radii = of_real[:, k_density - 1]
    return Neighbourhoods(
        precision=float(precise.double().mean()),
        recall=recalled / len(real),
        density=inside / (k_density * len(generated)),
        coverage=float(np.mean(distance <= real_radii)),
        nearest_distance=distance,
        nearest_index=index,
        real_radii=real_radii,
    )
