"""Membership inference: whether an attacker who has the generated images can find out who was in the training set.

The attack takes a real image for a training image if a generated one is near to it (Chen et al., arXiv 1909.03935, section
4.2, without access to the generator): its score is the negative distance to the nearest generated image. An area under
the ROC curve of 0.5 means that the generated images disclose nothing, 1 that they disclose everything. An average hides a few
people who can be recognised with near certainty, so the share of training images that are found at 1 % false alarms is
reported as well (Carlini et al., arXiv 2112.03570). Guessing finds 1 % with many held-out images, and more with few, because
the threshold is one of their scores.

`dermis.authenticity.attack` runs the same attack for a dataset against an index, without patients and only with the area.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.classification import Estimate, Floats, Labels, auc, bootstrap, sensitivity_at_specificity
from dermis.metrics.neighbours import Features, nearest

FALSE_ALARMS = 0.01
MIN_IMAGES = 20  # images of each kind that the attack needs


@dataclass(frozen=True)
class Membership:
    """Result of the attack.

    `auc` and `found_at_1_percent` have 95 % intervals. `expected_at_1_percent` is the share of training images that guessing
    finds on average. `members` and `held_out` are numbers of attacked images.
    """

    auc: Estimate
    found_at_1_percent: Estimate
    expected_at_1_percent: float
    members: int
    held_out: int


def membership_attack(
    training: Features,
    held_out: Features,
    generated: Features,
    *,
    groups: Sequence[str] | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> Membership | None:
    """Attack training [N, dim] and held-out images [H, dim] with generated ones [M, dim].

    Args:
        training: Features of the training images.
        held_out: Features of the held-out images.
        generated: Features of the generated images.
        groups: Patient of every image, training images first. The bootstrap resamples whole patients.
        replicates: Replicates of the bootstrap.
        seed: Its seed.

    Returns:
        The result; None if there are fewer than 20 images of either kind.
    """
    if min(len(training), len(held_out)) < MIN_IMAGES:
        return None
    distances = np.concatenate([nearest(images, generated)[0][:, 0] for images in (training, held_out)])
    labels: NDArray[np.int64] = np.repeat(np.array([1, 0]), [len(training), len(held_out)])
    metrics = {"auc": auc, "recall": _recall}
    estimates = bootstrap(labels, -distances, metrics, groups=groups, replicates=replicates, seed=seed)
    # The threshold is the (k + 1)-th highest score of the H held-out images. A score of the same distribution exceeds it with
    # probability (k + 1) / (H + 1).
    expected = (math.floor(FALSE_ALARMS * len(held_out) + 1e-9) + 1) / (len(held_out) + 1)
    return Membership(estimates["auc"], estimates["recall"], expected, len(training), len(held_out))


def _recall(labels: Labels, scores: Floats, weights: Floats | None = None) -> Floats:
    """Compute the share of training images that score above all but 1 % of the held-out ones."""
    return sensitivity_at_specificity(labels, scores, weights, specificity=1 - FALSE_ALARMS)
