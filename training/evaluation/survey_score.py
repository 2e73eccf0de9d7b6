"""Score a survey: how well experts distinguish generated from real images, and how far they agree.

"Generated" is the positive answer: sensitivity is the share of generated images that were called generated, specificity the
share of real images that were called real. Chance is 50 %. `docs/survey.md` explains all numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import stats

from dermis.errors import DataError, quote
from dermis.metrics.reader_study import (
    agreement_of,
    auc_of,
    permutation_p_value,
    rates_of,
    signal_detection,
    wilson,
)
from dermis.reader_study import Agreement, Rate, Rates, Truth
from training.evaluation.survey import SurveyKey, first_fault

PAPER_ACCURACY = 0.54  # four experts, 200 images, arXiv 2208.11702


class SurveyAnswer(BaseModel):
    """One answer in a file of answers."""

    model_config = ConfigDict(strict=True, extra="forbid")
    image: str
    position: int = Field(ge=1)
    answer: Truth
    confidence: int | None = Field(ge=1, le=5)
    diagnosis: str | None
    seconds: float = Field(ge=0, allow_inf_nan=False)


class Answers(BaseModel):
    """Content of answers-NAME.json, which the page writes."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format_version: Literal[1]
    survey: str
    page: int
    expert: str = Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")
    started: str | None
    saved: str
    answers: list[SurveyAnswer] = Field(min_length=1)


@dataclass(frozen=True)
class ExpertScore:
    """Score of one expert."""

    expert: str
    missing: int
    """Number of images without an answer. All other numbers exclude them."""
    rates: Rates
    p_value: float
    """Two-sided exact binomial test of the accuracy against 50 %."""
    d_prime: float
    criterion: float
    auc: float | None
    """Area under the ROC curve of the answers weighted by confidence; None if a confidence is missing."""
    median_seconds: float
    diagnosis_real: Rate | None
    diagnosis_generated: Rate | None


@dataclass(frozen=True)
class SurveyScore:
    """Score of all experts together (over all answers), and of each."""

    survey: str
    images: int
    rates: Rates
    p_value: float
    classes: dict[str, Rates]
    experts: tuple[ExpertScore, ...]
    agreement: Agreement | None
    median_seconds: float
    paper_accuracy: float
    called_generated: dict[str, tuple[int, int]]
    """Key: image; value: number of experts who called it generated, and number of experts who answered."""


def read_answers(paths: Sequence[Path], key: SurveyKey) -> tuple[Answers, ...]:
    """Read the answers to one survey.

    Raises:
        DataError: A file is malformed, of another survey, or the second one of an expert; the message names it.
    """
    files: dict[str, Path] = {}
    result = []
    for path in paths:
        answers = _read_one(path, key)
        if answers.expert in files:
            raise DataError(
                f"{path}: has answers of {quote(answers.expert)}, and so has {files[answers.expert]}; give only one of them"
            )
        files[answers.expert] = path
        result.append(answers)
    return tuple(result)


def _read_one(path: Path, key: SurveyKey) -> Answers:
    try:
        answers = Answers.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(f"{path}: is not a file of answers: {first_fault(error)}") from None
    if answers.survey != key.survey:
        raise DataError(f"{path}: answers survey {answers.survey}, but the key is of survey {key.survey}")
    seen: set[str] = set()
    for answer in answers.answers:
        if answer.image not in key.images:
            raise DataError(f"{path}: answers an image {quote(answer.image)} that the survey does not have")
        if answer.image in seen:
            raise DataError(f"{path}: answers image {answer.image} twice")
        if answer.diagnosis is not None and (not key.with_diagnosis or answer.diagnosis not in key.class_names):
            raise DataError(
                f"{path}: image {answer.image} has a diagnosis {quote(answer.diagnosis)} that was not offered"
            )
        seen.add(answer.image)
    return answers


def score_survey(key: SurveyKey, answers: Sequence[Answers]) -> SurveyScore:
    """Score one or more experts. The intervals and p-values are about these experts and other images of the same kind."""
    names = list(key.images)
    generated = np.array([image.truth == "generated" for image in key.images.values()])
    classes = np.array([image.class_name for image in key.images.values()])
    column = {name: i for i, name in enumerate(names)}
    called = np.full((len(answers), len(names)), -1)  # [experts, images]: 1 called generated, 0 real, -1 not answered
    for row, expert in zip(called, answers, strict=True):
        for answer in expert.answers:
            row[column[answer.image]] = answer.answer == "generated"
    experts = tuple(_score_expert(key, a, row, generated) for a, row in zip(answers, called, strict=True))
    votes, answer_counts = (called == 1).sum(axis=0), (called >= 0).sum(axis=0)
    return SurveyScore(
        survey=key.survey,
        images=len(names),
        rates=rates_of(called, generated),
        p_value=permutation_p_value(votes, answer_counts, generated, classes),
        classes={name: rates_of(called[:, classes == name], generated[classes == name]) for name in key.class_names},
        experts=experts,
        agreement=agreement_of([a.expert for a in answers], called) if len(answers) > 1 else None,
        median_seconds=float(np.median([answer.seconds for a in answers for answer in a.answers])),
        paper_accuracy=PAPER_ACCURACY,
        called_generated={name: (int(votes[i]), int(answer_counts[i])) for i, name in enumerate(names)},
    )


def _score_expert(
    key: SurveyKey, answers: Answers, called: NDArray[np.int_], generated: NDArray[np.bool_]
) -> ExpertScore:
    rates = rates_of(called[None], generated)
    d_prime, criterion = signal_detection(rates.sensitivity, rates.specificity)

    def diagnosis(truth: Truth) -> Rate | None:
        diagnoses = [a for a in answers.answers if a.diagnosis is not None and key.images[a.image].truth == truth]
        right = sum(a.diagnosis == key.images[a.image].class_name for a in diagnoses)
        return wilson(right, len(diagnoses)) if diagnoses else None

    return ExpertScore(
        expert=answers.expert,
        missing=len(key.images) - len(answers.answers),
        rates=rates,
        p_value=float(stats.binomtest(rates.accuracy.count, rates.accuracy.total).pvalue),
        d_prime=d_prime,
        criterion=criterion,
        auc=_auc(key, answers),
        median_seconds=float(np.median([answer.seconds for answer in answers.answers])),
        diagnosis_real=diagnosis("real"),
        diagnosis_generated=diagnosis("generated"),
    )


def _auc(key: SurveyKey, answers: Answers) -> float | None:
    ratings: dict[Truth, list[float]] = {"real": [], "generated": []}
    for answer in answers.answers:
        if answer.confidence is None:
            return None
        sign = 1 if answer.answer == "generated" else -1
        ratings[key.images[answer.image].truth].append(sign * answer.confidence)
    return auc_of(ratings["real"], ratings["generated"])
