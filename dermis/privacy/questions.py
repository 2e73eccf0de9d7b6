"""The three questions of the Article 29 Working Party (opinion 05/2014 on anonymisation techniques).

Each is asked as an attack of which the success on members is compared with the success on non-members, of which the generator
knows nothing (Giomi et al., "Anonymeter", arXiv 2211.10459): success on non-members is what the images of any person reveal.
The risk is (r_members - r_controls) / (1 - r_controls), not defined for r_controls = 1.

singling out  Can a generated image be used to isolate one person? Each generated image makes one guess: "exactly one patient
              has an image nearer to this one than the nearest other generated image". The guess uses generated images
              only. It is tested on sets of equally many patients, a quarter of the number of generated images or fewer: in
              larger sets several patients would be as near by coincidence, and in much smaller radii nobody.
linkability   Can two records of one person be linked through the generated images? Two images of a patient are linked if the
              same generated image is nearest to both. Where too few patients have two images, the two records are two views of
              one image: its features in two spaces.
inference     Can an attribute of a person be inferred from the generated images? The guess for an image is the attribute of its
              nearest generated image. The class of a generated image is known. Sex, age, site and diagnosis are not: a
              generated image gets the value of the nearest of a third of the held-out images, which are then not attacked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.metrics.classification import Estimate, Floats, Labels
from dermis.metrics.neighbours import nearest, squared_distances
from dermis.privacy.attacks import Neighbours, Patients, Space, estimate
from dermis.privacy.shares import difference_of_shares, too_few

Name = Literal["singling out", "linkability", "inference"]
MIN_ATTEMPTS = 50  # on members and on non-members
_GUESSES_FOR_PATIENT = 4
_REPLICATES = 1000
_PERMUTATIONS = 2000


@dataclass(frozen=True)
class Answer:
    """Answer to one question about one kind of information.

    `members` and `controls` are rates of success; `excess` is their difference with an interval of the level `level`. All are
    None if it was not measured, for the reason in `reason`. `risk` is also None if every attempt on held-out images succeeds:
    no success on members can be higher then, and there is no rest that the difference could be a share of.
    """

    question: Name
    subject: str
    measure: str
    members: float | None = None
    controls: float | None = None
    excess: Estimate | None = None
    risk: float | None = None
    attempts: int = 0
    level: float = 0.95
    reason: str = ""


@dataclass(frozen=True)
class Attribute:
    """Values of one attribute. "" is an unknown value. `generated` is None if generated images have no such value."""

    name: str
    real: Sequence[str]
    generated: Sequence[str] | None = None


def _answer(
    question: Name,
    subject: str,
    measure: str,
    rates: tuple[float, float],
    excess: Estimate,
    attempts: int,
    level: float,
) -> Answer:
    members, controls = rates
    risk = (members - controls) / (1 - controls) if controls < 1 else None
    return Answer(question, subject, measure, members, controls, excess, risk, attempts, level)


def _answer_of_images(
    question: Name,
    subject: str,
    measure: str,
    success: NDArray[np.bool_],
    labels: Labels,
    patients: Patients,
    *,
    level: float,
    seed: int,
) -> Answer:
    """Answer a question from the success of one attempt on each image (or pair of images of a patient)."""
    if reason := too_few(success, labels, patients, level=level):
        return Answer(question, subject, measure, reason=f"attempts that succeed: {reason}")
    rates = (float(success[labels == 1].mean()), float(success[labels == 0].mean()))
    excess = difference_of_shares(success, labels, patients, level=level, seed=seed)
    return _answer(question, subject, measure, rates, excess, len(success), level)


def singling_out(space: Space, labels: Labels, patients: Patients, *, level: float, seed: int) -> Answer:
    """Answer the first question in one feature space.

    The interval is from a bootstrap of both the guesses and the patients. If it is above 0, it is extended to 0 unless a test
    confirms it, in which patients are assigned to the sets at random and all guesses are tested again.
    """
    rng = np.random.default_rng(seed)
    names, group = np.unique(patients, return_inverse=True)
    is_member = np.zeros(len(names), bool)
    is_member[group[labels == 1]] = True
    kinds = [rng.permutation(np.flatnonzero(of_kind)) for of_kind in (is_member, ~is_member)]
    count = len(space.generated)
    size = min(*map(len, kinds), max(count // _GUESSES_FOR_PATIENT, 1))
    measure = f"a generated image isolates exactly one of {size:,} patients"
    if min(*map(len, kinds), count) < MIN_ATTEMPTS:
        return Answer("singling out", "images", measure, reason=f"fewer than {MIN_ATTEMPTS} patients or images")
    sets = [len(of_kind) // size for of_kind in kinds]  # all disjoint sets of `size` patients, first those of members
    chosen = [of_kind[: number * size] for of_kind, number in zip(kinds, sets, strict=True)]
    compared = np.concatenate(chosen)
    guesses, hits = _within_radius(space, group)

    def successes(assigned: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Return guess and patient of each success if patients are assigned to the sets in this order, and its kind."""
        set_of = np.full(len(names), -1)
        set_of[assigned] = np.arange(len(assigned)) // size
        inside = np.flatnonzero(set_of[hits] >= 0)
        keys = guesses[inside] * sum(sets) + set_of[hits[inside]]
        alone = inside[np.bincount(keys)[keys] == 1] if len(inside) else inside
        return guesses[alone], hits[alone], set_of[hits[alone]] < sets[0]

    def rates(of_members: NDArray[np.bool_], weights: Floats) -> tuple[float, float]:
        totals = weights[of_members].sum() / sets[0], weights[~of_members].sum() / sets[1]
        return float(totals[0] / count), float(totals[1] / count)

    by_guess, by_patient, of_members = successes(compared)
    isolated = np.isin(compared, by_patient)
    if reason := too_few(isolated, is_member[compared].astype(np.int64), compared, level=level):
        return Answer("singling out", "images", measure, reason=f"a generated image isolates them: {reason}")
    observed = rates(of_members, np.ones(len(by_guess)))
    values = [observed[0] - observed[1]]
    for _ in range(_REPLICATES):
        of_guess = np.bincount(rng.integers(0, count, count), minlength=count)
        drawn = [each[rng.integers(0, len(each), len(each))] for each in chosen]
        of_patient = np.bincount(np.concatenate(drawn), minlength=len(names))
        replicate = rates(of_members, (of_guess[by_guess] * of_patient[by_patient]).astype(np.float64))
        values.append(replicate[0] - replicate[1])
    excess = estimate(np.array(values), level)
    if excess.low > 0:
        as_large = 0
        for _ in range(_PERMUTATIONS):
            kind = successes(rng.permutation(len(names))[: len(compared)])[2]
            permuted = rates(kind, np.ones(len(kind)))
            as_large += permuted[0] - permuted[1] >= excess.value - 1e-12
        if (1 + as_large) / (1 + _PERMUTATIONS) > (1 - level) / 2:
            excess = Estimate(excess.value, 0.0, excess.high)
    return _answer("singling out", "images", measure, observed, excess, count, level)


