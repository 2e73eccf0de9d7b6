"""Disclosures: members with a generated image nearer than real images are to one another, against non-members with one.

A near generated image can be a coincidence. The non-members, which the generator was not trained on, show how often that
happens. The difference of the two shares is what the generator discloses. (Meehan et al., arXiv
2004.05675, compare the same distances by ranks.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dermis.metrics.classification import Estimate, Floats, Labels
from dermis.privacy.attacks import Neighbours, Patients
from dermis.privacy.shares import difference_of_shares, too_few

PERCENTILE = 1.0


@dataclass(frozen=True)
class Disclosures:
    """Near pairs in one feature space.

    `threshold` is the 1st percentile of the distances of real images to the nearest real image of another patient.
    `excess` is the share of members with a generated image nearer than that less the share of non-members; its interval has
    the level `level`. `expected_by_chance` is the number of members that would be near by coincidence. If too few
    images are near to detect a difference, and would be with planted copies as well, `excess` is None and `reason` says so.
    """

    space: str
    threshold: float
    members: int
    members_near: int
    non_members: int
    non_members_near: int
    expected_by_chance: float
    excess: Estimate | None
    level: float
    reason: str = ""


def disclosures(
    space: str,
    neighbours: Neighbours,
    labels: Labels,
    patients: Patients,
    *,
    to_planted: Floats | None = None,
    level: float,
    seed: int,
) -> Disclosures:
    """Count near pairs.

    Args:
        space: Name of the feature space.
        neighbours: Neighbours of the real images.
        labels: 1 for members, 0 for non-members.
        patients: Patient of each image.
        to_planted: Distance of each real image to the nearest of some copies of members, which are not generated images;
            None without such copies. If they are near their originals, few near images are not a lack of power.
        level: Level of the interval.
        seed: Seed of the permutations.
    """
    threshold = float(np.percentile(neighbours.to_real[:, 0], PERCENTILE))
    near = neighbours.to_generated[:, 0] <= threshold
    counts = [int(near[labels == label].sum()) for label in (0, 1)]
    sizes = [int((labels == label).sum()) for label in (0, 1)]
    reason = too_few(near, labels, patients, level=level)
    if (
        reason
        and to_planted is not None
        and not too_few(near | (to_planted <= threshold), labels, patients, level=level)
    ):
        reason = ""
    return Disclosures(
        space=space,
        threshold=threshold,
        members=sizes[1],
        members_near=counts[1],
        non_members=sizes[0],
        non_members_near=counts[0],
        expected_by_chance=counts[0] / sizes[0] * sizes[1],
        excess=None if reason else difference_of_shares(near, labels, patients, level=level, seed=seed),
        level=level,
        reason=reason,
    )
