"""Is a generated image a copy? Verdicts by distance to the nearest training image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.description import PERCENTILES, IndexDescription
from dermis.authenticity.index import Nearest


@dataclass(frozen=True)
class Verdicts:
    """Of N images, all arrays [N]."""

    distances: NDArray[np.float32]
    """To the nearest training image, in the index's space."""
    radii: NDArray[np.float32]
    """How far that training image is from its own nearest other one."""
    percentiles: NDArray[np.float32]
    """0..100: the share of training images whose own nearest other one is nearer than that. Below 1, hardly any two real
    images are so alike."""
    authentic: NDArray[np.bool_]
    """Whether the image is farther from its nearest training image than that one is from its own nearest training
    neighbour (Alaa et al., arXiv 2102.08921, section 3.3)."""


def verdicts_of(found: Nearest, described: IndexDescription) -> Verdicts:
    """Verdicts on images whose nearest training images are known."""
    percentiles = np.interp(found.distances, described.radii, PERCENTILES, left=0, right=100).astype(np.float32)
    return Verdicts(found.distances, found.radii, percentiles, found.distances > found.radii)
