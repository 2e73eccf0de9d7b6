"""Results of a reader study: its statistics, and its answers as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dermis.metrics.reader_study import agreement_of, auc_of, permutation_p_value, rates_of, signal_detection
from dermis.reader_study import Agreement, Rates
from services.studies.tables import Answer, Invitation, Study, StudyImage

COLUMNS = (
    "reader",
    "invitation",
    "position",
    "image",
    "class",
    "truth",
    "source_index",
    "answer",
    "right",
    "confidence",
    "seconds",
    "changes",
    "answered_at",
)


@dataclass(frozen=True)
class ReaderResult:
    """The result of one reader."""

    invitation: Invitation
    answered: int
    rates: Rates
    d_prime: float
    criterion: float
    auc: float | None
    median_seconds: float


@dataclass(frozen=True)
class StudyResults:
    """The results of all readers together, and of each."""

    answers: int
    rates: Rates
    p_value: float | None
    classes: dict[str, Rates]
    readers: list[ReaderResult]
    agreement: Agreement | None
    median_seconds: float | None
    called_generated: list[tuple[StudyImage, int, int]]


def results_of(
    study: Study, images: Sequence[StudyImage], invitations: Sequence[Invitation], answers: Sequence[Answer]
) -> StudyResults:
    """Compute the results of a study from the answers so far.

    Args:
        study: The study.
        images: Its images, by number.
        invitations: Its invitations; those without answers are left out.
        answers: The answers of all readers.
    """
    with_answers = {answer.invitation for answer in answers}
    readers = [invitation for invitation in invitations if invitation.id in with_answers]
    row_of = {invitation.id: row for row, invitation in enumerate(readers)}
    generated = np.array([image.truth == "generated" for image in images], dtype=np.bool_)
    classes = np.array([study.class_of(image.label) for image in images])
    called = np.full((len(readers), len(images)), -1)
    for answer in answers:
        called[row_of[answer.invitation], answer.image] = answer.answer == "generated"
    votes, counts = (called == 1).sum(axis=0), (called >= 0).sum(axis=0)
    names = study.class_names if len(study.class_names) > 1 else []
    return StudyResults(
        answers=len(answers),
        rates=rates_of(called, generated),
        p_value=permutation_p_value(votes, counts, generated, classes) if answers else None,
        classes={name: rates_of(called[:, classes == name], generated[classes == name]) for name in names},
        readers=[
            _of_reader(invitation, images, [answer for answer in answers if answer.invitation == invitation.id])
            for invitation in readers
        ],
        agreement=agreement_of([invitation.label for invitation in readers], called) if len(readers) > 1 else None,
        median_seconds=float(np.median([answer.seconds for answer in answers])) if answers else None,
        called_generated=[(image, int(votes[i]), int(counts[i])) for i, image in enumerate(images) if counts[i]],
    )


def _of_reader(invitation: Invitation, images: Sequence[StudyImage], answers: Sequence[Answer]) -> ReaderResult:
    generated = np.array([images[answer.image].truth == "generated" for answer in answers], dtype=np.bool_)
    called = np.array([[int(answer.answer == "generated") for answer in answers]])
    rates = rates_of(called, generated)
    d_prime, criterion = signal_detection(rates.sensitivity, rates.specificity)
    ratings: dict[str, list[float]] = {"real": [], "generated": []}
    for answer in answers:
        sign = 1 if answer.answer == "generated" else -1
        ratings[images[answer.image].truth].append(float(sign * answer.confidence))
    return ReaderResult(
        invitation=invitation,
        answered=len(answers),
        rates=rates,
        d_prime=d_prime,
        criterion=criterion,
        auc=auc_of(ratings["real"], ratings["generated"]),
        median_seconds=float(np.median([answer.seconds for answer in answers])),
    )


def answer_rows(
    study: Study, images: Sequence[StudyImage], invitations: Sequence[Invitation], answers: Sequence[Answer]
) -> list[dict[str, str | int | float | bool | None]]:
    """The answers with the truth, one row each, in the order of the readers and of their images.

    `source_index` is the index of a generated sample, whose seed the study has; real images have none.
    """
    order = {invitation.id: invitation for invitation in invitations}
    rows: list[dict[str, str | int | float | bool | None]] = []
    for answer in sorted(answers, key=lambda each: (order[each.invitation].number, each.position)):
        image = images[answer.image]
        values = (
            order[answer.invitation].label,
            answer.invitation,
            answer.position + 1,
            answer.image + 1,
            study.class_of(image.label),
            image.truth,
            int(image.source) if image.truth == "generated" else None,
            answer.answer,
            answer.answer == image.truth,
            answer.confidence,
            round(answer.seconds, 3),
            answer.changes,
            np.datetime_as_string(np.datetime64(int(answer.answered_at), "s")) + "Z",
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def as_csv(rows: Sequence[dict[str, str | int | float | bool | None]]) -> str:
    """Rows as CSV. A text that a spreadsheet would take for a formula begins with an apostrophe there."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _safe(value) for name, value in row.items()})
    return buffer.getvalue()


def _safe(value: str | int | float | bool | None) -> str | int | float | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
