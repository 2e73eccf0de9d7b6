"""Calibration of probabilities, and the choice of thresholds, both on validation data."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from dermis.classifier.scores import sigmoid
from dermis.errors import TrainingError

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

DEFAULT = "balanced_accuracy"
THRESHOLDS = ("half", "balanced_accuracy", "specificity_90", "sensitivity_90")
_TEMPERATURES = (0.2, 10.0)  # limits; without them, images in perfect order would give 0


def fit_temperature(labels: Labels, logits: Floats) -> float:
    """The T from 0.2 to 10 for which sigmoid(logit / T) has the least log loss (Guo et al., arXiv 1706.04599)."""
    sign = 2.0 * labels - 1

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0, -sign * logits / math.exp(log_temperature)).mean())

    low, high = map(math.log, _TEMPERATURES)
    return math.exp(float(minimize_scalar(loss, bounds=(low, high), method="bounded").x))


def calibrated(logits: Floats, temperature: float) -> Floats:
    """Probabilities sigmoid(logit / temperature)."""
    return sigmoid(logits / temperature)


def choose_thresholds(labels: Labels, probabilities: Floats, default: str = DEFAULT) -> dict[str, float]:
    """Thresholds by name, with the one named `default` a second time as "default".

    half               0.5
    balanced_accuracy  where the mean of sensitivity and specificity is highest
    specificity_90     the lowest with a specificity of at least 90 %
    sensitivity_90     the highest with a sensitivity of at least 90 %

    All but the first lie midway between two neighbouring probabilities.

    Raises:
        TrainingError: `default` is not one of these names.
    """
    if default not in THRESHOLDS:
        raise TrainingError(f"default_threshold: {default!r} is none of {', '.join(THRESHOLDS)}")
    values = np.unique(probabilities)
    # Candidates below the lowest value, between each two, and above the highest: with 0 all are positive, with 1 none.
    cuts = np.concatenate([[0.0], (values[:-1] + values[1:]) / 2, [min(1.0, (values[-1] + 1) / 2)]])
    positive, negative = np.sort(probabilities[labels == 1]), np.sort(probabilities[labels == 0])
    sensitivity = 1 - np.searchsorted(positive, cuts) / len(positive)
    specificity = np.searchsorted(negative, cuts) / len(negative)
    specific = np.flatnonzero(specificity >= 0.9)
    thresholds = {
        "half": 0.5,
        "balanced_accuracy": float(cuts[int(np.argmax(sensitivity + specificity))]),
        "specificity_90": float(cuts[specific[0]]) if len(specific) else 1.0,
        "sensitivity_90": float(cuts[np.flatnonzero(sensitivity >= 0.9)[-1]]),
    }
    return {"default": thresholds[default], **thresholds}
