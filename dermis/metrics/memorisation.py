"""Are generated images nearer to the training images than to held-out real ones? A test for memorising.

An honest generator knows the distribution, not the training set: training and held-out images are then exchangeable,
and neither set is the nearer one but by chance. For every generated image y with nearest distances d_T to the training
and d_H to the held-out images we take log(d_H / d_T), and the statistic is the mean. Each image is compared with
itself, so bad images, far from everything, neither hide copies nor raise an alarm (as they can in comparing d_T of
generated with d_T of held-out images, Meehan et al., arXiv 2004.05675). The logarithm lets few but close copies count:
ranks (Wilcoxon) would see only that they are nearer, not by how much.

The p-value is by permutation (Fisher): which real images are called training is drawn anew, everything else stays. This
is exact at any sizes of the sets. A Wilcoxon or Mann-Whitney p-value is not: it takes the generated images for
independent, but they share their neighbours (a few real images are near to very many), and with enough of them it rejects
honest generators too. It also needs sets of equal size, which would throw most of the training set away, and with it
the copies. The test is the stronger the more held-out images there are: where 9 of 10 real images are training images,
being near to one tells little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.neighbours import Features, nearest

CENSORED = 1e-4  # the share of generated images whose nearest image of the other set may lie beyond the list searched
FLOOR = 1e-3  # of the median distance to the nearest real image: what is nearer counts as this near


@dataclass(frozen=True)
class MemorisationTest:
    """p_value: the chance that an honest generator has so large a mean of log(d_H / d_T), or larger."""

    p_value: float
    log_ratio: float
    expected_log_ratio: float
    nearer_train: float
    """The share of generated images that are nearer to a training image than to any held-out one."""
    expected_nearer_train: float
    permutations: int


def memorisation_test(
    generated: Features,
    train: Features,
    holdout: Features,
    *,
    groups: Sequence[str] | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> MemorisationTest:
    """Test generated features [M, dim] against those of the training [N, dim] and the held-out images [H, dim].

    N and H may differ. The images must have been split at random; if whole patients were, give the patient of every
    image as `groups` (training first, then held-out), and patients are permuted. What is expected is the mean over the
    permutations; the smallest p-value possible is 1 / (permutations + 1). One-sided: a generator that avoids the
    training set is not flagged. Raises ValueError if a set is empty or a group stands on both sides.
    """
    pool = np.concatenate([train, holdout])
    is_train = np.arange(len(pool)) < len(train)
    group = np.arange(len(pool)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    label = np.zeros(group.max() + 1, dtype=bool)
    label[group[is_train]] = True
    if np.any(label[group] != is_train):
        raise ValueError("a group has images both in the training and in the held-out set")

    share = max(len(train), len(holdout)) / len(pool)
    k = min(len(pool), max(2, math.ceil(math.log(CENSORED) / math.log(share))), 256)
    distance, index = nearest(generated, pool, k)
    log_distance = np.log(np.maximum(distance, max(FLOOR * float(np.median(distance[:, 0])), np.finfo(float).tiny)))
    neighbour_group = group[index]

    def statistic(of_group: NDArray[np.bool_]) -> tuple[float, float]:
        of_neighbour = of_group[neighbour_group]
        nearest_is_train = of_neighbour[:, :1]
        other = (of_neighbour != nearest_is_train).argmax(axis=1)  # 0 if there is none in the list
        other[other == 0] = k - 1
        gap = np.take_along_axis(log_distance, other[:, None], axis=1) - log_distance[:, :1]
        return float(np.where(nearest_is_train, gap, -gap).mean()), float(nearest_is_train.mean())

    observed, nearer = statistic(label)
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(rng.permutation(label)) for _ in range(permutations)])
    return MemorisationTest(
        p_value=float((1 + np.sum(drawn[:, 0] >= observed)) / (1 + permutations)),
        log_ratio=observed,
        expected_log_ratio=float(drawn[:, 0].mean()),
        nearer_train=nearer,
        expected_nearer_train=float(drawn[:, 1].mean()),
        permutations=permutations,
    )
