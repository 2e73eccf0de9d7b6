"""Compare features of generated images with statistics of the features of real images.

Fidelity and variety are computed from mean, covariance and cells of the real features, so no feature of a real image is
needed. docs/dataset-report.md explains the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.bundle.reference import MAX_CELLS, MINIMUM_GROUP, BaselineSample, ClassFeatures, ClassReference
from dermis.frechet import frechet_of_root

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Counts = NDArray[np.intp]

MIN_IMAGES = 50
"""Least number of generated images of a class that is compared."""
REPLICATES = 100
TYPICAL_PERCENT = 95
BASELINE_SIZES = (50, 100, 200, 400, 800, 1600)
_BASELINE_DRAWS = 10
_RIDGE = 1e-3  # share of the mean variance that is added to every variance before the covariance is inverted
_LEVEL = (2.5, 97.5)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class FeatureComparison:
    """Result of one class. A `real` number is that of as many held-out real images; None without held-out images."""

    images: int
    distance: Estimate
    """Fréchet distance."""
    typical: Estimate
    """Share of the images that are as near to the real mean as 95 % of the real training images."""
    coverage: Estimate
    """Share of the real images that the images account for, cell by cell."""
    spread: Estimate
    """Total variance relative to that of the real images."""
    real_distance: float | None
    real_coverage: float | None
    real_typical: float | None
    """Share of all held-out images. New images are farther from the mean than those that it was computed from."""


class _Comparer:
    """The real statistics of one class, prepared for repeated comparisons."""

    def __init__(self, real: ClassFeatures, counts: Counts, typical_distance: float) -> None:
        self.mean = real.mean.astype(np.float64)
        self.covariance = real.covariance.astype(np.float64)
        values, vectors = np.linalg.eigh(self.covariance)
        self._root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        ridge = values.clip(0) + _RIDGE * values.clip(0).mean()
        self._whiten = vectors / np.sqrt(ridge)
        self._cells = real.cells.astype(np.float64)
        self._shares = counts / counts.sum()
        self._typical_distance = typical_distance

    def distance(self, features: Doubles) -> float:
        covariance = np.atleast_2d(np.cov(features.T))
        return frechet_of_root(self.mean, self.covariance, self._root, features.mean(axis=0), covariance)

    def mahalanobis(self, features: Doubles) -> Doubles:
        distances: Doubles = np.linalg.norm((features - self.mean) @ self._whiten, axis=1)
        return distances

    def typical(self, features: Doubles) -> float:
        return float((self.mahalanobis(features) <= self._typical_distance).mean())

    def coverage(self, features: Doubles) -> float:
        counts = np.bincount(nearest_cells(features, self._cells), minlength=len(self._cells))
        return float(np.minimum(self._shares, counts / len(features)).sum())

    def spread(self, features: Doubles) -> float:
        return float(features.var(axis=0, ddof=1).sum() / np.trace(self.covariance))


def nearest_cells(features: Doubles, cells: Doubles) -> Counts:
    """Return the number of the nearest cell of each feature vector."""
    squared = (cells**2).sum(axis=1) - 2 * features @ cells.T
    nearest: Counts = squared.argmin(axis=1)
    return nearest


def compare(features: Floats, real: ClassFeatures, reference: ClassReference) -> FeatureComparison:
    """Compare the features [N, dim] of generated images of one class with the real statistics.

    Intervals are of a bootstrap over the generated images, as the real statistics are fixed: 2.5th to 97.5th percentile of
    the replicates around their mean, around the number itself.
    """
    assert reference.typical_distance is not None
    comparer = _Comparer(real, np.array(reference.cells), reference.typical_distance)
    generated = features.astype(np.float64)
    random = np.random.default_rng(0)
    draws = [random.integers(0, len(generated), len(generated)) for _ in range(REPLICATES)]

    def estimate(measure: Callable[[Doubles], float], *, most: float = np.inf) -> Estimate:
        value = measure(generated)
        replicates = np.array([measure(generated[draw]) for draw in draws])
        low, high = value + np.percentile(replicates - replicates.mean(), _LEVEL)
        return Estimate(value, float(np.clip(low, 0, most)), float(np.clip(high, 0, most)))

    distance, coverage = (
        interpolate([(each.images, getattr(each, name)) for each in reference.baseline], len(generated))
        for name in ("fd", "coverage")
    )
    return FeatureComparison(
        images=len(generated),
        distance=estimate(comparer.distance),
        typical=estimate(comparer.typical, most=1),
        coverage=estimate(comparer.coverage, most=1),
        spread=estimate(comparer.spread),
        real_distance=distance,
        real_coverage=coverage,
        real_typical=max(reference.baseline, key=lambda each: each.images).typical if reference.baseline else None,
    )


def interpolate(samples: list[tuple[int, float]], images: int) -> float | None:
    """Interpolate a number at `images` between samples of other sizes, linearly in 1 / size. None without samples."""
    if not samples:
        return None
    ordered = sorted(samples, reverse=True)
    return float(np.interp(1 / images, [1 / size for size, _ in ordered], [value for _, value in ordered]))


def statistics_of(features: Floats, patients: Counts | None = None) -> tuple[ClassFeatures, tuple[int, ...], float]:
    """Compute the statistics of the features [N, dim] of real images of one class.

    Args:
        features: The features.
        patients: Number of the patient of each image; None if each image is of another patient.

    Returns:
        The statistics, the number of images in each cell, and the 95th percentile of the Mahalanobis distances. More than
        5 % of other images of the same distribution are beyond it, as mean and covariance fit these images.
    """
    if patients is None:
        patients = np.arange(len(features))
    if (known := len(np.unique(patients))) < MINIMUM_GROUP:
        raise ValueError(f"images of {known} patients; statistics need at least {MINIMUM_GROUP}")
    values = features.astype(np.float64)
    cells, counts = _cells(values, patients)
    real = ClassFeatures(
        values.mean(axis=0).astype(np.float32), np.atleast_2d(np.cov(values.T)).astype(np.float32), cells
    )
    distances = _Comparer(real, counts, 0.0).mahalanobis(values)
    return real, tuple(counts.tolist()), float(np.percentile(distances, TYPICAL_PERCENT))


def _cells(values: Doubles, patients: Counts) -> tuple[Floats, Counts]:
    """Divide features into cells with `MINIMUM_GROUP` patients or more by k-means; small cells join their nearest one."""
    from scipy.cluster.vq import kmeans2

    number = int(np.clip(len(np.unique(patients)) // (2 * MINIMUM_GROUP), 1, MAX_CELLS))
    _, labels = kmeans2(values, number, minit="++", rng=np.random.default_rng(0))
    while True:
        names, labels = np.unique(labels, return_inverse=True)
        centres = np.stack([values[labels == label].mean(axis=0) for label in range(len(names))])
        sizes = _patients_in(labels, patients, len(names))
        smallest = int(sizes.argmin())
        if sizes[smallest] >= MINIMUM_GROUP:
            break
        others = np.linalg.norm(centres - centres[smallest], axis=1)
        others[smallest] = np.inf
        labels[labels == smallest] = int(others.argmin())
    cells = centres.astype(np.float32)
    # The images are counted as those of a dataset will be; a cell can then have fewer images than it was made of.
    while True:
        nearest = nearest_cells(values, cells.astype(np.float64))
        sizes = _patients_in(nearest, patients, len(cells))
        smallest = int(sizes.argmin())
        if sizes[smallest] >= MINIMUM_GROUP:
            return cells, np.bincount(nearest, minlength=len(cells))
        cells = np.delete(cells, smallest, axis=0)


def _patients_in(labels: Counts, patients: Counts, cells: int) -> Counts:
    """Count the patients of each cell; `labels` has the cell of each image."""
    pairs = np.unique(np.stack([labels, patients]), axis=1)
    return np.bincount(pairs[0], minlength=cells)


def baseline(
    held_out: Floats, real: ClassFeatures, counts: tuple[int, ...], typical_distance: float
) -> tuple[BaselineSample, ...]:
    """Compare held-out real images [N, dim] of one class with its statistics, as samples of several sizes.

    The Fréchet distance and the coverage of a sample depend on its size, so a dataset is compared with a sample of its own
    size. Every number is the mean of several random samples without replacement.
    """
    comparer = _Comparer(real, np.array(counts), typical_distance)
    values, random = held_out.astype(np.float64), np.random.default_rng(0)
    samples: list[BaselineSample] = []
    for size in [*[size for size in BASELINE_SIZES if size < len(values)], len(values)]:
        if size < MINIMUM_GROUP:
            continue
        draws = [values[random.permutation(len(values))[:size]] for _ in range(_BASELINE_DRAWS)]
        samples.append(
            BaselineSample(
                size,
                float(np.mean([comparer.distance(draw) for draw in draws])),
                float(np.mean([comparer.coverage(draw) for draw in draws])),
                float(np.mean([comparer.typical(draw) for draw in draws])),
            )
        )
    return tuple(samples)
