"""Metrics of the probabilities of a binary classifier, with confidence intervals.

Labels are 0 or 1 [N] (1: positive), scores or probabilities are float [N]. Every metric also takes weights [R, N] and then
returns R values, one for each row of weights, with which the bootstrap computes all its replicates at once.

Intervals (95 %) are by a bootstrap that resamples patients, not images, because images of one patient are similar (Efron
1979; Field and Welsh 2007). Patients with a positive image and those without are resampled separately, so that every
replicate has both classes. Intervals are percentiles, except for the calibration error; see `bootstrap`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Metric = Callable[[Labels, Floats, Floats], Floats]
"""(labels [N], probabilities [N], weights [R, N]) -> values [R]."""

LEVEL = 0.95
REPLICATES = 1000
BINS = 15
_ROWS = 100  # replicates computed at a time


@dataclass(frozen=True)
class Estimate:
    """A number with its interval [low, high]."""

    value: float
    low: float
    high: float


def auc(labels: Labels, scores: Floats, weights: Floats | None = None) -> Floats:
    """Compute the area under the ROC curve: the probability that a positive scores above a negative. Ties count half."""
    positive, negative = _by_score(labels, scores, _rows(labels, weights))
    below = np.cumsum(negative, axis=1) - negative
    wins = (positive * (below + negative / 2)).sum(axis=1)
    area: Floats = wins / (positive.sum(axis=1) * negative.sum(axis=1))
    return area


def sensitivity_at_specificity(
    labels: Labels, scores: Floats, weights: Floats | None = None, *, specificity: float = 0.9
) -> Floats:
    """Compute the highest sensitivity of all thresholds with at least this specificity, without interpolation."""
    positive, negative = _by_score(labels, scores, _rows(labels, weights))
    # Column k: the threshold is the k-th lowest score, which itself counts as positive.
    sensitivity = np.cumsum(positive[:, ::-1], axis=1)[:, ::-1] / positive.sum(axis=1, keepdims=True)
    alarms = np.cumsum(negative[:, ::-1], axis=1)[:, ::-1] / negative.sum(axis=1, keepdims=True)
    best: Floats = np.where(alarms <= 1 - specificity + 1e-9, sensitivity, 0.0).max(axis=1)
    return best


def sensitivity(
    labels: Labels, probabilities: Floats, weights: Floats | None = None, *, threshold: float = 0.5
) -> Floats:
    """Compute the share of positives with a probability of at least the threshold."""
    return _share(probabilities >= threshold, labels == 1, _rows(labels, weights))


def specificity(
    labels: Labels, probabilities: Floats, weights: Floats | None = None, *, threshold: float = 0.5
) -> Floats:
    """Compute the share of negatives with a probability below the threshold."""
    return _share(probabilities < threshold, labels == 0, _rows(labels, weights))


def accuracy(labels: Labels, probabilities: Floats, weights: Floats | None = None, *, threshold: float = 0.5) -> Floats:
    """Compute the share of images on the right side of the threshold."""
    return _share((probabilities >= threshold) == (labels == 1), labels >= 0, _rows(labels, weights))


def balanced_accuracy(
    labels: Labels, probabilities: Floats, weights: Floats | None = None, *, threshold: float = 0.5
) -> Floats:
    """Compute the mean of sensitivity and specificity."""
    both = [rate(labels, probabilities, weights, threshold=threshold) for rate in (sensitivity, specificity)]
    return (both[0] + both[1]) / 2


def brier(labels: Labels, probabilities: Floats, weights: Floats | None = None) -> Floats:
    """Compute the mean squared difference of probability and label (Brier 1950): 0 is perfect."""
    w = _rows(labels, weights)
    score: Floats = w @ np.square(probabilities - labels) / w.sum(axis=1)
    return score


def calibration_error(
    labels: Labels, probabilities: Floats, weights: Floats | None = None, *, bins: int = BINS
) -> Floats:
    """Compute the expected calibration error: the mean difference of probability and share of positives over equal bins.

    It is that of the positive class (Naeini et al. 2015). It is biased upwards, and more so for fewer images.
    """
    w = _rows(labels, weights)
    bin_of = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    member = np.equal.outer(bin_of, np.arange(bins)).astype(np.float64)  # [N, bins]
    gap: Floats = np.abs((w * (probabilities - labels)) @ member)
    error: Floats = gap.sum(axis=1) / w.sum(axis=1)
    return error


def bootstrap(
    labels: Labels,
    probabilities: Floats,
    metrics: Mapping[str, Metric],
    *,
    groups: Sequence[str] | None = None,
    replicates: int = REPLICATES,
    seed: int = 0,
    weights: NDArray[Any] | None = None,
) -> dict[str, Estimate]:
    """Compute metrics with their intervals.

    Intervals are percentiles of the replicates. Resampling repeats images, which raises `calibration_error`, so its
    replicates are shifted first so that their mean is the value.

    Args:
        labels: Labels [N], 0 or 1.
        probabilities: Probabilities [N] of label 1.
        metrics: The metrics by name.
        groups: Patient of each image; None counts every image as a patient.
        replicates: Number of replicates.
        seed: Seed of the resampling.
        weights: What `resampled` returns for these arguments, of any type, if it is known.

    Raises:
        ValueError: One of the classes is missing.
    """
    if len(set(labels.tolist())) < 2:
        raise ValueError("metrics need images of both classes")
    if weights is None:
        weights = resampled(labels, groups, replicates, seed)
    estimates = {}
    for name, metric in metrics.items():
        value = float(metric(labels, probabilities, np.ones((1, len(labels))))[0])
        rows = (weights[i : i + _ROWS].astype(np.float64, copy=False) for i in range(0, replicates, _ROWS))
        parts = [metric(labels, probabilities, each) for each in rows]
        replicate_values = np.concatenate(parts)
        if metric is calibration_error:
            replicate_values = np.clip(replicate_values - replicate_values.mean() + value, 0, 1)
        low, high = np.quantile(replicate_values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        estimates[name] = Estimate(value, float(low), float(high))
    return estimates


def resampled(labels: Labels, groups: Sequence[str] | None, replicates: int, seed: int) -> Floats:
    """Draw replicates of the bootstrap for metrics with weights.

    Args:
        labels: Labels [N], 0 or 1.
        groups: Patient of each image; None counts every image as a patient.
        replicates: Number of replicates.
        seed: Seed of the resampling.

    Returns:
        How often each image is in each replicate, [replicates, N].
    """
    names = [str(i) for i in range(len(labels))] if groups is None else list(groups)
    _, group = np.unique(names, return_inverse=True)
    ill = np.zeros(group.max() + 1, bool)
    ill[group[labels == 1]] = True
    rng = np.random.default_rng(seed)
    counts = np.zeros((replicates, len(ill)))
    for stratum in (np.flatnonzero(ill), np.flatnonzero(~ill)):
        if len(stratum):
            counts[:, stratum] = rng.multinomial(len(stratum), np.full(len(stratum), 1 / len(stratum)), replicates)
    weights: Floats = counts[:, group]
    # If only one patient has positive images, or these patients have all negatives, a class can be missing.
    both = (weights[:, labels == 1].sum(axis=1) > 0) & (weights[:, labels == 0].sum(axis=1) > 0)
    weights[~both] = 1.0
    return weights


def _rows(labels: Labels, weights: Floats | None) -> Floats:
    return np.ones((1, len(labels))) if weights is None else weights


def _share(hit: NDArray[np.bool_], among: NDArray[np.bool_], weights: Floats) -> Floats:
    share: Floats = weights @ (hit & among).astype(np.float64) / (weights @ among.astype(np.float64))
    return share


def _by_score(labels: Labels, scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the weights of positives and of negatives at each different score, ascending, both [R, scores]."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    w = weights[:, order]
    positive = labels[order] == 1
    return np.add.reduceat(w * positive, starts, axis=1), np.add.reduceat(w * ~positive, starts, axis=1)
