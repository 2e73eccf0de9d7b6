"""Scores of a classifier, from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Scores:
    """Scores of N images, in order: logits float32 [N]; probabilities and calibrated float64 [N]; features float32 [N, D]."""

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float64]
    """sigmoid(logit): probability of the positive class, not calibrated."""
    calibrated: NDArray[np.float64]
    """sigmoid(logit / temperature): the calibrated probability, to which thresholds apply."""
    features: NDArray[np.float32]
    """Pooled last convolutional layer; D is 0 if features were not requested."""


def scores_of(logits: ArrayLike, temperature: float, features: NDArray[np.float32] | None = None) -> Scores:
    """Compute scores from logits [N]."""
    values = np.asarray(logits, dtype=np.float32)
    exact = values.astype(np.float64)
    pooled = np.empty((len(values), 0), np.float32) if features is None else features
    return Scores(values, sigmoid(exact), sigmoid(exact / temperature), pooled)


def sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + exp(-x)), without overflow for any x."""
    small = np.exp(-np.abs(x))
    result: NDArray[np.float64] = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return result
