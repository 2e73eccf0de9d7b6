"""Measurements of a finished classifier on images that it was not trained on, for all images and by group."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.metrics import classification as metrics
from training.classifier.calibration import THRESHOLDS, calibrated, choose_thresholds, fit_temperature
from training.classifier.data import RealPart
from training.data.splits import count_without_ids

MIN_GROUP_IMAGES = 10  # a group with fewer images of a class is not measured

Floats = NDArray[np.float64]
_RANKING: Mapping[str, metrics.Metric] = {
    "auc": metrics.auc,
    "sensitivity_at_90_specificity": metrics.sensitivity_at_specificity,
}


def evaluate(
    parts: Mapping[str, RealPart],
    logits: Mapping[str, Floats],
    *,
    default_threshold: str,
    replicates: int = metrics.REPLICATES,
) -> dict[str, Any]:
    """Choose temperature and thresholds on the validation part, and measure on the test part.

    Args:
        parts: The parts "validation" and "test".
        logits: float64 [N] of each part.
        default_threshold: Name of the threshold that is the default.
        replicates: Number of bootstrap replicates.

    Returns:
        JSON: {"temperature", "thresholds", "validation": {"auc"}, "test": {"images", "positive", "patients", "without_ids",
        "metrics", "at_thresholds", "breakdown"}}; a metric is {"value", "low", "high"} (95 %), and without_ids are those
        patients that are images of which neither patient nor lesion are known.
    """
    validation, test = parts["validation"], parts["test"]
    temperature = fit_temperature(validation.labels, logits["validation"])
    thresholds = choose_thresholds(validation.labels, calibrated(logits["validation"], temperature), default_threshold)
    probabilities = calibrated(logits["test"], temperature)
    uncalibrated = calibrated(logits["test"], 1.0)
    # Metrics of the order use logits: rounding makes different probabilities near 0 and 1 equal.
    all_images = _measured(test.labels, logits["test"], test.groups, _RANKING, replicates)
    all_images |= _measured(test.labels, probabilities, test.groups, _calibrated_metrics(thresholds), replicates)
    raw = {"calibration_error": metrics.calibration_error, "brier": metrics.brier}
    return {
        "temperature": temperature,
        "thresholds": thresholds,
        "default_threshold": default_threshold,
        "validation": {**_counts(validation), "auc": float(metrics.auc(validation.labels, logits["validation"])[0])},
        "test": {
            **_counts(test),
            "metrics": all_images,
            "uncalibrated": _measured(test.labels, uncalibrated, test.groups, raw, replicates),
            "at_thresholds": {
                name: _measured(test.labels, probabilities, test.groups, _at(thresholds[name]), replicates)
                for name in THRESHOLDS
            },
            "breakdown": breakdown(test, logits["test"], temperature, thresholds["default"], replicates),
        },
    }


def breakdown(
    part: RealPart, logits: Floats, temperature: float, threshold: float, replicates: int = metrics.REPLICATES
) -> dict[str, dict[str, Any]]:
    """Numbers of each group of each attribute: images, positives, AUC, sensitivity and specificity at the threshold.

    A group with fewer than MIN_GROUP_IMAGES images of a class has {"too_few": true} instead of the last three.
    """
    probabilities = calibrated(logits, temperature)
    rates = {name: rate for name, rate in _at(threshold).items() if name in ("sensitivity", "specificity")}
    rows: dict[str, dict[str, Any]] = {}
    for attribute, values in part.attributes.items():
        rows[attribute] = {}
        for value in sorted(set(values)):
            members = np.flatnonzero(np.array(values) == value)
            labels = part.labels[members]
            row: dict[str, Any] = {"images": len(members), "positive": int(labels.sum())}
            if min(row["positive"], row["images"] - row["positive"]) < MIN_GROUP_IMAGES:
                row["too_few"] = True
            else:
                groups = [part.groups[i] for i in members]
                row |= _measured(labels, logits[members], groups, {"auc": metrics.auc}, replicates)
                row |= _measured(labels, probabilities[members], groups, rates, replicates)
            rows[attribute][value] = row
    return rows


def _calibrated_metrics(thresholds: Mapping[str, float]) -> dict[str, metrics.Metric]:
    return {
        "accuracy": metrics.accuracy,
        "balanced_accuracy": functools.partial(metrics.balanced_accuracy, threshold=thresholds["default"]),
        "brier": metrics.brier,
        "calibration_error": metrics.calibration_error,
    }


def _at(threshold: float) -> dict[str, metrics.Metric]:
    rates = {
        "sensitivity": metrics.sensitivity,
        "specificity": metrics.specificity,
        "accuracy": metrics.accuracy,
        "balanced_accuracy": metrics.balanced_accuracy,
    }
    return {name: functools.partial(rate, threshold=threshold) for name, rate in rates.items()}


def _measured(
    labels: NDArray[np.int64],
    probabilities: Floats,
    groups: Sequence[str],
    functions: Mapping[str, metrics.Metric],
    replicates: int,
) -> dict[str, dict[str, float]]:
    estimates = metrics.bootstrap(labels, probabilities, functions, groups=groups, replicates=replicates)
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def _counts(part: RealPart) -> dict[str, int]:
    return {
        "images": len(part.labels),
        "positive": int(part.labels.sum()),
        "patients": len(set(part.groups)),
        "without_ids": count_without_ids(part.groups),
    }
