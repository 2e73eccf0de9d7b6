"""Lower bounds on epsilon, the parameter of differential privacy, from the success of attacks.

If training were (epsilon, delta)-differentially private with respect to adding or removing all images of one patient, an attack
with true-positive rate T and false-positive rate F would satisfy (Kairouz et al., arXiv 1311.0776)

    T <= e^epsilon F + delta   and   1 - F <= e^epsilon (1 - T) + delta,

so epsilon >= max(log((T - delta) / F), log((1 - F - delta) / (1 - T))). T and F are replaced by their one-sided limits of
Clopper and Pearson, each at half the permitted error (Jagielski et al., arXiv 2006.07709; Nasr et al., arXiv 2101.04535).
The attack, its threshold and its direction are chosen on one half of the patients, and the bound is computed on the other
half with one image of each patient, so that it is not chosen for its own result. Whoever is a member was trained on with all
images: an attack on one of them can succeed because of the others, so nothing follows for a single image of several.

Those limits assume that the attacked patients are independent, but all were used in one training run. The second bound does not
need this: members and non-members are paired at random, so that each of the two is the member with equal probability, and the
attack guesses the member of r pairs. With epsilon-differential privacy with respect to the replacement of all images of one
patient by those of another, each guess is right with at most the probability e^epsilon / (1 + e^epsilon) whatever the other
guesses were, so the number of right guesses is at most Binomial(r, e^epsilon / (1 + e^epsilon)) (the argument of Steinke, Nasr
and Jagielski, arXiv 2305.08846, theorem 5.2 with delta = 0, for pairs). The smallest epsilon that the number of right guesses
does not contradict is the bound.

So the bounds are about different relations, adding or removing a patient, and replacing one by another, of which the epsilon
can be up to twice as large. They are stated separately. Each has a confidence of 97.5 %, so that both together have 95 %
(Bonferroni). The unit is that of `dermis train gan --dp`. If it is not known which images are of one patient, images of one can
be in both halves, and neither bound is guaranteed. A small lower bound is no proof that epsilon is small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.classification import Floats, Labels
from dermis.privacy.attacks import Patients

CONFIDENCE = 0.975  # of each bound
DELTA = 1e-5
_THRESHOLDS = 64
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
_MIN_PAIRS = 5
MIN_PATIENTS = 20  # of members and of non-members in each half


@dataclass(frozen=True)
class EpsilonBound:
    """Lower bounds on two epsilons, from one half of the patients with an attack chosen on the other half.

    Both are about all images of one patient. `confidence` is that of each bound for itself. `from_rates` is about adding or
    removing a patient and allows for `delta`; `true_positives` and `false_positives` are the counts it is based on, with one
    image of each patient. `from_pairs` is about replacing one patient by another (delta = 0), from `right` of `guesses` guesses
    about a single training run.
    """

    confidence: float
    delta: float
    attack: str
    members: int
    non_members: int
    true_positives: int
    false_positives: int
    from_rates: float
    guesses: int
    right: int
    from_pairs: float

    @property
    def value(self) -> float:
        """The larger of the two numbers, which is judged. It is not a bound on one of the two epsilons alone."""
        return max(self.from_rates, self.from_pairs)

    @property
    def joint_confidence(self) -> float:
        """Confidence that both bounds hold."""
        return 1 - 2 * (1 - self.confidence)


def epsilon_bound(
    scores: Mapping[str, Floats],
    labels: Labels,
    patients: Patients,
    *,
    delta: float = DELTA,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    halves: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
) -> EpsilonBound | None:
    """Compute both bounds.

    Args:
        scores: Scores [N] by attack. Those of the second half must not depend on the labels of the second half.
        labels: 1 for members, 0 for non-members.
        patients: Patient of each image.
        delta: The delta of the first bound.
        confidence: Probability for each bound that it is not above the true epsilon.
        seed: Seed of the halves and of the pairs.
        halves: Result of `patient_halves`, for scores that were fitted to the first half; None to draw them.

    Returns:
        The bounds; None without scores, or if a half has fewer than 20 members or non-members.
    """
    if not scores:
        return None
    rng = np.random.default_rng([seed, 1])  # other numbers than those of the halves
    choice, test = patient_halves(labels, patients, seed) if halves is None else halves
    if min(int((labels[half] == label).sum()) for half in (choice, test) for label in (0, 1)) < MIN_PATIENTS:
        return None
    error = 1 - confidence
    attack, threshold, sign = _best_threshold(scores, labels, choice, delta, error)
    hits = sign * scores[attack][test] >= threshold
    is_member = labels[test] == 1
    positives, alarms = int(hits[is_member].sum()), int(hits[~is_member].sum())
    members, others = int(is_member.sum()), int((~is_member).sum())
    pairs_attack, share = _best_share(scores, labels, choice, error, rng)
    right, guesses = _guess(scores[pairs_attack], labels, test, share, rng)
    return EpsilonBound(
        confidence=confidence,
        delta=delta,
        attack=attack,
        members=members,
        non_members=others,
        true_positives=positives,
        false_positives=alarms,
        from_rates=bound_from_rates(positives, members, alarms, others, delta=delta, error=error),
        guesses=guesses,
        right=right,
        from_pairs=bound_from_guesses(right, guesses, error=error),
    )


def bound_from_rates(
    true_positives: int, members: int, false_positives: int, non_members: int, *, delta: float, error: float
) -> float:
    """Compute the bound from counts; 0 if they show nothing.

    Args:
        true_positives: Members that the attack takes for members.
        members: Number of attacked members.
        false_positives: Non-members that it takes for members.
        non_members: Number of attacked non-members.
        delta: The delta.
        error: Probability that the bound may be wrong with.
    """
    from scipy.stats import beta

    low = float(beta.ppf(error / 2, true_positives, members - true_positives + 1)) if true_positives else 0.0
    high = 1.0
    if false_positives < non_members:
        high = float(beta.ppf(1 - error / 2, false_positives + 1, non_members - false_positives))
    bound = 0.0
    if low > delta:
        bound = max(bound, math.log((low - delta) / high))
    if 1 - high > delta and low < 1:
        bound = max(bound, math.log((1 - high - delta) / (1 - low)))
    return bound


def bound_from_guesses(right: int, guesses: int, *, error: float) -> float:
    """Compute the smallest epsilon with P(Binomial(guesses, e^epsilon / (1 + e^epsilon)) >= right) >= error."""
    from scipy.stats import beta

    if not right:
        return 0.0
    low = float(beta.ppf(error, right, guesses - right + 1))
    return max(0.0, math.log(low / (1 - low))) if low < 1 else math.inf


def patient_halves(labels: Labels, patients: Patients, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw one image of each patient and divide these, members and non-members separately, into two halves.

    Returns:
        The half on which the attack is chosen, and the half on which the bound is computed: numbers of images.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    _, first = np.unique(patients[shuffled], return_index=True)
    images = rng.permutation(shuffled[first])
    halves: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for label in (0, 1):
        of_label = images[labels[images] == label]
        halves[0].append(of_label[::2])
        halves[1].append(of_label[1::2])
    return np.concatenate(halves[0]), np.concatenate(halves[1])


def _best_threshold(
    scores: Mapping[str, Floats], labels: Labels, images: NDArray[np.int64], delta: float, error: float
) -> tuple[str, float, float]:
    """Choose the attack, the threshold and the direction with the largest bound on some images."""
    is_member = labels[images] == 1
    members, others = int(is_member.sum()), int((~is_member).sum())
    best: tuple[float, float, str, float, float] | None = None
    for name, values in scores.items():
        for sign in (1.0, -1.0):
            signed = sign * values[images]
            quantiles = np.concatenate([np.linspace(0, 1, _THRESHOLDS), 1 - np.geomspace(0.5 / len(images), 0.02, 8)])
            for threshold in np.unique(np.quantile(signed, quantiles, method="lower")):
                hits = signed >= threshold
                t, f = int(hits[is_member].sum()), int(hits[~is_member].sum())
                bound = bound_from_rates(t, members, f, others, delta=delta, error=error)
                key = (bound, t / members - f / others)  # without any bound, the best separation
                if best is None or key > best[:2]:
                    best = (*key, name, float(threshold), sign)
    assert best is not None
    return best[2], best[3], best[4]


def _best_share(
    scores: Mapping[str, Floats], labels: Labels, images: NDArray[np.int64], error: float, rng: np.random.Generator
) -> tuple[str, float]:
    """Choose the attack and the share of pairs to guess with the largest bound on some images."""
    best = (-1.0, 0.0, next(iter(scores)), 1.0)
    for name, values in scores.items():
        for share in _SHARES:
            right, guesses = _guess(values, labels, images, share, rng)
            best = max(best, (bound_from_guesses(right, guesses, error=error), share, name, share))
    return best[2], best[3]


def _guess(
    values: Floats, labels: Labels, images: NDArray[np.int64], share: float, rng: np.random.Generator
) -> tuple[int, int]:
    """Pair members and non-members and guess in the share of pairs with the largest differences: right guesses, guesses.

    The larger score is the guess. Of equal scores each is right half of the time.
    """
    members, others = (rng.permutation(images[labels[images] == label]) for label in (1, 0))
    count = min(len(members), len(others))
    difference = values[members[:count]] - values[others[:count]]
    guesses = min(count, max(_MIN_PAIRS, round(share * count)))
    chosen = np.argsort(-np.abs(difference) + 1e-12 * rng.random(count), kind="stable")[:guesses]
    ties = difference[chosen] == 0
    return int((difference[chosen] > 0).sum() + rng.binomial(int(ties.sum()), 0.5)), guesses
