"""Results of a reader study: its statistics, and its answers as a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dermis.metrics.reader_study import agreement_of, auc_of, permutation_p_value, rates_of, signal_detection
from dermis.reader_study import Agreement, Rates
from services.studies.tables import Answer, AnswerArrays, Invitation, Study, StudyImage

Value: TypeAlias = str | int | float | bool | None
Row: TypeAlias = dict[str, Value]

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
    study: Study, images: Sequence[StudyImage], invitations: Sequence[Invitation], answers: AnswerArrays
) -> StudyResults:
    """Compute the results of a study from the answers so far.

    Args:
        study: The study.
        images: Its images, by number.
        invitations: Its invitations; those without answers are left out.
        answers: The answers, a row for each invitation.
    """
    answered = answers.called >= 0
    rows = np.flatnonzero(answered.any(axis=1)).tolist()
    called, readers = answers.called[rows], [invitations[row] for row in rows]
    generated = np.array([image.truth == "generated" for image in images], dtype=np.bool_)
    classes = np.array([study.class_of(image.label) for image in images])
    votes, counts = (called == 1).sum(axis=0), answered.sum(axis=0)
    names = study.class_names if len(study.class_names) > 1 else []
    return StudyResults(
        answers=int(counts.sum()),
        rates=rates_of(called, generated),
        p_value=permutation_p_value(votes, counts, generated, classes) if rows else None,
        classes={name: rates_of(called[:, classes == name], generated[classes == name]) for name in names},
        readers=[_of_reader(invitations[row], generated, answers, row) for row in rows],
        agreement=agreement_of([invitation.label for invitation in readers], called) if len(readers) > 1 else None,
        median_seconds=float(np.median(answers.seconds[answered])) if rows else None,
        called_generated=[(image, int(votes[i]), int(counts[i])) for i, image in enumerate(images) if counts[i]],
    )


def _of_reader(
    invitation: Invitation, generated: npt.NDArray[np.bool_], answers: AnswerArrays, row: int
) -> ReaderResult:
    answered = answers.called[row] >= 0
    called, truth = answers.called[row, answered], generated[answered]
    rates = rates_of(called[None], truth)
    d_prime, criterion = signal_detection(rates.sensitivity, rates.specificity)
    ratings = np.where(called == 1, 1.0, -1.0) * answers.confidence[row, answered]
    return ReaderResult(
        invitation=invitation,
        answered=len(called),
        rates=rates,
        d_prime=d_prime,
        criterion=criterion,
        auc=auc_of(ratings[~truth].tolist(), ratings[truth].tolist()),
        median_seconds=float(np.median(answers.seconds[row, answered])),
    )


def answer_rows(
    study: Study, images: Sequence[StudyImage], invitation: Invitation, answers: Sequence[Answer]
) -> list[Row]:
    """The answers of one reader with the truth, one row each, in the order of the images of the reader.

    `source_index` is the index of a generated sample, whose seed the study has; real images have none.
    """
    rows: list[Row] = []
    for answer in answers:
        image = images[answer.image]
        values = (
            invitation.label,
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


def as_csv(readers: Iterable[Sequence[Row]]) -> Iterator[str]:
    """Rows of one reader after another as CSV. A text that a spreadsheet would take for a formula begins with an apostrophe."""
    yield ",".join(COLUMNS) + "\r\n"
    for rows in readers:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\r\n")
        for row in rows:
            writer.writerow({name: _safe(value) for name, value in row.items()})
        yield buffer.getvalue()


def as_json(study: Study, readers: Iterable[Sequence[Row]]) -> Iterator[str]:
    """Rows of one reader after another as one JSON document."""
    before = f'{{"object":"study_answers","study":"{study.id}","data":['
    for rows in readers:
        if rows:
            yield before + ",".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
            before = ","
    yield ("" if before == "," else before) + "]}"


def _safe(value: Value) -> str | int | float | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return value
