"""Score a survey: how well experts distinguish generated from real images, and how far they agree.

"Generated" is the positive answer: sensitivity is the share of generated images that were called generated, specificity the
share of real images that were called real. Chance is 50 %. `docs/survey.md` explains all numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import stats

from dermis.errors import DataError, quote
from training.evaluation.survey import SurveyKey, Truth, first_fault

PAPER_ACCURACY = 0.54  # four experts, 200 images, arXiv 2208.11702
RESAMPLES = 10_000


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
class Rate:
    """A share with its 95 % confidence interval; None if `total` is 0."""

    count: int
    total: int
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Rates:
    """Accuracy and the rates that it consists of."""

    accuracy: Rate
    sensitivity: Rate
    specificity: Rate
    called_generated: Rate
    """Response bias: the share of "generated" among all answers."""


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
class Agreement:
    """Agreement of the experts."""

    images: int
    """Images that all experts answered."""
    observed: float | None
    """Mean share of pairs of experts with the same answer."""
    fleiss_kappa: float | None
    pairs: tuple[tuple[str, str, float | None], ...]
    """Cohen's kappa of every two experts, on the images that both answered."""


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
        rates=_rates(called, generated),
        p_value=permutation_p_value(votes, answer_counts, generated, classes),
        classes={name: _rates(called[:, classes == name], generated[classes == name]) for name in key.class_names},
        experts=experts,
        agreement=_agreement([a.expert for a in answers], called) if len(answers) > 1 else None,
        median_seconds=float(np.median([answer.seconds for a in answers for answer in a.answers])),
        paper_accuracy=PAPER_ACCURACY,
        called_generated={name: (int(votes[i]), int(answer_counts[i])) for i, name in enumerate(names)},
    )


def _score_expert(
    key: SurveyKey, answers: Answers, called: NDArray[np.int_], generated: NDArray[np.bool_]
) -> ExpertScore:
    rates = _rates(called[None], generated)
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


def _rates(called: NDArray[np.int_], generated: NDArray[np.bool_]) -> Rates:
    """Rates of a set of answers.

    Args:
        called: Answers [experts, images]: 1 generated, 0 real, -1 no answer.
        generated: Whether each image is generated, [images].
    """
    answered = called >= 0
    answers, right = answered.sum(axis=0), ((called == generated) & answered).sum(axis=0)
    return Rates(
        accuracy=clustered_rate(right, answers, generated),
        sensitivity=clustered_rate(right[generated], answers[generated], generated[generated]),
        specificity=clustered_rate(right[~generated], answers[~generated], generated[~generated]),
        called_generated=clustered_rate((called == 1).sum(axis=0), answers, generated),
    )


def wilson(count: int, total: int) -> Rate:
    """Score interval of a share of independent answers (Wilson, JASA 22, 1927, 209-212)."""
    if total == 0:
        return Rate(0, 0, None, None, None)
    interval = stats.binomtest(count, total).proportion_ci(method="wilson")
    return Rate(count, total, count / total, float(interval.low), float(interval.high))


def clustered_rate(count: NDArray[np.int_], total: NDArray[np.int_], half: NDArray[np.bool_]) -> Rate:
    """Share of answers of one kind, with an interval for answers that are clustered by image.

    Answers of several experts to one image are not independent, so the interval is that of a cluster bootstrap: percentiles
    of the share over RESAMPLES draws of whole images with replacement, within the real and the generated half (Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, sections 3.8 and 5.3). If no image has more than one answer, the
    answers are independent, and the interval is Wilson's. If all or no answers are of the kind, resampling shows no
    spread, and the interval is Wilson's for one answer to each image.

    Args:
        count: Answers of the kind for each image, [images].
        total: All answers for each image, [images].
        half: Whether each image is generated, [images].
    """
    count, half, total = count[total > 0], half[total > 0], total[total > 0]
    hits, answers = int(count.sum()), int(total.sum())
    if answers == len(total):
        return wilson(hits, answers)
    if hits in (0, answers):
        once = wilson(len(total) if hits else 0, len(total))
        return Rate(hits, answers, hits / answers, once.low, once.high)
    rng = np.random.default_rng(0)
    parts = (np.flatnonzero(half), np.flatnonzero(~half))
    resampled = np.concatenate([rng.choice(part, (RESAMPLES, len(part))) for part in parts if part.size], axis=1)
    low, high = np.quantile(count[resampled].sum(axis=1) / total[resampled].sum(axis=1), (0.025, 0.975))
    return Rate(hits, answers, hits / answers, float(low), float(high))


