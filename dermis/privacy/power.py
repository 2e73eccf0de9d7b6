"""What an audit could have detected with its number of held-out images.

An audit that detects nothing says little if it could not have detected anything. Three numbers:

- the AUC of an average attack that is detected with a probability of 80 %, from the variance of the AUC of N members and H
  non-members without an effect, (N + H + 1) / (12 N H) (Mann and Whitney 1947), with patients as units;
- the share of members whose copies are detected if these are the images with the highest scores of all: k such members have
  the k highest scores by chance with probability N (N - 1) ... / ((N + H) (N + H - 1) ...), which must be below the level;
- a test on the audit's own images: copies of 2 % of the members, compressed again, are added to the generated images, and the
  test for few copies is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dermis.metrics.classification import Labels
from dermis.metrics.neighbours import Features
from dermis.privacy.attacks import Neighbours, Patients, Space, neighbours_of, permutation_p, sample_scores
from dermis.privacy.shares import fewest_by_chance

POWER = 0.8
PLANTED_SHARE = 0.02


@dataclass(frozen=True)
class Planted:
    """Copies that were added to the generated images on purpose, and the smallest adjusted p-value with them."""

    copies: int
    share: float
    p: float
    detected: bool


@dataclass(frozen=True)
class Power:
    """What could have been detected at the level `level` after adjustment for `tests` tests.

    `detectable_copies` is a share of the members; None if not even copies of all of them could be detected.
    """

    level: float
    tests: int
    detectable_auc: float
    detectable_copies: float | None
    planted: Planted | None


def power_of(members: int, non_members: int, tests: int, planted: Planted | None, *, level: float) -> Power:
    """Compute what can be detected.

    Args:
        members: Number of members' patients.
        non_members: Number of non-members' patients.
        tests: Number of tests that the level is divided by.
        planted: Result of `plant`.
        level: Level of all tests together.
    """
    from scipy.stats import norm

    deviation = math.sqrt((members + non_members + 1) / (12 * members * non_members))
    auc = 0.5 + float(norm.ppf(1 - level / tests) + norm.ppf(POWER)) * deviation
    return Power(level, tests, min(auc, 1.0), detectable_share(members, non_members, level / tests), planted)


def detectable_share(members: int, non_members: int, level: float) -> float | None:
    """Compute the smallest share of members that cannot have the highest scores by chance."""
    count = fewest_by_chance(members, non_members, level)
    return None if count is None else count / members


def plant(
    spaces: Sequence[Space],
    neighbours: Sequence[Neighbours],
    copies: Mapping[str, Features],
    labels: Labels,
    patients: Patients,
    *,
    tests: int,
    level: float,
    seed: int,
) -> Planted:
    """Add copies of members to the generated images and repeat the test for few copies.

    Args:
        spaces: The feature spaces.
        neighbours: The neighbours in each space without the copies.
        copies: Features of the copies by space.
        labels: 1 for members, 0 for non-members.
        patients: Patient of each image.
        tests: Number of tests that the level is divided by.
        level: Level of all tests together.
        seed: Seed of the permutations.
    """
    scores = []
    for space, known in zip(spaces, neighbours, strict=True):
        generated = np.concatenate([space.generated, copies[space.name]])
        extended = replace(space, generated=generated)
        scores += sample_scores(extended, neighbours_of(extended, patients, to_real=known.to_real))
    p = permutation_p([each.values for each in scores], labels, patients, seed=seed)[:, 1]
    adjusted = min(1.0, float(p.min()) * tests)
    count = len(next(iter(copies.values())))
    return Planted(count, count / int((labels == 1).sum()), adjusted, adjusted < level)
