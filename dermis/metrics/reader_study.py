"""Statistics of reader studies: how well readers distinguish generated from real images, and how far they agree.

"Generated" is the positive answer: sensitivity is the share of generated images that were called generated, specificity the
share of real images that were called real. Chance is 50 %. `docs/survey.md` explains all numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dermis.reader_study import Agreement, Rate, Rates

RESAMPLES = 10_000
_BLOCK_NUMBERS = 1 << 16


def rates_of(called: NDArray[np.integer], generated: NDArray[np.bool_]) -> Rates:
    """Rates of a set of answers.

    Args:
        called: Answers [readers, images]: 1 generated, 0 real, -1 no answer.
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

    Answers of several readers to one image are not independent, so the interval is that of a cluster bootstrap: percentiles
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
    resampled, resampled_answers = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for part in (np.flatnonzero(half), np.flatnonzero(~half)):
        for block in _blocks(len(part)):  # blocks draw the same numbers as one call for all resamples
            drawn = rng.integers(0, len(part), (block.stop - block.start, len(part)))
            resampled[block] += count[part].take(drawn).sum(axis=1)
            resampled_answers[block] += total[part].take(drawn).sum(axis=1)
    low, high = np.quantile(resampled / resampled_answers, (0.025, 0.975))
    return Rate(hits, answers, hits / answers, float(low), float(high))


def _blocks(images: int) -> Iterator[slice]:
    """Divide RESAMPLES into blocks whose arrays of whole numbers for this many images have about half a megabyte."""
    if images:
        rows = max(1, _BLOCK_NUMBERS // images)
        for start in range(0, RESAMPLES, rows):
            yield slice(start, min(start + rows, RESAMPLES))


def permutation_p_value(
    votes: NDArray[np.int_], answers: NDArray[np.int_], generated: NDArray[np.bool_], classes: NDArray[np.str_]
) -> float:
    """Two-sided p-value of the hypothesis that the answers are independent of the truth, for all readers together.

    Which images are generated is permuted within each class, RESAMPLES times. p is the share of permutations, including the
    true one, whose number of right answers is as far from its expectation (Phipson and Smyth, SAGMB 9, 2010, article 39). The
    test is valid for readers who favour one answer, or who agree on images.

    Args:
        votes: Number of readers who called each image generated, [images].
        answers: Number of readers who answered each image, [images].
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
        for block in _blocks(len(part)):
            permuted[block] += rng.permuted(np.tile(truth, (block.stop - block.start, 1)), axis=1) @ part
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


def agreement_of(names: Sequence[str], called: NDArray[np.integer]) -> Agreement:
    """Agreement of the readers.

    Args:
        names: Names of the readers.
        called: Answers [readers, images]: 1 generated, 0 real, -1 no answer.
    """
    common = called[:, (called >= 0).all(axis=0)]
    counts = np.stack([(common == 0).sum(axis=0), (common == 1).sum(axis=0)], axis=1)

    chosen = [(called == answer).astype(np.float64) for answer in (0, 1)]
    # Images by the answers of two readers, [answer of the first, answer of the second, first reader, second reader].
    tables = np.array([[first @ second.T for second in chosen] for first in chosen]).astype(np.int_)

    return Agreement(
        images=common.shape[1],
        observed=_observed_agreement(counts) if common.size else None,
        fleiss_kappa=fleiss_kappa(counts),
        pairs=tuple(
            (names[i], names[j], cohen_kappa(tables[:, :, i, j])) for i, j in combinations(range(len(names)), 2)
        ),
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


def auc_of(real: Sequence[float], generated: Sequence[float]) -> float | None:
    """Probability that a generated image is rated higher than a real one, ties one half: Mann-Whitney U / (n m).

    Args:
        real: Ratings of the real images by one reader: the confidence, negative for the answer "real".
        generated: Ratings of the generated images.

    Returns:
        The area under the ROC curve; None if the reader has rated no real or no generated image.
    """
    if not real or not generated:
        return None
    return float(stats.mannwhitneyu(generated, real).statistic / (len(generated) * len(real)))
