"""Compare the share of members with the same share of held-out images, by an interval that is valid for rare shares too.

A bootstrap of rare events is not: if no held-out image shows the event, no replicate shows it, and the interval is above 0 much
too often. The interval here is Newcombe's hybrid score interval (Statistics in Medicine 17, 1998, 873-890, method 10): Wilson's
intervals of the two shares are combined. The numbers of images are divided by the design effect, the variance of the
shares with patients as units divided by that of independent images, so that images of one patient do not count as independent
observations.

Score intervals are approximations. So an interval above 0 must be confirmed by a test that needs no approximation: patients are
assigned to members and held-out images at random, as many to each as there are. If more than the permitted share of assignments
has a difference as large as the observed one, the interval is extended to 0.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from dermis.metrics.classification import Estimate, Floats, Labels

PERMUTATIONS = 10_000
_Counts = NDArray[np.int64]


def difference_of_shares(
    values: NDArray[np.bool_], labels: Labels, patients: NDArray[np.int64], *, level: float, seed: int
) -> Estimate:
    """Compute the share of members less that of held-out images, with its interval.

    Args:
        values: Whether each image shows the event, [N].
        labels: 1 for members, 0 for held-out images; both occur.
        patients: Patient of each image. No patient is in both sets.
        level: Level of the interval. For equal shares it is above 0 with a probability of at most (1 - level) / 2.
        seed: Seed of the permutations.
    """
    from scipy.stats import norm

    error = (1 - level) / 2
    z = float(norm.ppf(1 - error))
    events, images, is_member = _of_patients(values, labels, patients)
    effect = _design_effect(events, images, is_member)
    shares, limits = [], []
    for chosen in (is_member, ~is_member):
        count = int(images[chosen].sum())
        shares.append(int(events[chosen].sum()) / count)
        limits.append(_wilson(shares[-1], count / effect, z))
    (members, others), ((low, high), (low_of_others, high_of_others)) = shares, limits
    difference = members - others
    lower = difference - math.hypot(members - low, high_of_others - others)
    upper = difference + math.hypot(high - members, others - low_of_others)
    if lower > 0 and _permutation_p(events, images, is_member, seed) > error:
        lower = 0.0
    return Estimate(difference, lower, upper)


def too_few(values: NDArray[np.bool_], labels: Labels, patients: NDArray[np.int64], *, level: float) -> str:
    """Return why no difference of the shares could be detected, "" if one could.

    If the event is so rare that even a difference in which only members show it would occur by chance too often, then an
    interval that contains 0 does not mean that there is no difference. The same is true if almost all images show it.

    Args:
        values: Whether each image shows the event, [N].
        labels: 1 for members, 0 for held-out images.
        patients: Patient of each image.
        level: Level of the interval of the difference.
    """
    events, images, is_member = _of_patients(values, labels, patients)
    members, others = int(is_member.sum()), int((~is_member).sum())
    for count, of_set, rest, what in (
        (int((events > 0).sum()), members, others, "show it"),
        (int((events < images).sum()), others, members, "do not show it"),
    ):
        needed = fewest_by_chance(of_set, rest, (1 - level) / 2)
        if needed is None or count < needed:
            wanted = "more than there are" if needed is None else f"at least {needed:,}"
            return f"{count:,} of {len(events):,} patients {what}; {wanted} are needed to detect a difference"
    return ""


def fewest_by_chance(of_set: int, rest: int, level: float) -> int | None:
    """Return the smallest number of patients that are all of one set by chance with a probability of at most `level`.

    Args:
        of_set: Patients of that set.
        rest: Patients of the other set.
        level: The probability.

    Returns:
        The number; None if even all patients of the set are not enough.
    """
    chance = 1.0
    for k in range(of_set):
        chance *= (of_set - k) / (of_set + rest - k)
        if chance <= level:
            return k + 1
    return None


def _of_patients(
    values: NDArray[np.bool_], labels: Labels, patients: NDArray[np.int64]
) -> tuple[_Counts, _Counts, NDArray[np.bool_]]:
    """Return the events and images of each patient, and whether the patient is a member."""
    names, group = np.unique(patients, return_inverse=True)
    images = np.bincount(group, minlength=len(names))
    events = np.bincount(group, weights=values, minlength=len(names)).astype(np.int64)
    is_member = np.zeros(len(names), bool)
    is_member[group[labels == 1]] = True
    return events, images, is_member


def _design_effect(events: _Counts, images: _Counts, is_member: NDArray[np.bool_]) -> float:
    """Return the variance with patients as units divided by that of independent images, for both sets together; at least 1."""
    of_patients = of_images = 0.0
    for chosen in (is_member, ~is_member):
        share = events[chosen].sum() / images[chosen].sum()
        of_patients += float(np.square(events[chosen] - share * images[chosen]).sum())
        of_images += float(images[chosen].sum() * share * (1 - share))
    return max(of_patients / of_images, 1.0) if of_images > 0 else 1.0


def _wilson(share: float, size: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a share; `size` need not be a whole number."""
    middle = share + z * z / (2 * size)
    half = z * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    scale = 1 + z * z / size
    return max((middle - half) / scale, 0.0), min((middle + half) / scale, 1.0)


def _permutation_p(events: _Counts, images: _Counts, is_member: NDArray[np.bool_], seed: int) -> float:
    """Return the share of random assignments of patients with a difference of the shares at least as large as the observed.

    Patients with equal numbers of events and images are exchangeable, so only their number among the members is drawn.
    """
    kinds, counts = np.unique(np.stack([events, images], axis=1), axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multivariate_hypergeometric(
        counts, int(is_member.sum()), size=PERMUTATIONS, method="marginals"
    )

    def difference(member_events: Floats, member_images: Floats) -> Floats:
        other_images = np.maximum(images.sum() - member_images, 1)
        result: Floats = member_events / np.maximum(member_images, 1) - (events.sum() - member_events) / other_images
        return result

    observed = difference(events[is_member].sum(), images[is_member].sum())
    as_large = difference(*(drawn @ kinds).T.astype(np.float64)) >= observed - 1e-12
    return float((1 + as_large.sum()) / (1 + PERMUTATIONS))