def _within_radius(space: Space, group: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all pairs of a generated image and a patient with an image within its radius: numbers of both."""
    radii = nearest(space.generated, space.generated, 1, exclude_self=True)[0][:, 0]
    pairs = [np.zeros((0, 2), np.int64)]
    for rows, squared in squared_distances(space.generated, space.real):
        within = (squared <= torch.from_numpy(radii[rows, None] ** 2)).nonzero().numpy()
        numbers = np.arange(len(radii))[rows][within[:, 0]]
        pairs.append(np.unique(np.stack([numbers, group[within[:, 1]]], axis=1), axis=0))
    guesses, hits = np.concatenate(pairs).T
    return guesses, hits


def linkability(
    spaces: Sequence[Space],
    neighbours: Sequence[Neighbours],
    labels: Labels,
    patients: Patients,
    *,
    level: float,
    seed: int,
) -> Answer:
    """Answer the second question, by two images of each patient or else by two views of each image."""
    closest = neighbours[0].generated_indices[:, 0]
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    order = shuffled[np.argsort(patients[shuffled], kind="stable")]
    starts = np.flatnonzero(np.diff(patients[order], prepend=-1))
    several = np.flatnonzero(np.diff(np.append(starts, len(order))) > 1)
    first, second = order[starts[several]], order[np.minimum(starts[several] + 1, len(order) - 1)]
    if min(int((labels[first] == label).sum()) for label in (0, 1)) >= MIN_ATTEMPTS:
        measure, subject = "two images of one patient have the same nearest generated image", "images of one patient"
    elif len(spaces) > 1:
        measure = f"an image has the same nearest generated image in {spaces[0].name} and {spaces[1].name}"
        first = second = np.arange(len(labels))
        subject = "two views of one image"
    else:
        reason = f"fewer than {MIN_ATTEMPTS} patients have two images, and there is only one feature space"
        return Answer("linkability", "images", "", reason=reason)
    other = neighbours[1].generated_indices[:, 0] if subject == "two views of one image" else closest
    return _answer_of_images(
        "linkability",
        subject,
        measure,
        closest[first] == other[second],
        labels[first],
        patients[first],
        level=level,
        seed=seed,
    )


def inference(
    space: Space,
    neighbours: Neighbours,
    attribute: Attribute,
    labels: Labels,
    patients: Patients,
    *,
    level: float,
    seed: int,
) -> Answer:
    """Answer the third question for one attribute in one feature space."""
    measure = f"the nearest generated image has the {attribute.name} of the person"
    values = np.array(attribute.real)
    known = values != ""
    if attribute.generated is not None:
        of_generated = np.array(attribute.generated)
    else:
        others = np.unique(patients[labels == 0])
        helpers = np.random.default_rng(seed).permutation(others)[: len(others) // 3]
        helps = np.isin(patients, helpers) & known
        if not helps.any():
            return Answer("inference", attribute.name, measure, reason="no held-out image has a value")
        of_generated = values[helps][nearest(space.generated, space.real[helps])[1][:, 0]]
        known &= ~np.isin(patients, helpers)
    if min(int((labels[known] == label).sum()) for label in (0, 1)) < MIN_ATTEMPTS:
        reason = f"fewer than {MIN_ATTEMPTS} members or held-out images have a value"
        return Answer("inference", attribute.name, measure, reason=reason)
    guesses = of_generated[neighbours.generated_indices[:, 0]]
    if len(set(guesses[known].tolist())) < 2:
        reason = "all nearest generated images have the same value, so nothing about a person is guessed"
        return Answer("inference", attribute.name, measure, reason=reason)
    return _answer_of_images(
        "inference",
        attribute.name,
        measure,
        (values == guesses)[known],
        labels[known],
        patients[known],
        level=level,
        seed=seed,
    )


def answer_questions(
    spaces: Sequence[Space],
    neighbours: Sequence[Neighbours],
    attributes: Sequence[Attribute],
    labels: Labels,
    patients: Patients,
    *,
    level: float,
    seed: int,
) -> tuple[Answer, ...]:
    """Answer all questions. `level` is that of all intervals together; each has a higher one, by Bonferroni's method."""
    own = 1 - (1 - level) / (2 + max(len(attributes), 1))
    answers = [
        singling_out(spaces[0], labels, patients, level=own, seed=seed),
        linkability(spaces, neighbours, labels, patients, level=own, seed=seed),
    ]
    answers += [
        inference(spaces[0], neighbours[0], attribute, labels, patients, level=own, seed=seed)
        for attribute in attributes
    ]
    if not attributes:
        reason = "neither the images nor the generator have classes or metadata"
        answers.append(Answer("inference", "metadata", "", reason=reason))
    return tuple(answers)
