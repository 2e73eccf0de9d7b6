"""Tests of artefact detection: drawn artefacts are detected at any size and position, and plain lesions have none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from scipy import ndimage
from scipy.stats import binomtest, chi2_contingency

from dermis import artefacts as detectors
from dermis.artefacts import NAMES, THRESHOLDS, Artefacts, detect_artefacts, wilson_interval
from lesions import Image, barred, framed, hairy, inked, lesion, ruled
from training.data.artefacts import artefact_sheet, summarise

PLAIN = Artefacts(0.0, 0.0, 0.0, 0.0)
FRAMED = Artefacts(0.2, 0.0, 0.0, 0.0)
HAIRY = Artefacts(0.0, 0.0, 0.3, 0.0)

DRAWN: dict[str, tuple[Callable[[Image], Image], ...]] = {
    "frame": (framed, barred, lambda x: framed(x, 0.62)),
    "ruler": (ruled, lambda x: np.rot90(ruled(x)), lambda x: ruled(x, pitch=0.05, marks=16)),
    "hair": (hairy, lambda x: hairy(x, seed=1, hairs=8)),
    "ink": (inked, lambda x: inked(x, (120, 60, 200)), lambda x: inked(x, (40, 150, 90))),
}


@pytest.mark.parametrize("seed", range(3))
def test_a_plain_lesion_has_no_artefact(seed: int) -> None:
    assert detect_artefacts(lesion(seed)).present == ()


@pytest.mark.parametrize(("name", "variant"), [(name, k) for name in NAMES for k in range(len(DRAWN[name]))])
def test_only_drawn_artefact_is_detected(name: str, variant: int) -> None:
    assert detect_artefacts(DRAWN[name][variant](lesion(variant))).present == (name,)


def test_frame_and_hair_are_detected_beside_other_artefacts() -> None:
    image = framed(inked(hairy(ruled(lesion(3)), hairs=14)), 0.6)
    assert set(detect_artefacts(image).present) >= {"frame", "hair"}


@pytest.mark.parametrize("size", [(96, 96), (300, 400)])
def test_frame_score_hardly_depends_on_image_size(size: tuple[int, int]) -> None:
    drawn = Pillow.fromarray(framed(lesion(0, 320), 0.45))
    assert "frame" in detect_artefacts(np.asarray(drawn.resize(size, Pillow.Resampling.LANCZOS))).present
    share = 1 - np.pi * 0.45**2
    assert detect_artefacts(np.asarray(drawn.resize(size))).frame == pytest.approx(share, abs=0.02)


def test_dark_lesion_is_not_frame_and_blue_lesion_is_not_ink() -> None:
    image = lesion(1).copy()
    y, x = np.mgrid[: len(image), : len(image)] - len(image) / 2
    blob = np.hypot(y, x) < 0.3 * len(image)
    assert detect_artefacts(np.where(blob[..., None], np.uint8(15), image)).frame == 0
    assert detect_artefacts(np.where(blob[..., None], np.array([60, 70, 140], np.uint8), image)).ink == 0
    side = image.copy()
    side[60:110, :40] = 15  # it touches the border, but no corner
    assert detect_artefacts(side).frame == 0


@pytest.mark.parametrize("value", [0, 128, 255])
def test_uniform_image_has_no_ruler_hair_or_ink(value: int) -> None:
    scores = detect_artefacts(np.full((50, 70, 3), value, np.uint8))
    assert (scores.ruler, scores.hair, scores.ink) == (0, 0, 0)
    assert 0 <= scores.frame <= 1


@pytest.mark.full
@pytest.mark.parametrize("width", [224, 231])  # a square is rotated by a matrix, others by Pillow
def test_fast_filters_and_rotations_equal_those_of_scipy(width: int) -> None:
    picture = np.zeros((224, width), np.uint8)
    picture[1:-1, 1:-1] = np.random.default_rng(0).integers(0, 51, (222, width - 2))
    for size in (7, 9):
        assert (detectors._maximum(picture, size) == ndimage.maximum_filter(picture, size)).all()
    for number, rotated in enumerate(detectors._rotations(picture.astype(np.float32))):
        expected = ndimage.rotate(picture.astype(np.float64), 7.5 * number, order=1)
        assert rotated == pytest.approx(expected, abs=1e-4)


@given(st.integers(0, 2**32 - 1), st.integers(8, 60), st.integers(8, 60))
@settings(max_examples=3, deadline=None, derandomize=True)
def test_artefact_scores_are_between_zero_and_one(seed: int, height: int, width: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    before = noise.copy()
    scores = detect_artefacts(noise)
    assert all(0 <= getattr(scores, name) <= 1 for name in NAMES)
    assert (noise == before).all()


def test_artefact_at_its_threshold_is_detected() -> None:
    assert Artefacts(**THRESHOLDS).present == NAMES
    assert Artefacts(**{name: value - 1e-9 for name, value in THRESHOLDS.items()}).present == ()


def test_the_summary_counts_and_compares_classes() -> None:
    artefacts = [FRAMED] * 30 + [PLAIN] * 70 + [FRAMED] * 10 + [PLAIN] * 290
    summary = summarise(artefacts, ["malignant"] * 100 + ["benign"] * 300)
    bad, good = summary.share("frame", "malignant"), summary.share("frame", "benign")
    assert (bad.count, bad.total, bad.share) == (30, 100, 0.3)
    assert bad.risk_ratio == pytest.approx(9.0)
    assert good.risk_ratio == pytest.approx(1 / 9)
    frame = summary.associations[NAMES.index("frame")]
    test = chi2_contingency([[30, 10], [70, 290]], correction=False)
    assert (frame.artefact, frame.cramers_v) == ("frame", pytest.approx((test.statistic / 400) ** 0.5))
    assert frame.p_value < 1e-10
    assert (summary.share("ink", "benign").share, summary.share("ink", "benign").risk_ratio) == (0.0, None)
    assert [share.artefact for share in summary.shares] == [name for name in NAMES for _ in range(2)]


def test_artefact_summary_handles_extreme_counts() -> None:
    all_or_none = summarise([FRAMED] * 5 + [PLAIN] * 5, ["a"] * 5 + ["b"] * 5)
    assert all_or_none.associations[0].cramers_v == pytest.approx(1)
    assert all_or_none.share("frame", "a").risk_ratio is None  # no other class has any
    one_class = summarise([FRAMED, PLAIN], ["a", "a"])
    assert (one_class.associations[0].cramers_v, one_class.share("frame", "a").risk_ratio) == (0.0, None)
    three = summarise([FRAMED, PLAIN, HAIRY], ["a", "b", "c"])
    assert three.associations[0].cramers_v == pytest.approx(1)
    with pytest.raises(ValueError, match="1 images and 0 classes"):
        summarise([PLAIN], [])
    with pytest.raises(KeyError):
        one_class.share("frame", "b")


@given(st.integers(1, 300).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_wilson_intervals_equal_scipy(counts: tuple[int, int]) -> None:
    expected = binomtest(*counts).proportion_ci(0.95, method="wilson")
    assert wilson_interval(*counts) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_sheet_shows_examples_of_each_artefact_and_class() -> None:
    colours = np.arange(6, dtype=np.uint8) * 40
    loaded: list[int] = []

    def load(i: int) -> Image:
        loaded.append(i)
        return np.full((30 + i, 60, 3), colours[i], np.uint8)

    artefacts = [FRAMED, FRAMED, FRAMED, PLAIN, HAIRY, FRAMED]
    classes = ["a", "a", "a", "a", "b", "b"]
    sheet = artefact_sheet(load, artefacts, classes, examples=2, size=20)
    assert sheet.dtype == np.uint8
    assert sheet.shape == artefact_sheet(load, artefacts, classes, examples=2, size=20).shape
    assert len(set(loaded[: len(loaded) // 2])) == 4  # two of three framed of class a, both of class b
    assert 3 not in loaded
    assert (sheet == colours[5]).all(axis=2).sum() >= 200  # the only framed image of class b
