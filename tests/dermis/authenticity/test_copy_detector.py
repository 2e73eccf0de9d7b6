"""Tests of the copy detector: changed copies are found, other images are not, and damaged detectors are refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dermis.authenticity.copy_detector import (
    BACKGROUND,
    BACKGROUND_WEIGHT,
    CopyDetector,
    CopySearch,
    calibrate,
    describer,
    scores_of,
)
from dermis.authenticity.copy_network import REGIONS, CopyNetwork
from dermis.authenticity.transformations import JOINS, TRANSFORMATIONS, combined
from dermis.authenticity.verdict import COPY
from dermis.bundle import amend_bundle, open_bundle
from dermis.bundle.copies import DESCRIPTOR, REFERENCES, WEIGHTS, read_copies_files, write_copies_folder
from dermis.errors import BundleError
from tiny import make_bundle
from tiny_copies import KNOWN, colour_fields, make_detector

pytest.importorskip("faiss", reason="FAISS is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_detector(tmp_path_factory.mktemp("detector"), colour_fields(0, KNOWN)).folder


@pytest.fixture(scope="module")
def detector(folder: Path) -> CopyDetector:
    return CopyDetector(folder, device="cpu", threads=1)


def test_margins_agree_with_brute_force() -> None:
    rng = np.random.default_rng(0)
    references = rng.integers(-127, 128, (300, 16)).astype(np.int8)
    descriptors = rng.normal(size=(7, len(REGIONS), 16)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=2, keepdims=True)
    vectors = references / np.linalg.norm(references.astype(float), axis=1, keepdims=True)
    ranked = np.sort(descriptors @ vectors.T, axis=2)[:, :, ::-1]
    expected = ranked[:, :, 0] - BACKGROUND_WEIGHT * ranked[:, :, BACKGROUND].mean(axis=2)
    assert np.allclose(CopySearch(references, 1).margins(descriptors), expected, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (400, len(REGIONS)), elements=st.floats(0.0078125, 1, width=32)))
def test_calibration_bounds_false_alarms(margins: np.ndarray) -> None:
    whole, half = calibrate(margins)
    assert (scores_of(margins, whole, half) >= COPY).mean() <= 0.01


def test_mirrored_and_turned_training_images_are_found_and_others_are_not(detector: CopyDetector) -> None:
    known, others = colour_fields(0, KNOWN), colour_fields(20_000, 100)
    for copies in (known, known[:, :, ::-1], np.rot90(known, axes=(1, 2))):
        assert (detector.scores(np.ascontiguousarray(copies)) >= COPY).mean() > 0.7
    assert (detector.scores(others) >= COPY).mean() < 0.1


def test_score_depends_neither_on_other_images_nor_on_threads(folder: Path, detector: CopyDetector) -> None:
    images = colour_fields(0, 40)
    together = detector.scores(images)
    assert np.array_equal(together, np.concatenate([detector.scores(image[None]) for image in images]))
    assert np.array_equal(together, CopyDetector(folder, device="cpu", threads=2).scores(images))


def test_openvino_and_torch_compute_the_same_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    torch.manual_seed(0)
    network, images = CopyNetwork(pretrained=True).eval().requires_grad_(False), colour_fields(0, 3)
    with_openvino = describer(network, 48)(images)
    monkeypatch.setattr("dermis.features_openvino.have_openvino", lambda: False)
    assert np.allclose(with_openvino, describer(network, 48)(images), atol=2e-4)
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
        ("references", KNOWN + 1, "must hold int8"),
        ("whole_threshold", 0, "whole_threshold"),
        ("half_threshold", 1e-300, "half_threshold"),
        ("size", 10_000, "size"),
        ("format_version", 99, "format_version|newer"),
    ],
)
def test_detector_whose_description_contradicts_its_files_is_refused(
    tmp_path: Path, folder: Path, field: str, value: float, message: str
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


def test_detector_with_an_empty_descriptor_is_refused(tmp_path: Path, folder: Path) -> None:
    description, files = read_copies_files(folder)
    references = np.load(folder / REFERENCES)
    references[3] = 0
    file = io.BytesIO()
    np.save(file, references)
    write_copies_folder(tmp_path / "x", description, files[WEIGHTS], file.getvalue())
    with pytest.raises(BundleError, match=r"references\.npy: .*length"):
        CopyDetector(tmp_path / "x", device="cpu", threads=1)


def test_bundle_without_detector_says_how_to_train_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="dermis train copy-detector"):
        CopyDetector(make_bundle(tmp_path / "b"))
