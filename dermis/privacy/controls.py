"""Controls: what tells members from non-members without any generated image.

If a classifier that sees only the images can tell the sets apart, they are not two random parts of one population, and an
attack can succeed although the generator discloses nothing (Duan et al., arXiv 2402.07841; Meeus et al., arXiv 2406.17975).
So an attack counts only if it is better than this classifier. A feature space whose network may have been trained on the
members says nothing about the split: it is left out here, and is a control of the attacks in the same space only.

A fair split also has halves of the members that cannot be distinguished; `attacks.halves_auc` computes that control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dermis.metrics.classification import Estimate, Floats, Labels, auc
from dermis.metrics.neighbours import Features
from dermis.privacy.attacks import (
    Controls,
    Patients,
    Space,
    SplitScores,
    estimate,
    fair_spaces,
    refitted_p,
    replicates_of,
)
from dermis.privacy.classifiers import CrossValidatedRidge

COMPONENTS = 64
LEVEL = 0.05
PERMUTATIONS = 2000  # enough for a decision at this level


@dataclass(frozen=True)
class SplitControl:
    """The classifier of the split in the space where it is strongest, of those whose networks do not know the members.

    `p` is the p-value of its AUC, adjusted for the number of spaces by Bonferroni's method; `separates` is whether it is
    below 0.05.
    """

    space: str
    auc: Estimate
    p: float
    separates: bool


def split_control(
    spaces: Sequence[Space], labels: Labels, patients: Patients, weights: Floats, *, seed: int
) -> tuple[SplitControl, Controls]:
    """Train a classifier of members and non-members on the features of the images, cross-validated by patient.

    Args:
        spaces: The feature spaces. In each, up to 64 principal components are used.
        labels: 1 for members, 0 for non-members.
        patients: Patient of each image.
        weights: Replicates of the bootstrap, [R, N].
        seed: Seed of folds and permutations.
    """
    ridges = [CrossValidatedRidge(principal_components(space.real), patients, seed=seed) for space in spaces]
    scores = [ridge.scores(labels[None].astype(np.float64))[0] for ridge in ridges]
    p_values = np.array(
        [refitted_p(ridge.scores, labels, patients, seed=seed, permutations=PERMUTATIONS)[0] for ridge in ridges]
    )
    fair = fair_spaces(spaces)
    best = max(fair, key=lambda i: float(auc(labels, scores[i])[0]))
    p = float(min(1.0, p_values[fair].min() * len(fair)))
    control = SplitControl(spaces[best].name, estimate(replicates_of(auc, labels, scores[best], weights)), p, p < LEVEL)
    own = {
        space.name: SplitScores(values, bool(p_value < LEVEL))
        for space, values, p_value in zip(spaces, scores, p_values, strict=True)
        if space.knows_members
    }
    return control, Controls(SplitScores(scores[best], control.separates), own)


def principal_components(features: Features, count: int = COMPONENTS) -> Floats:
    """Project features [N, dim] on their first principal components, [N, min(count, dim, N - 1)]."""
    import scipy.linalg

    x = np.asarray(features, np.float64)
    x = x - x.mean(axis=0)
    dim = x.shape[1]
    count = min(count, dim, max(len(x) - 1, 1))
    vectors = scipy.linalg.eigh(x.T @ x, subset_by_index=(dim - count, dim - 1))[1]
    projected: Floats = x @ vectors
    return projected
