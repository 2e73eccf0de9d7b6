"""Tests of the interval of the difference of two shares."""

from __future__ import annotations

import numpy as np
import pytest

from dermis.privacy.shares import difference_of_shares

MEMBERS, HELD_OUT = 4543, 1303
TRIALS = 150
LABELS = np.repeat(np.array([1, 0]), [MEMBERS, HELD_OUT])


@pytest.mark.parametrize("share", [0.0005, 0.001, 0.002, 0.005, 0.02])
def test_equal_shares_are_rarely_reported_as_different(share: float) -> None:
    """A fifth of the patients have three images, which often show the event together."""
    rng, above = np.random.default_rng(round(1e4 * share)), 0
    for trial in range(TRIALS):
        sizes = [rng.choice([1, 1, 1, 1, 3], count) for count in (MEMBERS, HELD_OUT)]
        members, others = (np.repeat(np.arange(len(each)), each)[: len(each)] for each in sizes)
        patients = np.concatenate([members, MEMBERS + others])
        of_patient, of_image = rng.random(MEMBERS + HELD_OUT) < share, rng.random(len(patients)) < share
        events = np.where(rng.random(len(patients)) < 0.7, of_patient[patients], of_image)
        above += difference_of_shares(events, LABELS, patients, level=0.95, seed=trial).low > 0
    # With probability 0.9999 a Binomial(150, 0.025) is at most 13.
    assert above <= 13


def test_images_of_one_patient_are_not_independent_observations() -> None:
    events = np.zeros(MEMBERS + HELD_OUT, bool)
    events[:60] = True
    independent = difference_of_shares(events, LABELS, np.arange(len(events)), level=0.95, seed=0)
    assert 0.007 < independent.low < independent.value == 60 / MEMBERS < independent.high < 0.018
    patients = np.where(events, 0, np.arange(len(events)))
    assert difference_of_shares(events, LABELS, patients, level=0.95, seed=0).low <= 0


def test_interval_of_independent_images_agrees_with_a_published_one() -> None:
    """Newcombe (1998), table II, contrast 56/70 - 48/80, method 10."""
    labels = np.repeat(np.array([1, 0]), [70, 80])
    events = np.concatenate([np.arange(70) < 56, np.arange(80) < 48])
    interval = difference_of_shares(events, labels, np.arange(150), level=0.95, seed=0)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    none = difference_of_shares(np.zeros(150, bool), labels, np.arange(150), level=0.95, seed=0)
    assert none.low < none.value == 0 < none.high < 0.06
