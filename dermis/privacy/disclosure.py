"""Disclosures: members with a generated image nearer than real images are to one another, against non-members with one.

A near generated image can be a coincidence. The non-members, which the generator was not trained on, show how often that
happens. The difference of the two shares is what the generator discloses. (Meehan et al., arXiv
2004.05675, compare the same distances by ranks.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dermis.metrics.classification import Estimate, Floats, Labels
from dermis.privacy.attacks import Neighbours, estimate

PERCENTILE = 1.0


@dataclass(frozen=True)
class Disclosures:
    """Near pairs in one feature space.

    `threshold` is the 1st percentile of the distances of real images to the nearest real image of another patient.
    `excess` is the share of members with a generated image nearer than that less the share of non-members; its interval has
    the level `level`. `expected_by_chance` is the number of members that would be near by coincidence.
    """

    space: str
    threshold: float
    members: int
    members_near: int
    non_members: int
    non_members_near: int
    expected_by_chance: float
    excess: Estimate
    level: float


def disclosures(space: str, neighbours: Neighbours, labels: Labels, weights: Floats, *, level: float) -> Disclosures:
    """Count near pairs.

    Args:
        space: Name of the feature space.
        neighbours: Neighbours of the real images.
        labels: 1 for members, 0 for non-members.
        weights: Replicates of the bootstrap, [R, N].
        level: Level of the interval.
    """
    threshold = float(np.percentile(neighbours.to_real[:, 0], PERCENTILE))
    near = (neighbours.to_generated[:, 0] <= threshold).astype(np.float64)
    counts = [int(near[labels == label].sum()) for label in (0, 1)]
    sizes = [int((labels == label).sum()) for label in (0, 1)]
    return Disclosures(
        space=space,
        threshold=threshold,
        members=sizes[1],
        members_near=counts[1],
        non_members=sizes[0],
        non_members_near=counts[0],
        expected_by_chance=counts[0] / sizes[0] * sizes[1],
        excess=estimate(difference_of_shares(near, labels, weights), level),
        level=level,
    )


def difference_of_shares(values: Floats, labels: Labels, weights: Floats) -> Floats:
    """Compute the mean of values of members less that of non-members, and its replicates: [1 + R]."""
    all_weights = np.concatenate([np.ones((1, len(labels))), weights])
    means = []
    for label in (1, 0):
        chosen = labels == label
        total = np.maximum(all_weights[:, chosen].sum(axis=1), np.finfo(float).tiny)
        means.append(all_weights[:, chosen] @ values[chosen] / total)
    difference: Floats = means[0] - means[1]
    return difference
