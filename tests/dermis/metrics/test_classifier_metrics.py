"""Tests of classifier metrics: values equal their definitions, and intervals treat the images of a patient together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dermis.classifier.scores import sigmoid
from dermis.errors import TrainingError
from dermis.metrics import classification as metrics
from tiny_classifier import describe
from training.classifier.calibration import calibrated, choose_thresholds, fit_temperature
from training.classifier.card import classifier_card
from training.classifier.data import RealPart
from training.classifier.evaluate import breakdown, evaluate
from training.classifier.network import prior_shift
from training.data.sources import Record
from training.data.splits import group_of

EVERY: dict[str, metrics.Metric] = {
    "auc": metrics.auc,
    "sensitivity_at_specificity": metrics.sensitivity_at_specificity,
    "sensitivity": metrics.sensitivity,
    "specificity": metrics.specificity,
    "accuracy": metrics.accuracy,
    "balanced_accuracy": metrics.balanced_accuracy,
    "brier": metrics.brier,
    "calibration_error": metrics.calibration_error,
}


def drawn(count: int, seed: int = 0, ties: bool = False) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels of both classes, and probabilities that are correlated with them."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < 0.3).astype(np.int64)
    labels[:2] = 0, 1
    probabilities = sigmoid(rng.normal(size=count) + labels)
    return labels, probabilities.round(1) if ties else probabilities


# -- the metrics, against their definitions


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_the_share_of_pairs_in_order(ties: bool) -> None:
    labels, scores = drawn(60, ties=ties)
    pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
    assert metrics.auc(labels, scores)[0] == pytest.approx(((pairs > 0) + (pairs == 0) / 2).mean())


@pytest.mark.parametrize("ties", [False, True])
def test_sensitivity_at_specificity_tries_every_threshold(ties: bool) -> None:
    labels, scores = drawn(60, ties=ties)
    best = 0.0
    for threshold in [*scores, 2.0]:
        if (scores[labels == 0] < threshold).mean() >= 0.9:
            best = max(best, float((scores[labels == 1] >= threshold).mean()))
    assert metrics.sensitivity_at_specificity(labels, scores)[0] == pytest.approx(best)


def test_metrics_match_values_computed_by_hand() -> None:
    labels, p = np.array([0, 0, 0, 1]), np.array([0.1, 0.2, 0.6, 0.9])
    assert metrics.accuracy(labels, p)[0] == 0.75
    assert metrics.balanced_accuracy(labels, p)[0] == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.brier(labels, p)[0] == pytest.approx((0.01 + 0.04 + 0.36 + 0.01) / 4)
    # Ten bins, each image alone in its own: the mean distance.
    assert metrics.calibration_error(labels, p, bins=10)[0] == pytest.approx((0.1 + 0.2 + 0.6 + 0.1) / 4)
    assert metrics.calibration_error(labels, np.full(4, 0.25))[0] == pytest.approx(0)


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), ties=st.booleans())
def test_weight_of_k_equals_k_copies(name: str, seed: int, ties: bool) -> None:
    labels, p = drawn(30, seed, ties)
    times = np.random.default_rng(seed).integers(0, 4, 30)
    times[:2] = 1
    whole = EVERY[name](np.repeat(labels, times), np.repeat(p, times), np.ones((1, times.sum())))
    weighted = EVERY[name](labels, p, np.stack([times, np.ones(30)]).astype(float))
    assert weighted[0] == pytest.approx(whole[0])
    assert weighted[1] == pytest.approx(EVERY[name](labels, p, np.ones((1, 30)))[0])


# -- intervals


def test_interval_contains_its_value_and_is_repeatable() -> None:
    labels, p = drawn(300)
    estimates = metrics.bootstrap(labels, p, EVERY)
    assert estimates == metrics.bootstrap(labels, p, EVERY)
    for name, estimate in estimates.items():
        assert estimate.low < estimate.value < estimate.high, name
        assert estimate.value == pytest.approx(float(EVERY[name](labels, p, np.ones((1, 300)))[0])), name


def test_interval_width_depends_on_patients_not_images() -> None:
    labels, p = drawn(100)
    once = metrics.bootstrap(labels, p, {"auc": metrics.auc})["auc"]
    fourfold = np.repeat(labels, 4), np.repeat(p, 4)
    patients = [str(i // 4) for i in range(400)]
    known = metrics.bootstrap(*fourfold, {"auc": metrics.auc}, groups=patients)["auc"]
    unknown = metrics.bootstrap(*fourfold, {"auc": metrics.auc})["auc"]
    width = once.high - once.low
    assert known.high - known.low == pytest.approx(width, rel=0.15)
    assert unknown.high - unknown.low == pytest.approx(width / 2, rel=0.15)


def test_intervals_cover_true_auc_at_nominal_rate() -> None:
    """AUC of two unit normals one apart is 0.760."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = (np.arange(160) < 60).astype(np.int64)
        p = sigmoid(rng.normal(size=160) + labels)
        estimate = metrics.bootstrap(labels, p, {"auc": metrics.auc}, replicates=100, seed=seed)["auc"]
        covered += estimate.low <= 0.7602 <= estimate.high
    assert 52 <= covered <= 60


def test_metrics_of_single_class_are_refused() -> None:
    with pytest.raises(ValueError, match="both classes"):
        metrics.bootstrap(np.zeros(5, np.int64), np.zeros(5), EVERY)


