"""Tests of the copy detector: changed copies are found, other images are not, and damaged detectors are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dermis.authenticity.copy_detector import (
    CopyDetector,
    calibrate,
    describer,
    find_seams,
    mean_descriptors,
    oriented,
)
from dermis.authenticity.copy_network import CopyNetwork
from dermis.authenticity.copy_references import CopySearch, References, normalised, packed, unpacked
from dermis.authenticity.index import Floats
from dermis.authenticity.transformations import JOINS, TRANSFORMATIONS, combined
from dermis.authenticity.verdict import COPY
from dermis.bundle import amend_bundle, open_bundle
from dermis.bundle.copies import DESCRIPTOR, REFERENCES, WEIGHTS
from dermis.errors import BundleError
from dermis.imaging import Images
from optional_packages import needs_openvino
from tiny import make_bundle
from tiny_copies import KNOWN, colour_fields, shared_detector

pytest.importorskip("faiss", reason="FAISS is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_detector(tmp_path_factory)


@pytest.fixture(scope="module")
def detector(folder: Path) -> CopyDetector:
    return CopyDetector(folder, device="cpu", threads=1)


def unit(*shape: int, seed: int = 0) -> Floats:
    return normalised(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def test_margins_agree_with_brute_force() -> None:
    references = References(unit(90, 16), unit(90, 4, 8, seed=1))
    whole, halves = unit(7, 16, seed=2), unit(7, 4, 8, seed=3)
    search = CopySearch(references, 1)

    def margin(similarities: Floats, background: slice) -> Floats:
        ranked = np.sort(similarities, axis=-1)[..., ::-1]
        return ranked[..., 0] - 0.5 * ranked[..., background].mean(axis=-1)  # type: ignore[no-any-return]

    assert np.allclose(search.whole_margins(whole), margin(whole @ references.whole.T, slice(10, 20)), atol=1e-5)
    parts = np.concatenate([references.halves, normalised(references.whole[:, None, :8])], axis=1).reshape(-1, 8)
    of_halves = margin(halves @ parts.T, slice(20, 40))
    assert np.allclose(search.half_margins(halves.reshape(-1, 8)), of_halves.ravel(), atol=1e-5)
    orders = {  # of upper, lower, left and right in the eight orientations
        (0, 1, 2, 3), (0, 1, 3, 2), (1, 0, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (2, 3, 1, 0), (3, 2, 0, 1), (3, 2, 1, 0)
    }  # fmt: skip
    best = np.max([np.einsum("nkd,mkd->nm", halves, references.halves[:, order]) / 4 for order in orders], axis=0)
    joint = margin(0.65 * whole @ references.whole.T + 0.35 * best, slice(10, 20))
    assert np.allclose(search.joint_margins(whole, halves), joint, atol=1e-5)


def test_mean_descriptors_of_a_turned_image_are_those_of_the_image_with_its_halves_exchanged() -> None:
    def describe(images: Images) -> Floats:  # the mean colours of the regions and of the corners of each
        middle = images.shape[1] // 2
        regions = (images, images[:, :middle], images[:, middle:], images[:, :, :middle], images[:, :, middle:])
        colours = [region.mean(axis=(1, 2)) for region in regions]
        return np.stack([np.pad(colour, ((0, 0), (0, 3)), constant_values=1) for colour in colours], axis=1)

    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    upright = mean_descriptors(describe, image)
    turned = mean_descriptors(describe, oriented(image, False, 1))  # the right half comes to the top
    assert np.allclose(turned.whole, upright.whole, atol=1e-5)
    assert np.allclose(turned.halves, upright.halves[:, [3, 2, 0, 1]], atol=1e-5)
    assert not np.allclose(turned.halves, upright.halves, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_stored_references_keep_their_similarities(seed: int) -> None:
    references = References(unit(20, 64, seed=seed), unit(20, 4, 32, seed=seed + 1))
    stored = packed(references)
    assert stored.nbytes == 20 * (64 + 4 * 32) // 2
    for before, after in zip(astuple(references), astuple(unpacked(stored, 64)), strict=True):
        assert np.allclose(np.linalg.norm(after, axis=-1), 1, atol=1e-5)
        assert ((before * after).sum(axis=-1) > 0.98).all()


@pytest.mark.parametrize("seed", range(5))
def test_calibration_bounds_false_alarms(seed: int) -> None:
    margins = np.abs(np.random.default_rng(seed).normal(0.3, 0.1, (600, 5))).astype(np.float32)
    first, second = margins[:, :2], margins[:, 2:]
    thresholds = calibrate(first, second)
    candidates = (first / np.array(thresholds.first)).max(axis=1) >= 1
    scores = np.round(second / np.array(thresholds.second), 3)
    scores[first[:, 1] < thresholds.first[1], 1:] = 0  # these have no seam
    assert 3 <= (scores[candidates].max(axis=1, initial=0) >= COPY).sum() <= 8


@pytest.mark.parametrize(("cut", "horizontal"), [(24, False), (13, True), (30, False)])
def test_seam_of_joined_images_is_where_they_were_joined(cut: int, horizontal: bool) -> None:
    first, second = colour_fields(0, 2)
    joined = np.concatenate([first[:, :cut], second[:, cut:]], axis=1)
    image = np.ascontiguousarray(joined.transpose(1, 0, 2)) if horizontal else joined
    strength, place, across = find_seams(np.stack([image, first]))
    assert (place[0], across[0]) == (cut - 1, horizontal)
    assert strength[0] > 2 * strength[1]


def test_mirrored_and_turned_training_images_are_found_and_others_are_not(detector: CopyDetector) -> None:
    known, others = colour_fields(0, KNOWN), colour_fields(20_000, 100)
    for copies in (known, known[:, :, ::-1], np.rot90(known, axes=(1, 2))):
        assert (detector.scores(np.ascontiguousarray(copies)) >= COPY).mean() > 0.4
    assert (detector.scores(others) >= COPY).mean() < 0.1


def test_score_depends_neither_on_other_images_nor_on_threads(folder: Path, detector: CopyDetector) -> None:
    images = colour_fields(0, 40)
    together = detector.scores(images)
    assert np.array_equal(together, np.concatenate([detector.scores(image[None]) for image in images]))
    assert np.array_equal(together, CopyDetector(folder, device="cpu", threads=2).scores(images))


@needs_openvino
def test_openvino_and_torch_compute_the_same_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("dermis.openvino_images.has_native_bfloat16", lambda: False)
    network, images = CopyNetwork(pretrained=True).eval().requires_grad_(False), colour_fields(0, 3)
    with_openvino = describer(network, 48)(images)
    monkeypatch.setattr("dermis.openvino_images.have_openvino", lambda: False)
    with_torch = describer(network, 48)(images)
    assert np.allclose(with_openvino, with_torch, atol=2e-4)
    assert np.allclose(np.linalg.norm(with_openvino, axis=2), 1, atol=1e-4)


@pytest.mark.parametrize("name", [*TRANSFORMATIONS, "combined"])
def test_transformation_keeps_size_and_original_and_follows_from_its_random_numbers(name: str) -> None:
    function = {**TRANSFORMATIONS, "combined": combined}[name]
    image = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    before = image.copy()
    first, second = (function(image, np.random.default_rng(3)) for _ in range(2))
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert np.array_equal(image, before)
    assert not np.array_equal(first, image)


@pytest.mark.parametrize("join", JOINS.values(), ids=list(JOINS))
def test_joined_image_shows_each_image_in_its_half(join: object) -> None:
    black, white = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    joined = join(black, white)  # type: ignore[operator]
    assert joined.shape == (9, 9, 3)
    assert joined[:, :4].max() == 0
    assert joined[:, 5:].min() == 255


def test_detector_in_bundle_is_verified_and_can_be_removed(tmp_path: Path, folder: Path) -> None:
    bundle = amend_bundle(make_bundle(tmp_path / "b"), parts={"copies": folder})
    assert bundle.copies is not None
    assert bundle.copies.references == KNOWN
    assert "changed" in bundle.model_card
    assert CopyDetector(bundle, device="cpu", threads=1).description == bundle.copies
    with pytest.raises(BundleError, match="copies/copies.json|copies/references.npy"):
        damaged = tmp_path / "b" / "copies" / REFERENCES
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dim", 32, "other tensors"),
        ("dim", 66, "multiple"),
        ("references", KNOWN + 1, "must hold uint8"),
        ("thresholds", {"first": [0, 1], "second": [1, 1, 1]}, "thresholds.first.0"),
        ("thresholds", {"first": [1, 1], "second": [1, 1, 1e-300]}, "thresholds.second.2"),
        ("thresholds", {"first": [1], "second": [1, 1, 1]}, "thresholds.first"),
        ("size", 10_000, "size"),
        ("format_version", 99, "newer"),
        ("format_version", 1, "has format 1"),
    ],
)
def test_detector_whose_description_contradicts_its_files_is_refused(
    tmp_path: Path, folder: Path, field: str, value: object, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "x")
    document = json.loads((tmp_path / "x" / DESCRIPTOR).read_text())
    (tmp_path / "x" / DESCRIPTOR).write_text(json.dumps({**document, field: value}))
    with pytest.raises(BundleError, match=message):
        CopyDetector(tmp_path / "x", device="cpu", threads=1)


def test_detector_with_other_weights_is_refused(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path / "x")
    weights = tmp_path / "x" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-2] + b"\x00\x01")
    with pytest.raises(BundleError, match="differs"):
        CopyDetector(tmp_path / "x", device="cpu", threads=1)


def test_bundle_without_detector_says_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="dermis train copy-detector"):
        CopyDetector(make_bundle(tmp_path / "b"))
