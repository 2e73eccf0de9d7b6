"""Membership inference from generated images, and how the success of attacks is measured.

An attack gives every real image a score; high scores mean "was a training image". Its success is measured by

- the area under the ROC curve (AUC): whether members have higher scores on average;
- the share of members found at 1 % and 0.1 % false positives: whether a few members can be recognised (Carlini et al., arXiv
  2112.03570);
- two permutation tests, which assign patients to members and non-members at random: one of the AUC ("average"), one of the
  scores beyond the 98th percentile ("few"), which detects a small number of copies that an average hides.

Three attacks use generated images alone:

    distance       -log of the distance to the nearest generated image
    density ratio  log p_G(x) - log p_R(x), the densities of generated and of other real images around x (van Breugel et al.,
                   arXiv 2302.12580), both by a Gaussian kernel
    learned        a classifier of members and non-members on distances to the nearest generated and real images of several
                   ranks in all feature spaces whose networks do not know the members; the score of an image is that of a
                   classifier that was fitted to other patients

The reference density p_R uses members and non-members alike, without the image's own patient, so that it treats both equally.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.metrics.classification import Estimate, Floats, Labels, auc, sensitivity_at_specificity
from dermis.metrics.neighbours import Features, squared_distances
from dermis.privacy.classifiers import CrossValidatedRidge, cross_validated, fit_logistic, standardised

Access = Literal["samples", "generator"]
Refit = Callable[[Floats], Floats]
Patients = NDArray[np.int64]
"""Number of the patient of each image, members first, then non-members."""

NEIGHBOURS = 32
FLOOR = 1e-3  # share of the median distance between real images; smaller distances count as this one
FALSE_POSITIVES = (0.01, 0.001)
PERMUTATIONS = 10_000
HALVES = 200
TAIL = 0.98
LEARNED = "learned"
_RANKS = (1, 2, 5, 10)
_ROWS = 100  # replicates computed at a time
_BLOCK = 1 << 22  # numbers computed at a time
_ENOUGH = 100  # permutations as extreme as the observation


@dataclass(frozen=True)
class Space:
    """Features of all images in one feature space."""

    name: str
    members: Features
    non_members: Features
    generated: Features
    knows_members: bool = False
    """Whether its network may have been trained on the members, so that it can tell them apart without any generated image."""

    @property
    def real(self) -> Features:
        """Members first, then non-members."""
        return np.concatenate([self.members, self.non_members])


def fair_spaces(spaces: Sequence[Space]) -> list[int]:
    """Return the numbers of the spaces that do not know the members; all, if every one does."""
    return [i for i, space in enumerate(spaces) if not space.knows_members] or list(range(len(spaces)))


@dataclass(frozen=True)
class Neighbours:
    """Distances of each real image, [N, k] and ascending."""

    to_generated: Floats
    generated_indices: NDArray[np.int64]
    to_real: Floats
    """To real images of other patients."""


@dataclass(frozen=True)
class Scores:
    """Scores [N] of an attack, members first.

    `refit` returns the scores [R, N] that it would have for other labels [R, N]; None if they do not depend on labels.
    """

    attack: str
    access: Access
    space: str
    values: Floats
    refit: Refit | None = None


def neighbours_of(space: Space, patients: Patients, *, to_real: Floats | None = None) -> Neighbours:
    """Find the nearest generated and real images of each real image.

    Args:
        space: The features.
        patients: Patient of each real image.
        to_real: Distances to real images, if they are known already.
    """
    real, k = space.real, min(NEIGHBOURS, len(space.generated))
    to_generated, indices = _nearest(real, space.generated, k)
    if to_real is None:
        k = min(NEIGHBOURS, len(patients) - int(np.bincount(patients).max()))
        to_real = _nearest(real, real, k, patients)[0]
    return Neighbours(to_generated, indices, to_real)


def _nearest(
    queries: Features, base: Features, k: int, patients: Patients | None = None
) -> tuple[Floats, NDArray[np.int64]]:
    """Find the k nearest rows of base; with `patients`, queries and base are one set, and own patients do not count."""
    distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    names = None if patients is None else torch.from_numpy(patients)
    for rows, squared in squared_distances(queries, base):
        if names is not None:
            squared.masked_fill_(names[rows][:, None] == names[None, :], torch.inf)
        values, positions = squared.topk(k, dim=1, largest=False)
        distances[rows], indices[rows] = values.sqrt().numpy(), positions.numpy()
    return distances, indices


def sample_scores(space: Space, neighbours: Neighbours) -> list[Scores]:
    """Compute the scores of the attacks by distance and by density ratio in one space."""
    floor = _floor(neighbours)
    distance = -np.log(np.maximum(neighbours.to_generated[:, 0], floor))
    return [
        Scores("distance", "samples", space.name, distance),
        Scores("density ratio", "samples", space.name, density_ratio(neighbours, len(space.generated))),
    ]


def density_ratio(neighbours: Neighbours, generated: int) -> Floats:
    """Compute log p_G - log p_R [N] with the kernel exp(-d^2 / 2h^2), h half the median distance of real images.

    The sums are over the nearest 32 images, beyond which the kernel is practically zero.
    """
    width = max(float(np.median(neighbours.to_real[:, 0])) / 2, np.finfo(float).tiny)
    ratio: Floats = _log_kernel_sum(neighbours.to_generated, width) - np.log(generated)
    ratio = ratio - _log_kernel_sum(neighbours.to_real, width) + np.log(len(neighbours.to_real))
    return ratio


def _log_kernel_sum(distances: Floats, width: float) -> Floats:
    logs = -np.square(distances / width) / 2
    greatest = logs[:, :1]
    total: Floats = greatest[:, 0] + np.log(np.exp(logs - greatest).sum(axis=1))
    return total


def _floor(neighbours: Neighbours) -> float:
    return max(FLOOR * float(np.median(neighbours.to_real[:, 0])), np.finfo(float).tiny)


def learned_scores(
    neighbours: Sequence[Neighbours], labels: Labels, patients: Patients, *, generated: int, seed: int
) -> Scores:
    """Compute the scores of the learned attack.

    Args:
        neighbours: The neighbours in each space.
        labels: 1 for members, 0 for non-members.
        patients: Patient of each image. Images of one patient are in one fold.
        generated: Number of generated images.
        seed: Seed of the folds.
    """
    ridge = CrossValidatedRidge(learned_columns(neighbours, generated), patients, seed=seed)
    values = ridge.scores(labels[None].astype(np.float64))[0]
    return Scores(LEARNED, "samples", "all", values, ridge.scores)


def learned_columns(neighbours: Sequence[Neighbours], generated: int) -> Floats:
    """Compute what the learned attack sees of each image, [N, columns]. It does not depend on who is a member.

    Args:
        neighbours: The neighbours in each space.
        generated: Number of generated images.
    """
    columns = []
    for each in neighbours:
        floor = _floor(each)
        for distances in (each.to_generated, each.to_real):
            columns += [np.log(np.maximum(distances[:, r - 1], floor)) for r in _RANKS if r <= distances.shape[1]]
        ratio = np.log(np.maximum(each.to_real[:, 0], floor)) - np.log(np.maximum(each.to_generated[:, 0], floor))
        columns += [ratio, *(np.maximum(ratio - np.quantile(ratio, share), 0) for share in (0.95, 0.99))]
        columns.append(density_ratio(each, generated))
    return np.stack(columns, axis=1)


def learned_scores_for_halves(
    neighbours: Sequence[Neighbours],
    labels: Labels,
    patients: Patients,
    choice: NDArray[np.int64],
    *,
    generated: int,
    seed: int,
) -> Scores:
    """Compute scores of the learned attack for the bounds on epsilon.

    The score of an image of another patient than those of `choice` does not depend on the label of any such image: it is that
    of one classifier that was fitted to the patients of `choice` and stays fixed. Their own scores are cross-validated among
    themselves and serve only to choose the attack and its threshold.

    Args:
        neighbours: The neighbours in each space.
        labels: 1 for members, 0 for non-members.
        patients: Patient of each image.
        choice: The first half of `dermis.privacy.epsilon.patient_halves`.
        generated: Number of generated images.
        seed: Seed of the folds.
    """
    x = standardised(learned_columns(neighbours, generated))
    fit = np.isin(patients, patients[choice])
    values = np.zeros(len(labels))
    values[fit] = cross_validated(x[fit], labels[fit], patients[fit], seed=seed)
    coefficients = fit_logistic(x[fit], labels[fit])
    values[~fit] = x[~fit] @ coefficients[1:] + coefficients[0]
    return Scores(LEARNED, "samples", "all", values)


# -- how successful an attack is


@dataclass(frozen=True)
class Recognised:
    """Share of members that an attack finds at a rate of false positives.

    `share` is None if there are fewer than 1 / `false_positives` non-members, so that the rate cannot be observed; `reason`
    says so. `expected` is what guessing finds on average.
    """

    false_positives: float
    share: Estimate | None
    expected: float | None
    reason: str = ""


@dataclass(frozen=True)
class AttackResult:
    """Success of one attack. Intervals are 95 %, from a bootstrap of whole patients."""

    attack: str
    access: Access
    space: str
    auc: Estimate
    control_auc: Estimate
    """AUC of the strongest classifier of members and non-members that the attack must beat. It sees the images only."""
    excess_auc: Estimate
    """`auc` less the control's AUC, which counts as 0.5 if it is smaller."""
    halves_auc: Estimate
    """AUC of one random half of the members against the other: mean, and the range of 95 % of the halves."""
    recognised: tuple[Recognised, ...]
    excess_recognised: Estimate | None
    """Share of members found at 1 % false positives less that of the control (at least that of guessing)."""
    p_average: float
    p_few: float
    adjusted_average: float
    adjusted_few: float
    """p-values adjusted over all attacks and both tests by Holm's method."""
    beats_control_average: bool
    beats_control_few: bool
    """Whether the control cannot tell the sets apart, or the interval of the difference to it is above 0."""


