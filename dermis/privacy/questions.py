"""The three questions of the Article 29 Working Party (opinion 05/2014 on anonymisation techniques).

Each is asked as an attack of which the success on members is compared with the success on non-members, of which the generator
knows nothing (Giomi et al., "Anonymeter", arXiv 2211.10459): success on non-members is what the images of any person reveal.
The risk is (r_members - r_controls) / (1 - r_controls).

singling out  Can a generated image be used to isolate one person? Each generated image makes one guess: "exactly one patient
              has an image nearer to this one than half the distance to the nearest other generated image". The guess uses
              generated images only. It is tested on sets of equally many patients.
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

from dermis.metrics.classification import Estimate, Labels
from dermis.metrics.neighbours import nearest, squared_distances
from dermis.privacy.attacks import Neighbours, Patients, Space, estimate
from dermis.privacy.shares import difference_of_shares

Name = Literal["singling out", "linkability", "inference"]
MIN_ATTEMPTS = 50  # on members and on non-members


@dataclass(frozen=True)
class Answer:
    """Answer to one question about one kind of information.

    `members` and `controls` are rates of success; `excess` is their difference with an interval of the level `level`. All are
    None if it was not measured, for the reason in `reason`.
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
    risk = (members - controls) / (1 - controls) if controls < 1 else 0.0
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
    rates = (float(success[labels == 1].mean()), float(success[labels == 0].mean()))
    excess = difference_of_shares(success, labels, patients, level=level, seed=seed)
    return _answer(question, subject, measure, rates, excess, len(success), level)


def singling_out(space: Space, labels: Labels, patients: Patients, *, level: float, seed: int) -> Answer:
    """Answer the first question in one feature space. The interval is from a bootstrap of the guesses."""
    measure = "a generated image isolates exactly one patient"
    rng = np.random.default_rng(seed)
    radii = nearest(space.generated, space.generated, 1, exclude_self=True)[0][:, 0] / 2
    names, group = np.unique(patients, return_inverse=True)
    is_member = np.zeros(len(names), bool)
    is_member[group[labels == 1]] = True
    members, others = (rng.permutation(np.flatnonzero(of_kind)) for of_kind in (is_member, ~is_member))
    size = min(len(members), len(others))
    if min(size, len(space.generated)) < MIN_ATTEMPTS:
        return Answer("singling out", "images", measure, reason=f"fewer than {MIN_ATTEMPTS} patients or images")
    sets = np.zeros((len(names), 0))
    kinds: list[int] = []
    for label, chosen in ((1, members), (0, others)):  # all disjoint sets of `size` patients
        for start in range(0, len(chosen) - size + 1, size):
            column = np.zeros((len(names), 1))
            column[chosen[start : start + size]] = 1
            sets, kinds = np.concatenate([sets, column], axis=1), [*kinds, label]
    columns, group_of_image = torch.from_numpy(sets), torch.from_numpy(group)
    alone = np.zeros((len(space.generated), len(kinds)))
    for rows, squared in squared_distances(space.generated, space.real):
        within = (squared <= torch.from_numpy(radii[rows, None] ** 2)).double()
        hit = torch.zeros(len(within), len(names), dtype=torch.float64).index_add_(1, group_of_image, within) > 0
        alone[rows] = (hit.double() @ columns == 1).numpy()
    success = [alone[:, np.array(kinds) == label].mean(axis=1) for label in (1, 0)]
    difference = success[0] - success[1]
    draws = [difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(1000)]
    values = np.concatenate([[difference.mean()], draws])
    rates = (float(success[0].mean()), float(success[1].mean()))
    return _answer("singling out", "images", measure, rates, estimate(values, level), len(difference), level)


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
