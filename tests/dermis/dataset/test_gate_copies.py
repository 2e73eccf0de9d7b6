"""Tests of the gate with a copy detector: changed copies of training images are kept out of datasets and HTTP responses."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dermis.authenticity.attack import exposure
from dermis.authenticity.checker import Checker
from dermis.bundle import Bundle, amend_bundle
from dermis.dataset.manifest import Manifest, finalize, parse_manifest
from dermis.dataset.plan import plan_for
from dermis.dataset.privacy import examiner
from dermis.dataset.request import DatasetRequest, check_against
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.imaging import Images, encode
from service_kit import service
from services.inference import pixels
from tiny_copies import KNOWN, SIDE, colour_fields, shared_detector
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

COPIED = (2, 5, 10)
"""The first latents of these samples give mirrored and turned training images."""


def paint(indices: Sequence[int], labels: Sequence[int]) -> Images:
    del labels
    images = [
        np.rot90(colour_fields(0, KNOWN)[index][:, ::-1])
        if index in COPIED
        else colour_fields(50_000 + index % 1000, 1)[0]
        for index in indices
    ]
    return np.stack(images)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("bundles")
    plain = make_complete_bundle(root, colour_fields(0, KNOWN), held_out=colour_fields(30_000, 24))
    return amend_bundle(plain, parts={"copies": shared_detector(tmp_path_factory)})


def make(folder: Path, bundle: Bundle, **privacy: Any) -> Manifest:
    document = {
        "model": "tiny",
        "classes": {"benign": 12},
        "privacy": {"gate": "min_distance", "percentile": 0.0, **privacy},
    }
    request = DatasetRequest.model_validate({**document, "classifier": {"score": False}})
    check_against(request, bundle, 1000)
    plan, store = plan_for(request, bundle), Store(folder)
    with Checker(bundle, device="cpu", threads=1) as checker:
        write_shard(plan, 0, paint, store, examine=examiner(plan, checker))
        return finalize(plan, store, bundle, {}, partial(exposure, checker.index))


@pytest.mark.full
def test_changed_copies_are_replaced_and_counted(tmp_path: Path, bundle: Bundle) -> None:
    with Checker(bundle, device="cpu", threads=1) as checker:
        verdicts = checker.check(paint(range(12), [0] * 12))
    assert verdicts.copies is not None
    assert verdicts.copies[list(COPIED)].all()
    made = make(tmp_path / "d", bundle)
    assert made.privacy is not None
    assert made.privacy.classes["benign"].copies == verdicts.copies.sum()
    assert made.privacy.classes["benign"].rejected >= len(COPIED)
    rows = list(csv.DictReader((tmp_path / "d" / "metadata.csv").open()))
    assert {int(row["index"]) for row in rows}.isdisjoint(COPIED)
    assert "copy detector took" in (tmp_path / "d" / "README.md").read_text()
    assert parse_manifest((tmp_path / "d" / "manifest.json").read_bytes(), "m") == made


def test_detection_can_be_switched_off_and_copies_can_be_flagged(tmp_path: Path, bundle: Bundle) -> None:
    kept = make(tmp_path / "kept", bundle, detect_copies=False)
    assert kept.privacy is not None and kept.privacy.classes["benign"].copies is None
    rows = list(csv.DictReader((tmp_path / "kept" / "metadata.csv").open()))
    assert set(COPIED) & {int(row["index"]) for row in rows}  # copies that the index alone does not reject
    make(tmp_path / "flagged", bundle, on_reject="flag")
    gates = {int(row["index"]): row["gate"] for row in csv.DictReader((tmp_path / "flagged" / "metadata.csv").open())}
    assert [gates[index] for index in COPIED] == ["flagged"] * len(COPIED)


def test_request_without_the_option_keeps_its_former_digest() -> None:
    request = DatasetRequest.model_validate({"classes": {"benign": 1}, "privacy": {"gate": "authentic"}})
    assert "detect_copies" not in json.dumps(request.model_dump())
    off = DatasetRequest.model_validate({"classes": {"benign": 1}, "privacy": {"detect_copies": False}})
    assert off.model_dump()["privacy"]["detect_copies"] is False


def test_rows_between_services_carry_the_score(bundle: Bundle) -> None:
    assert bundle.authenticity is not None
    images = np.concatenate([colour_fields(0, 2), colour_fields(60_000, 2)])
    with Checker(bundle, device="cpu", threads=1) as checker:
        direct = checker.nearest(images)
        digest, length = bundle.authenticity.digest, pixels.row_bytes([SIDE])
        rows = [pixels.pack_rows(digest, images, length, pixels.Comparison(detect_copies=on)) for on in (True, False)]
        table = np.array(pixels.find_nearest({digest: checker}, np.concatenate(rows)))
    assert np.array_equal(table[:4, 2], direct.copy_scores)
    assert np.isnan(table[4:, 2]).all()
    assert np.array_equal(table[:, 3:], np.tile(direct.embeddings, (2, 1)))


def test_images_near_the_training_set_are_measured_exactly(bundle: Bundle) -> None:
    images = np.concatenate([colour_fields(0, 3), colour_fields(60_000, 30)])
    with Checker(bundle, device="cpu", threads=1) as checker:
        exact = checker.nearest(images)
        embedder = checker._embedder
        slightly_wrong = exact.embeddings.std() * np.random.default_rng(0).normal(size=embedder.dim) / 100
        embedder._fast = lambda inputs: embedder._extract(inputs) + slightly_wrong.astype(np.float32)
        limit = float(np.median(exact.distances))
        rounded, forced = (checker.nearest(images, exact_below=below) for below in (limit, np.inf))
    near = exact.distances < limit
    assert 3 < near.sum() < len(images) - 3
    for name in ("distances", "radii", "embeddings", "neighbours"):
        assert np.array_equal(getattr(rounded, name)[near], getattr(exact, name)[near])
        assert np.array_equal(getattr(forced, name), getattr(exact, name))
    assert not np.array_equal(rounded.distances, exact.distances)
    assert np.abs(rounded.distances - exact.distances).max() < 0.1


@pytest.mark.full
def test_http_tells_copies_of_generated_images_only(tmp_path: Path, bundle: Bundle) -> None:
    with service(bundle.location, tmp_path / "data", authenticity_uploads=True) as running:
        generated = running.client.post("/v1/authenticity", json={"classes": {"benign": 2}})
        assert generated.status_code == 200, generated.text
        assert all(type(row["copy_detected"]) is bool for row in generated.json()["data"])
        file = ("files", ("a.png", encode(colour_fields(0, 1)[0]), "image/png"))
        uploaded = running.client.post("/v1/authenticity", files=[file])
        assert uploaded.status_code == 200, uploaded.text
        assert "copy_detected" not in uploaded.json()["data"][0]