# -- calibration and thresholds


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_scaling_finds_the_temperature(temperature: float) -> None:
    rng = np.random.default_rng(0)
    honest = rng.normal(size=20000) * 2
    labels = (rng.random(20000) < sigmoid(honest)).astype(np.int64)
    fitted = fit_temperature(labels, honest * temperature)
    assert fitted == pytest.approx(temperature, rel=0.05)
    assert metrics.calibration_error(labels, calibrated(honest * temperature, fitted))[0] < 0.01


def test_the_prior_is_corrected_for_a_balanced_training_set() -> None:
    """The best logit for a mixture of two unit normals at -1 and 1 is 2 x, plus the log odds of the classes."""
    rng = np.random.default_rng(0)
    labels = (rng.random(100_000) < 0.1).astype(np.int64)
    x = rng.normal(size=100_000) + 2 * labels - 1
    learnt_balanced = 2 * x
    shifted = sigmoid(learnt_balanced + prior_shift(0.5, 0.1))
    assert metrics.calibration_error(labels, shifted)[0] < 0.01
    assert metrics.calibration_error(labels, sigmoid(learnt_balanced))[0] > 0.1
    assert prior_shift(0.3, 0.3) == 0


@pytest.mark.parametrize("ties", [False, True])
def test_chosen_thresholds_reach_sensitivity_and_specificity(ties: bool) -> None:
    labels, p = drawn(200, ties=ties)
    thresholds = choose_thresholds(labels, p, "sensitivity_90")
    assert thresholds["half"] == 0.5 and thresholds["default"] == thresholds["sensitivity_90"]

    ill, well = p[labels == 1], p[labels == 0]
    assert (ill >= thresholds["sensitivity_90"]).mean() >= 0.9
    assert (well < thresholds["specificity_90"]).mean() >= 0.9
    # They are the extreme thresholds that do: beyond the next probability they no longer would.
    assert (ill >= p[p >= thresholds["sensitivity_90"]].min() + 1e-9).mean() < 0.9
    assert (well < p[p < thresholds["specificity_90"]].max() - 1e-9).mean() < 0.9

    def balanced(threshold: float) -> float:
        return float(metrics.balanced_accuracy(labels, p, threshold=threshold)[0])

    assert balanced(thresholds["balanced_accuracy"]) == pytest.approx(max(balanced(each) for each in p))
    with pytest.raises(TrainingError, match="default_threshold"):
        choose_thresholds(labels, p, "best")


# -- the whole report


def part(count: int, seed: int) -> tuple[RealPart, NDArray[np.float64]]:
    labels, p = drawn(count, seed)
    sexes = tuple("female" if i % 2 else "male" for i in range(count))
    sources = tuple("rare" if i < 15 else "common" for i in range(count))
    real_part = RealPart(
        np.zeros((count, 1, 1, 3), np.uint8),
        labels,
        tuple(map(str, range(count))),
        tuple(map(str, range(count))),
        {"sex": sexes, "source": sources},
        "0" * 64,
    )
    return real_part, np.log(p / (1 - p))


def test_report_chooses_on_validation_and_measures_on_test() -> None:
    (validation, chosen_on), (test, measured_on) = part(200, 1), part(300, 2)
    parts, logits = {"validation": validation, "test": test}, {"validation": chosen_on, "test": measured_on}
    report = evaluate(parts, logits, default_threshold="specificity_90", replicates=50)
    assert report["temperature"] == fit_temperature(validation.labels, chosen_on)
    p = calibrated(measured_on, report["temperature"])
    assert report["thresholds"] == choose_thresholds(
        validation.labels, calibrated(chosen_on, report["temperature"]), "specificity_90"
    )
    numbers = report["test"]["metrics"]
    assert numbers["auc"]["value"] == pytest.approx(metrics.auc(test.labels, p)[0])
    at = report["test"]["at_thresholds"]["specificity_90"]
    assert numbers["balanced_accuracy"] == at["balanced_accuracy"]
    assert at["specificity"]["value"] == pytest.approx(
        (p[test.labels == 0] < report["thresholds"]["specificity_90"]).mean()
    )


def test_images_without_an_id_are_counted_and_stated_beside_patients() -> None:
    (validation, chosen_on), (test, measured_on) = part(200, 1), part(300, 2)
    records = [Record(str(i), "", f"P{i // 2}" if i < 200 else "", "", None, {}) for i in range(300)]
    parts = {"validation": validation, "test": replace(test, groups=tuple(group_of(records)))}
    logits = {"validation": chosen_on, "test": measured_on}
    report = evaluate(parts, logits, default_threshold="half", replicates=50)
    assert (report["test"]["patients"], report["test"]["without_ids"]) == (200, 100)
    dataset = {"name": "skin", "split": "by patient", "parts": {}, "configuration": "real", "synthetic": []}
    training = {"configuration": {}, "weights": "none", "hardware": "cpu"}
    origin = {"dataset": dataset, "training": training, "scenario": "real", "hours": 1.0, "code_version": "0"}
    card = classifier_card("c", describe(metrics=report, provenance=origin | {"licence": "x", "attribution": ""}))
    stated = "200 patients (or lesions, if patients are not known; 100 of these are images without an id)"
    assert f"On 300 real images of {stated} that were" in card


def test_a_group_that_is_too_small_gets_no_numbers() -> None:
    test, logits = part(300, 2)
    groups = breakdown(test, logits, 2.0, 0.5, replicates=50)
    rare = groups["source"]["rare"]
    assert rare == {"images": 15, "positive": int(test.labels[:15].sum()), "too_few": True}
    male = np.array(test.attributes["sex"]) == "male"
    assert groups["sex"]["male"]["images"] == 150
    assert groups["sex"]["male"]["auc"]["value"] == pytest.approx(metrics.auc(test.labels[male], logits[male])[0])