def permutation_p_value(
    votes: NDArray[np.int_], answers: NDArray[np.int_], generated: NDArray[np.bool_], classes: NDArray[np.str_]
) -> float:
    """Two-sided p-value of the hypothesis that the answers are independent of the truth, for all experts together.

    Which images are generated is permuted within each class, RESAMPLES times. p is the share of permutations, including the
    true one, whose number of right answers is as far from its expectation (Phipson and Smyth, SAGMB 9, 2010, article 39). The
    test is valid for experts who favour one answer, or who agree on images.

    Args:
        votes: Number of experts who called each image generated, [images].
        answers: Number of experts who answered each image, [images].
        generated: Whether each image is generated, [images].
        classes: Class of each image, [images].
    """
    # Right answers to an image if it is generated, less those if it is real. Permutations change only their sum.
    gain = (2 * votes - answers).astype(np.float64)
    rng = np.random.default_rng(0)
    observed, expected, permuted = 0.0, 0.0, np.zeros(RESAMPLES)
    for name in np.unique(classes):
        part, truth = gain[classes == name], generated[classes == name]
        observed += float(part[truth].sum())
        expected += float(part.sum() * truth.mean())
        permuted += rng.permuted(np.tile(truth, (RESAMPLES, 1)), axis=1) @ part
    as_far = np.abs(permuted - expected) >= abs(observed - expected) - 1e-9
    return float((as_far.sum() + 1) / (RESAMPLES + 1))


def signal_detection(sensitivity: Rate, specificity: Rate) -> tuple[float, float]:
    """d' and criterion c of equal-variance signal detection: d' = z(H) - z(F), c = -(z(H) + z(F)) / 2.

    H is the rate of "generated" for generated images and F for real ones, each with 0.5 added to its count and 1 to its
    total, so that the results for rates of 0 and 1 are finite (Hautus, Behavior Research Methods 27, 1995, 46-51). c < 0 means
    a preference for "generated".
    """
    hit = stats.norm.ppf((sensitivity.count + 0.5) / (sensitivity.total + 1))
    false_alarm = stats.norm.ppf((specificity.total - specificity.count + 0.5) / (specificity.total + 1))
    return float(hit - false_alarm), float(-(hit + false_alarm) / 2)


def _auc(key: SurveyKey, answers: Answers) -> float | None:
    """Probability that a generated image is rated higher than a real one, ties one half: Mann-Whitney U / (n m)."""
    ratings: dict[Truth, list[float]] = {"real": [], "generated": []}
    for answer in answers.answers:
        if answer.confidence is None:
            return None
        sign = 1 if answer.answer == "generated" else -1
        ratings[key.images[answer.image].truth].append(sign * answer.confidence)
    if not ratings["real"] or not ratings["generated"]:
        return None
    statistic = stats.mannwhitneyu(ratings["generated"], ratings["real"]).statistic
    return float(statistic / (len(ratings["generated"]) * len(ratings["real"])))


def _agreement(names: Sequence[str], called: NDArray[np.int_]) -> Agreement:
    common = called[:, (called >= 0).all(axis=0)]
    counts = np.stack([(common == 0).sum(axis=0), (common == 1).sum(axis=0)], axis=1)

    def pair(i: int, j: int) -> float | None:
        both = (called[i] >= 0) & (called[j] >= 0)
        table = np.zeros((2, 2), dtype=np.int_)
        np.add.at(table, (called[i, both], called[j, both]), 1)
        return cohen_kappa(table)

    return Agreement(
        images=common.shape[1],
        observed=_observed_agreement(counts) if common.size else None,
        fleiss_kappa=fleiss_kappa(counts),
        pairs=tuple((names[i], names[j], pair(i, j)) for i, j in combinations(range(len(names)), 2)),
    )


def _observed_agreement(counts: NDArray[np.int_]) -> float:
    raters = int(counts[0].sum())
    return float(((counts * (counts - 1)).sum(axis=1) / (raters * (raters - 1))).mean())


def fleiss_kappa(counts: NDArray[np.int_]) -> float | None:
    """Fleiss' kappa, (P - P_e) / (1 - P_e).

    P is the mean over images of sum_j n_ij (n_ij - 1) / (n (n - 1)), and P_e the sum over categories of their squared shares
    (Fleiss, Psychological Bulletin 76, 1971, 378-382, equations 1 to 7).

    Args:
        counts: Number of raters n_ij who chose category j for image i, [images, categories].

    Returns:
        Kappa; None without images or if all ratings are the same.

    Raises:
        ValueError: Images differ in their number of raters.
    """
    if len(counts) == 0:
        return None
    if len(np.unique(counts.sum(axis=1))) > 1 or counts[0].sum() < 2:
        raise ValueError("Fleiss' kappa needs the same number of raters, at least two, for every image")
    expected = float(np.square(counts.sum(axis=0) / counts.sum()).sum())
    return _beyond_chance(_observed_agreement(counts), expected)


def cohen_kappa(table: NDArray[np.int_]) -> float | None:
    """Cohen's kappa of two raters, (p_o - p_e) / (1 - p_e).

    p_o is the share on the diagonal, and p_e that expected from the margins (Cohen, Educational and Psychological Measurement
    20, 1960, 37-46, equation 1).

    Args:
        table: Number of images by the answers of both raters, [categories, categories].

    Returns:
        Kappa; None for an empty table or if both raters gave one answer only.
    """
    if table.sum() == 0:
        return None
    shares = table / table.sum()
    return _beyond_chance(float(np.trace(shares)), float(shares.sum(axis=0) @ shares.sum(axis=1)))


def _beyond_chance(observed: float, expected: float) -> float | None:
    return None if expected > 1 - 1e-12 else (observed - expected) / (1 - expected)
