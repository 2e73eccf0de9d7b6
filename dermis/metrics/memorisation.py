"""A test for memorisation: whether generated images are nearer to training images than to held-out real ones.

For a generator that learnt only the distribution, training and held-out images are exchangeable, and neither set is nearer
except by chance. For every generated image with nearest distances d_T to the training and d_H to the held-out images,
log(d_H / d_T) is computed, and the statistic is its mean. Each image has its own ratio, so that bad images, far from
everything, neither hide copies nor raise an alarm (as they can if d_T of generated images is compared with d_T of held-out
images; Meehan et al., arXiv 2004.05675). With the logarithm few but close copies count: ranks (Wilcoxon) would not measure
how much nearer they are.

The p-value is by permutation (Fisher): real images are assigned to the training set at random, and everything else stays
unchanged. It is exact for any sizes of the sets. A Wilcoxon or Mann-Whitney p-value is not: it assumes independent generated
images, but they share their neighbours (a few real images are near to very many), and with enough of them it rejects generators
that do not memorise. It also needs sets of equal size, so that most of the training set, and copies of it, would be ignored.
The test is stronger with more held-out images: if 9 of 10 real images are training images, being near to one means little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.neighbours import Features, nearest

CENSORED = 1e-4  # the share of generated images whose nearest image of the other set can be beyond the searched list
FLOOR = 1e-3  # share of the median distance to the nearest real image; smaller distances count as this one


@dataclass(frozen=True)
class MemorisationTest:
    """Result of the test. `p_value`: probability of at least this mean of log(d_H / d_T) without memorisation."""

    p_value: float
    log_ratio: float
    expected_log_ratio: float
    nearer_train: float
    """Share of generated images that are nearer to a training image than to any held-out one."""
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

    N and H can differ. The images must have been split at random. Expected values are means over the permutations; the least
    possible p-value is 1 / (permutations + 1). The test is one-sided: a generator that avoids the training set is not
    flagged.

    Args:
        generated: Features [M, dim] of generated images.
        train: Features [N, dim] of training images.
        holdout: Features [H, dim] of held-out images.
        groups: Patient of every image (training first, then held-out), if whole patients were split. Patients are then
            permuted.
        permutations: Number of permutations.
        seed: Their seed.

    Raises:
        ValueError: A set is empty, or a patient is in both sets.
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
        other = (of_neighbour != nearest_is_train).argmax(axis=1)  # 0 if the list has none
        other[other == 0] = k - 1
        gap = np.take_along_axis(log_distance, other[:, None], axis=1) - log_distance[:, :1]
        return float(np.where(nearest_is_train, gap, -gap).mean()), float(nearest_is_train.mean())

    observed, nearer = statistic(label)
    rng = np.random.default_rng(seed)
    permuted = np.array([statistic(rng.permutation(label)) for _ in range(permutations)])
    return MemorisationTest(
        p_value=float((1 + np.sum(permuted[:, 0] >= observed)) / (1 + permutations)),
        log_ratio=observed,
        expected_log_ratio=float(permuted[:, 0].mean()),
        nearer_train=nearer,
        expected_nearer_train=float(permuted[:, 1].mean()),
        permutations=permutations,
    )
