"""A map of a training set: the principal components of its embeddings, and how many images are where.

Generated images are drawn in these components. The training images themselves are described by counts in cubes, so that no
position of one image is shown; positions are for operators who show them on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Floats, Index

COMPONENTS = 16
"""Principal components of a map. The first three are drawn; neighbours are compared in all of them."""
SMALLEST_COUNT = 20
"""A cube with fewer training images is left out."""
ROUNDING = 10
"""Counts are rounded to multiples of this number."""

_DRAWN = 3
_MAX_VECTORS = 20_000  # that are read of a larger index, evenly spaced
_MAX_POSITIONS = 5_000
_SHOWN_SHARE = 0.8  # of the images that have to be in cubes that are shown, if that is possible


@dataclass(frozen=True)
class TrainingMap:
    """The components, and the training images in the first three of them.

    Attributes:
        centre: [dim] mean of the embeddings.
        components: [K, dim] orthonormal; the first one has the largest variance.
        explained: [K] share of the variance of the stored embeddings in each component.
        counted: Number of training images that were counted.
        side: Length of the sides of the cubes, a power of two.
        cubes: [M, 3] centres of the cubes that contain at least `SMALLEST_COUNT` training images.
        counts: [M] their numbers of training images, rounded to `ROUNDING`.
        positions: [P, 3] positions of training images, sorted by their values.
    """

    centre: Floats
    components: Floats
    explained: Floats
    counted: int
    side: float
    cubes: Floats
    counts: NDArray[np.int64]
    positions: Floats

    def project(self, embeddings: Floats) -> Floats:
        """Return the components [N, K] of embeddings [N, dim] in the space of the index."""
        return np.asarray((embeddings - self.centre) @ self.components.T, np.float32)


def training_map(index: Index) -> TrainingMap:
    """Compute the map of an index. It depends on the stored embeddings alone."""
    total = index.description.vectors
    numbers = np.linspace(0, total - 1, min(total, _MAX_VECTORS)).astype(np.int64)
    rows = index.stored(numbers).astype(np.float64)
    centre = rows.mean(axis=0)
    centred = rows - centre
    values, vectors = np.linalg.eigh(centred.T @ centred / len(rows))
    kept = np.argsort(values)[::-1][: min(COMPONENTS, index.description.dim)]
    components = vectors[:, kept].T
    largest = np.abs(components).argmax(axis=1)
    signs = np.sign(components[np.arange(len(kept)), largest])
    components *= signs[:, None]  # the sign would depend on the solver
    variance = max(float(values.clip(0).sum()), 1e-12)
    explained = values[kept].clip(0) / variance
    if len(kept) < _DRAWN:  # an index of one or two dimensions
        components = np.pad(components, ((0, _DRAWN - len(kept)), (0, 0)))
        explained = np.pad(explained, (0, _DRAWN - len(kept)))
    drawn = centred @ components[:_DRAWN].T
    side, cubes, counts = _counted(drawn)
    positions = drawn[np.linspace(0, len(drawn) - 1, min(len(drawn), _MAX_POSITIONS)).astype(np.int64)]
    return TrainingMap(
        centre=centre.astype(np.float32),
        components=components.astype(np.float32),
        explained=explained.astype(np.float32),
        counted=len(rows),
        side=side,
        cubes=cubes.astype(np.float32),
        counts=counts,
        positions=positions[np.lexsort(positions.T[::-1])].astype(np.float32),
    )


def _counted(positions: NDArray[np.float64]) -> tuple[float, NDArray[np.float64], NDArray[np.int64]]:
    """Count positions [N, 3] in the smallest cubes of which the shown ones contain most of the images.

    Returns:
        Side of the cubes, centres [M, 3] and rounded counts [M] of those with enough images.
    """
    spread = max(float(positions.std(axis=0).max()), 1e-6)
    largest = 2.0 ** np.ceil(np.log2(spread) + 1)
    for side in (largest / 8, largest / 4, largest / 2, largest):
        cells, counts = np.unique(np.floor(positions / side), axis=0, return_counts=True)
        enough = counts >= SMALLEST_COUNT
        if counts[enough].sum() >= _SHOWN_SHARE * len(positions):
            break
    rounded = np.round(counts[enough] / ROUNDING).astype(np.int64) * ROUNDING
    return float(side), (cells[enough] + 0.5) * side, rounded
