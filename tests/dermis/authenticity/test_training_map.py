"""Tests of the map of training images: components equal those of a singular value decomposition, and no image is alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss", reason="FAISS is not installed")

from dermis.authenticity.build import build_index, write_index
from dermis.authenticity.index import Floats, Index, open_index
from dermis.authenticity.training_map import ROUNDING, SMALLEST_COUNT, training_map


def index_of(features: Floats, folder: Path) -> Index:
    built = build_index(
        features,
        extractor="lite0",
        extractor_identity="lite0/1",
        resolution=16,
        metric="l2",
        dim=None,
        storage="float",
    )
    write_index(folder, built)
    return open_index(folder, device="cpu", threads=1)


@pytest.fixture(scope="module")
def features() -> Floats:
    """Two groups of 150 and 40 images that differ along one axis, and ten images that are far from all others."""
    random = np.random.default_rng(0)
    rows = random.normal(0, 0.3, (200, 24)) * np.linspace(1, 0.1, 24)
    rows[150:190, 0] += 6
    rows[190:, 1] += 20 + 5 * np.arange(10)
    return rows.astype(np.float32)


def test_components_equal_those_of_a_decomposition_of_the_features(features: Floats, tmp_path: Path) -> None:
    known = training_map(index_of(features, tmp_path / "i"))
    centred = features.astype(np.float64) - features.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    assert known.components.shape == (16, 24)
    np.testing.assert_allclose(known.components @ known.components.T, np.eye(16), atol=1e-5)
    np.testing.assert_allclose(known.explained, (singular**2 / (singular**2).sum())[:16], rtol=1e-4)
    np.testing.assert_allclose(np.abs(known.project(features)), np.abs(centred @ axes[:16].T), atol=1e-3)
    strongest = np.abs(known.components).argmax(axis=1)
    assert (known.components[np.arange(16), strongest] > 0).all()


def test_counts_cover_the_groups_and_leave_out_images_that_are_alone(features: Floats, tmp_path: Path) -> None:
    known = training_map(index_of(features, tmp_path / "i"))
    positions = known.project(features)[:, :3]
    assert known.counted == 200 and len(known.cubes) == len(known.counts) > 0
    assert (known.counts % ROUNDING == 0).all()
    for cube, count in zip(known.cubes, known.counts, strict=True):
        inside = (np.abs(positions - cube) <= known.side / 2).all(axis=1)
        assert inside.sum() >= SMALLEST_COUNT and abs(int(inside.sum()) - int(count)) <= ROUNDING // 2
        assert not inside[190:].any()  # each of these is alone
    assert known.counts.sum() >= 0.7 * 200
    assert np.log2(known.side).is_integer()


def test_positions_do_not_show_the_order_of_the_index(features: Floats, tmp_path: Path) -> None:
    first = training_map(index_of(features, tmp_path / "a"))
    other = training_map(index_of(features[np.random.default_rng(1).permutation(200)], tmp_path / "b"))
    assert (np.diff(first.positions[:, 0]) >= 0).all()
    np.testing.assert_allclose(first.positions, other.positions, atol=1e-3)
    np.testing.assert_array_equal(first.counts, other.counts)


def test_few_training_images_are_not_shown_at_all(features: Floats, tmp_path: Path) -> None:
    known = training_map(index_of(features[: SMALLEST_COUNT - 1], tmp_path / "i"))
    assert (len(known.cubes), known.counted) == (0, SMALLEST_COUNT - 1)