@dataclass(frozen=True)
class SplitScores:
    """Scores [N] of a control, and whether it tells members from non-members."""

    values: Floats
    separates: bool


@dataclass(frozen=True)
class Controls:
    """The controls of all attacks.

    `common` is the strongest in the spaces that do not know the members. `own` are those of the spaces that do: there an attack
    can succeed by what the network of the space knows, although the sets are alike and the generator discloses nothing.
    """

    common: SplitScores
    own: Mapping[str, SplitScores]

    def of(self, space: str) -> list[SplitScores]:
        """Return those that an attack in a space must beat."""
        return [self.common, *(control for name, control in self.own.items() if name == space)]


def measure_attacks(
    attacks: Sequence[Scores],
    controls: Controls,
    labels: Labels,
    patients: Patients,
    weights: Floats,
    *,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> tuple[AttackResult, ...]:
    """Measure the success of attacks against their controls.

    Args:
        attacks: Scores of each attack.
        controls: The controls.
        labels: 1 for members, 0 for non-members, [N].
        patients: Patient of each image.
        weights: Replicates of the bootstrap, [R, N].
        seed: Seed of the permutations.
        permutations: Number of permutations.
    """
    if not attacks:
        return ()
    p_values = np.empty((len(attacks), 2))
    fixed = [i for i, each in enumerate(attacks) if each.refit is None]
    if fixed:
        p_values[fixed] = permutation_p(
            [attacks[i].values for i in fixed], labels, patients, seed=seed, permutations=permutations
        )
    for i, each in enumerate(attacks):
        if each.refit is not None:
            p_values[i] = refitted_p(each.refit, labels, patients, seed=seed, permutations=permutations)
    adjusted = holm(p_values.ravel()).reshape(p_values.shape)
    held_out = int((labels == 0).sum())
    metrics = [auc, *([_found_at(FALSE_POSITIVES[0])] if held_out >= 1 / FALSE_POSITIVES[0] else [])]
    measured = {
        id(control): [replicates_of(metric, labels, control.values, weights) for metric in metrics]
        for control in (controls.common, *controls.own.values())
    }
    results = []
    for i, each in enumerate(attacks):
        to_beat = controls.of(each.space)
        separates = any(control.separates for control in to_beat)
        control_auc, *control_found = (
            np.maximum.reduce(values) for values in zip(*(measured[id(control)] for control in to_beat), strict=True)
        )
        own = replicates_of(auc, labels, each.values, weights)
        excess = estimate(own - np.maximum(control_auc, 0.5))
        recognised, excess_found = [], None
        for rate in FALSE_POSITIVES:
            if held_out < 1 / rate:
                reason = f"not measurable with {held_out:,} held-out images; at least {round(1 / rate):,} are needed"
                recognised.append(Recognised(rate, None, None, reason))
                continue
            found = replicates_of(_found_at(rate), labels, each.values, weights)
            expected = (int(rate * held_out + 1e-9) + 1) / (held_out + 1)
            recognised.append(Recognised(rate, estimate(found), expected))
            if rate == FALSE_POSITIVES[0] and control_found:
                excess_found = estimate(found - np.maximum(control_found[0], expected))
        results.append(
            AttackResult(
                attack=each.attack,
                access=each.access,
                space=each.space,
                auc=estimate(own),
                control_auc=estimate(control_auc),
                excess_auc=excess,
                halves_auc=halves_auc(each.values[labels == 1], patients[labels == 1], seed=seed),
                recognised=tuple(recognised),
                excess_recognised=excess_found,
                p_average=float(p_values[i, 0]),
                p_few=float(p_values[i, 1]),
                adjusted_average=float(adjusted[i, 0]),
                adjusted_few=float(adjusted[i, 1]),
                beats_control_average=not separates or excess.low > 0,
                beats_control_few=not separates or (excess_found is not None and excess_found.low > 0),
            )
        )
    return tuple(results)


def replicates_of(
    metric: Callable[[Labels, Floats, Floats], Floats], labels: Labels, scores: Floats, weights: Floats
) -> Floats:
    """Compute a metric for all images and then for each row of weights [R, N]: [1 + R]."""
    rows = [np.ones((1, len(labels))), *(weights[i : i + _ROWS] for i in range(0, len(weights), _ROWS))]
    return np.concatenate([metric(labels, scores, part) for part in rows])


def estimate(values: Floats, level: float = 0.95) -> Estimate:
    """Make an estimate of a value and its replicates, [1 + R]."""
    low, high = np.quantile(values[1:], [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values[0]), float(low), float(high))


def _found_at(rate: float) -> Callable[[Labels, Floats, Floats], Floats]:
    def found(labels: Labels, scores: Floats, weights: Floats) -> Floats:
        return sensitivity_at_specificity(labels, scores, weights, specificity=1 - rate)

    return found


def halves_auc(scores: Floats, patients: Patients, *, seed: int, halves: int = HALVES) -> Estimate:
    """Compute the AUC of one random half of the members' patients against the other: mean and range of 95 %."""
    rng = np.random.default_rng(seed)
    names, group = np.unique(patients, return_inverse=True)
    areas = []
    for _ in range(halves):
        labels = (rng.permutation(len(names)) % 2)[group]
        if 0 < labels.sum() < len(labels):
            areas.append(float(auc(labels, scores)[0]))
    if not areas:
        return Estimate(0.5, 0.0, 1.0)
    return Estimate(float(np.mean(areas)), *(float(np.quantile(areas, share)) for share in (0.025, 0.975)))


def permutation_p(
    scores: Sequence[Floats], labels: Labels, patients: Patients, *, seed: int, permutations: int = PERMUTATIONS
) -> Floats:
    """Compute one-sided p-values [attacks, 2] of the AUC and of the scores beyond the 98th percentile.

    Patients are assigned to members and non-members at random, as many to each as there are. The statistics are the mean rank
    of members less that of non-members, and the same for the amount by which scores exceed the percentile of all images,
    which is limited so that a single image does not dominate.

    If the patients were divided at random, the tests are exact for scores that do not depend on the division, as those of the
    distance, the density ratio, the projection and the discriminator. For others see `refitted_p`.
    """
    from scipy.stats import rankdata

    columns = []
    for values in scores:
        columns += [rankdata(values) / len(values), tail_excess(values)]
    table = np.stack(columns, axis=1)
    _, group = np.unique(patients, return_inverse=True)
    of_group = np.zeros(group.max() + 1, bool)
    of_group[group[labels == 1]] = True
    total = table.sum(axis=0)

    def statistic(members: Floats) -> Floats:
        count = members.sum(axis=1, keepdims=True)
        sums = members @ table
        difference: Floats = sums / np.maximum(count, 1) - (total - sums) / np.maximum(len(labels) - count, 1)
        return difference

    observed = statistic(labels[None].astype(np.float64))
    rng = np.random.default_rng(seed)
    as_large = np.zeros(table.shape[1])
    for start in range(0, permutations, _ROWS):
        rows = min(_ROWS, permutations - start)
        drawn = rng.permuted(np.tile(of_group, (rows, 1)), axis=1)
        as_large += (statistic(drawn[:, group].astype(np.float64)) >= observed - 1e-12).sum(axis=0)
    p: Floats = ((1 + as_large) / (1 + permutations)).reshape(len(scores), 2)
    return p


def refitted_p(
    refit: Refit, labels: Labels, patients: Patients, *, seed: int, permutations: int = PERMUTATIONS
) -> Floats:
    """Compute the p-values [2] of `permutation_p` for scores that depend on labels, which are fitted anew each time.

    So these tests are exact too. Drawing ends as soon as both statistics were as large as observed in 100 permutations: with
    l permutations until the 100th such one, 100 / l is a valid p-value (Besag and Clifford, Biometrika 78, 1991).
    """
    rng = np.random.default_rng(seed)
    names, group = np.unique(patients, return_inverse=True)
    of_group = np.zeros(len(names), bool)
    of_group[group[labels == 1]] = True
    shuffled = rng.permutation(len(labels))  # equal scores have the order of this, which has nothing to do with labels

    def statistics(assigned: Floats) -> Floats:
        scores, members = refit(assigned)[:, shuffled], assigned[:, shuffled]
        order = np.argsort(scores, axis=1, kind="stable")
        ranks = np.take_along_axis(members, order, axis=1) @ np.arange(1, len(labels) + 1) / len(labels)
        excess = tail_excess(scores)
        sums = np.stack([ranks, (excess * members).sum(axis=1)], axis=1)
        totals = np.stack([np.full(len(scores), (len(labels) + 1) / 2), excess.sum(axis=1)], axis=1)
        count = members.sum(axis=1, keepdims=True)
        difference: Floats = sums / np.maximum(count, 1) - (totals - sums) / np.maximum(len(labels) - count, 1)
        return difference

    observed = statistics(labels[None].astype(np.float64))
    as_large = np.zeros((0, 2), bool)
    block = max(1, min(_ROWS, _BLOCK // len(labels)))
    while len(as_large) < permutations and as_large.sum(axis=0).min() < _ENOUGH:
        rows = min(block, permutations - len(as_large))
        drawn = rng.permuted(np.tile(of_group, (rows, 1)), axis=1)[:, group].astype(np.float64)
        as_large = np.concatenate([as_large, statistics(drawn) >= observed - 1e-12])
    reached = np.cumsum(as_large, axis=0)
    return np.array(
        [
            _ENOUGH / (1 + np.searchsorted(counts, _ENOUGH))
            if counts[-1] >= _ENOUGH
            else (1 + counts[-1]) / (1 + permutations)
            for counts in reached.T
        ]
    )


def tail_excess(scores: Floats) -> Floats:
    """Return by how much each score [..., N] exceeds the 98th percentile, divided by that percentile's gap to the median.

    It is at most 3. If no score of a row exceeds it, the images with the largest score have 1 and the others 0.
    """
    middle, tail = np.quantile(scores, [0.5, TAIL], axis=-1, keepdims=True)
    gap = np.maximum(tail - middle, np.finfo(float).tiny)
    excess: Floats = np.clip(scores - tail, 0, 3 * gap) / gap
    # If none exceeds it, more than 2 % of the images have the largest score, as exact copies do.
    equal = (scores == tail) & (scores > middle)
    return np.where(excess.any(axis=-1, keepdims=True), excess, equal)


def holm(p_values: Floats) -> Floats:
    """Adjust p-values for multiple testing by Holm's method (1979): the chance of any false alarm stays below the level."""
    order = np.argsort(p_values, kind="stable")
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted
