"""Tests of the privacy gate and of edits in datasets: copies are rejected, and all ways of generation give the same bytes."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from commands.main import app
from dataset_loading import load_by_card
from dermis.authenticity.attack import exposure
from dermis.authenticity.checker import Checker
from dermis.authenticity.verdict import baseline_problem
from dermis.bundle import Bundle, open_bundle
from dermis.classifier.onnx_session import Classifier
from dermis.dataset.manifest import Manifest, finalize, parse_manifest
from dermis.dataset.plan import latent_index, plan_for
from dermis.dataset.privacy import examiner
from dermis.dataset.request import DatasetRequest, check_against
from dermis.dataset.scoring import Synthesize
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.directions.edit import Edit, apply_edits
from dermis.errors import RequestError
from dermis.imaging import Images, decode
from dermis.synthesizer import Synthesizer
from service_kit import make_directly, service
from tiny import make_bundle
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

IDENTITY = {"device": "test"}
# This "generator" has memorised: the first latents of these samples are training images.
COPIED = (2, 3, 11, 17)


def paint(indices: Sequence[int], labels: Sequence[int]) -> Images:
    """Noise of each index, 12 px."""
    del labels
    drawn = [np.random.default_rng(index).integers(0, 256, (12, 12, 3), dtype=np.uint8) for index in indices]
    return np.stack(drawn)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    others = [10**6 + i for i in range(40)]
    training, held_out = paint([*COPIED, *others], []), paint([10**7 + i for i in range(24)], [])
    return make_complete_bundle(tmp_path_factory.mktemp("bundles"), training, held_out=held_out)


def dataset_request(**changes: Any) -> DatasetRequest:
    return DatasetRequest.model_validate(
        {"model": "tiny", "classes": {"malignant": 12, "benign": 8}, "shard_size": 9, **changes}
    )


def make(
    folder: Path, bundle: Bundle, *, size: int = 32, reverse: bool = False, painter: Synthesize = paint, **changes: Any
) -> Manifest:
    request = dataset_request(**changes)
    check_against(request, bundle, 10**6)
    planned, store = plan_for(request, bundle), Store(folder)
    with (
        Classifier(bundle, device="cpu", threads=1) as classifier,
        Checker(bundle, device="cpu", threads=1) as checker,
    ):
        for shard in sorted(range(planned.shards), reverse=reverse):
            write_shard(
                planned,
                shard,
                painter,
                store,
                score=lambda images: classifier.classify(images).calibrated,
                examine=examiner(planned, checker),
                identity=IDENTITY,
                batch_size=size,
            )
        return finalize(planned, store, bundle, IDENTITY, partial(exposure, checker.index))


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metadata.csv").open()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def judged(bundle: Bundle, folder: Path) -> list[tuple[str, str, str]]:
    """The checker's verdicts on the images in the files."""
    rows = table(folder)
    with zipfile.ZipFile(folder / "images.zip") as archive:
        images = [decode(archive.read(row["file_name"])) for row in rows]
    with Checker(bundle, device="cpu", threads=1) as checker:
        verdicts = checker.check(images)
    return [
        (str(round(float(d), 2)), str(int(p)), str(int(a)))
        for d, p, a in zip(verdicts.distances, verdicts.percentiles, verdicts.authentic, strict=True)
    ]


# -- the columns


@pytest.mark.parametrize("file_format", ["imagefolder", "webdataset", "parquet"])
def test_dataset_card_loads_typed_classifier_and_gate_columns(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    make(tmp_path / "made", bundle, format=file_format, privacy={"gate": "authentic", "on_reject": "flag"})
    kinds = {
        "probability": "float64",
        "nearest_distance": "float64",
        "distance_percentile": "int64",
        "authentic": "int64",
        "gate": "string",
    }
    for dataset in load_by_card(tmp_path / "made", tmp_path / "cache", monkeypatch):
        if not hasattr(dataset, "features"):
            assert all(kinds.keys() <= row.keys() for _, _, row in dataset)
            continue
        nested = file_format == "webdataset"
        features = dataset.features["json"] if nested else dataset.features
        assert {name: features[name].dtype for name in kinds} == kinds
        rows = dataset["json"] if nested else dataset
        loaded = [[str(row[name]) for name in kinds] for row in rows]
        assert loaded == [[row[name] for name in kinds] for row in table(tmp_path / "made")]


# -- the gate


def test_gate_redraws_copies_and_records_distance_of_each_image(bundle: Bundle, tmp_path: Path) -> None:
    # The nearest 1 % of real pairs: the copies are nearer than any.
    manifest = make(tmp_path / "a", bundle, privacy={"gate": "min_distance"})
    rows = table(tmp_path / "a")
    assert len(rows) == 20
    again = {int(row["isic_id"].removeprefix("SYN_")): int(row["index"]) for row in rows}
    assert [index for index, latent in again.items() if latent != index] == list(COPIED)
    assert all(again[index] == latent_index(index, 1) for index in COPIED)
    # Distant images may be measured in bfloat16, but not those that `authentic` examines.
    exact = judged(bundle, tmp_path / "a")
    assert [float(row["nearest_distance"]) for row in rows] == pytest.approx([float(one[0]) for one in exact], abs=0.05)
    assert {row["gate"] for row in rows} == {"passed"}
    make(tmp_path / "b", bundle, privacy={"gate": "authentic"})
    columns = [(row["nearest_distance"], row["distance_percentile"], row["authentic"]) for row in table(tmp_path / "b")]
    assert columns == judged(bundle, tmp_path / "b")
    report = manifest.privacy
    assert report is not None
    assert sum(counts.rejected for counts in report.classes.values()) == len(COPIED)
    assert sum(counts.seen for counts in report.classes.values()) == 20 + len(COPIED)
    authentic = sum(row["authentic"] == "1" for row in rows)
    assert report.authentic_share_of_images == authentic / 20 and report.authentic_share_of_candidates == authentic / 24
    assert report.distances[0] > 0 and len(report.baseline) == len(report.distances)
    assert report.exposure.attack is not None and report.exposure.attack.held_out == 24
    assert bundle.authenticity is not None and report.weakness == baseline_problem(bundle.authenticity)
    assert report.limit == round(bundle.authenticity.radii[1], 4)
    assert report.stands_on.startswith(f"1 % of the 44 training images are nearer than {report.limit:.4f}")
    assert parse_manifest(manifest.to_json(), "x") == manifest
    card = (tmp_path / "a" / "README.md").read_text()
    assert "## Privacy" in card and "has not been checked" not in card
    assert "counts images as independent" in card and "chance" not in card, "patients are not known"
    assert report.stands_on in card and f"radii of the training images ({report.limit:.4f})" in card


def test_old_manifest_is_read_and_weak_gate_baseline_is_reported(bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.authenticity is not None
    # An index of the first format, of training images of which 2 % occur twice.
    spoilt = replace(
        bundle.authenticity, duplicates=None, exact_radii=None, radii=(0.0, 0.0, *bundle.authenticity.radii[2:])
    )
    manifest = make(tmp_path / "a", replace(bundle, authenticity=spoilt), privacy={"gate": "min_distance"})
    assert manifest.privacy is not None and "build the index again" in str(manifest.privacy.weakness)
    assert "**Copies may pass this check" in (tmp_path / "a" / "README.md").read_text()
    old = json.loads(manifest.to_json())
    for name in ("limit", "stands_on", "weakness"):
        del old["privacy"][name]
    assert parse_manifest(json.dumps(old).encode(), "x").privacy is not None


def test_gate_drops_or_flags_rejected_images_on_request(bundle: Bundle, tmp_path: Path) -> None:
    dropped = make(tmp_path / "d", bundle, privacy={"gate": "min_distance", "on_reject": "drop"})
    kept = [int(row["index"]) for row in table(tmp_path / "d")]
    assert kept == [index for index in range(20) if index not in COPIED]
    assert dropped.classifier is not None  # the classifier has rejected none of them
    assert all(tally.rejected == 0 for tally in dropped.classifier.values())
    flagging = make(tmp_path / "f", bundle, privacy={"gate": "min_distance", "on_reject": "flag"})
    rows = table(tmp_path / "f")
    assert [int(row["index"]) for row in rows] == list(range(20))
    flagged = {int(row["index"]): row for row in rows if row["gate"] == "flagged"}
    assert list(flagged) == list(COPIED)
    assert {(row["nearest_distance"], row["authentic"]) for row in flagged.values()} == {("0.0", "0")}
    assert flagging.privacy is not None
    assert [counts.flagged for counts in flagging.privacy.classes.values()] == [
        sum(row["target"] == name for row in flagged.values()) for name in ("benign", "malignant")
    ]


def test_an_authentic_dataset_holds_authentic_images_only(bundle: Bundle, tmp_path: Path) -> None:
    manifest = make(tmp_path / "a", bundle, privacy={"gate": "authentic", "tries": 16})
    rows = table(tmp_path / "a")
    assert (
        rows
        and {row["authentic"] for row in rows} == {"1"}
        and {a for _, _, a in judged(bundle, tmp_path / "a")} == {"1"}
    )
    assert (
        manifest.privacy is not None
        and manifest.privacy.authentic_share_of_images == 1 > manifest.privacy.authentic_share_of_candidates
    )


def test_filter_and_gate_count_their_own_rejections(bundle: Bundle, tmp_path: Path) -> None:
    manifest = make(
        tmp_path / "a", bundle, classifier={"keep": "agreeing", "tries": 8}, privacy={"gate": "min_distance"}
    )
    assert manifest.classifier is not None and manifest.privacy is not None
    for name, tally in manifest.classifier.items():
        assert tally.agreeing == tally.images
        seen = manifest.privacy.classes[name]
        assert seen.images == tally.images and seen.seen == seen.images + seen.rejected
    assert sum(counts.rejected for counts in manifest.privacy.classes.values()) >= 1
    assert sum(counts.rejected for counts in manifest.classifier.values()) >= 1
    for row in table(tmp_path / "a"):
        assert (float(row["probability"]) >= 0.5) == (row["target"] == "malignant")
        assert row["gate"] == "passed"


def test_gated_dataset_is_independent_of_batches_and_shard_order(bundle: Bundle, tmp_path: Path) -> None:
    for name, changes in (("a", {}), ("b", {"size": 3, "reverse": True})):
        make(tmp_path / name, bundle, privacy={"gate": "authentic"}, **changes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_parquet_has_typed_gate_columns(bundle: Bundle, tmp_path: Path) -> None:
    make(tmp_path / "a", bundle, format="parquet", privacy={"gate": "min_distance", "on_reject": "flag"})
    rows = [row for file in sorted((tmp_path / "a").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert [row["index"] for row in rows if row["gate"] == "flagged"] == list(COPIED)
    assert all(isinstance(row["nearest_distance"], float) and isinstance(row["authentic"], int) for row in rows)


def test_gate_that_rejects_every_image_writes_no_dataset(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the gate rejected 20") as caught:
        make(
            tmp_path / "a",
            bundle,
            painter=lambda indices, labels: paint([COPIED[0]] * len(indices), labels),
            privacy={"gate": "authentic", "on_reject": "drop"},
        )
    assert caught.value.field == "privacy.on_reject"
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_request_without_privacy_and_edits_omits_those_fields(bundle: Bundle, tmp_path: Path) -> None:
    assert not {"privacy", "edits"} & dataset_request().model_dump().keys()
    plain = make_bundle(tmp_path / "plain", name="tiny")
    with pytest.raises(RequestError, match="has no index") as caught:
        check_against(dataset_request(privacy={}), plain, 10**6)
    assert caught.value.kind == "no-index"
    with pytest.raises(ValidationError, match="together"):
        dataset_request(classifier={"keep": "agreeing", "tries": 60}, privacy={"tries": 8})


# -- edits


def test_edits_add_same_offset_to_every_latent(bundle: Bundle) -> None:
    edits = [Edit("axis-0", 2.0), Edit("axis-2", -1.5, (1, 3))]
    seeds, indices, labels = [3] * 5, [0, 1, 2, 7, 9], [0, 1, 0, 1, 1]
    options: dict[str, Any] = {"truncation_psi": 0.7, "truncation_cutoff": 4}
    known = {direction.name: direction for direction in bundle.directions}
    with Synthesizer(bundle, device="cpu", threads=1) as synthesizer:
        ws = synthesizer.ws(seeds, indices, labels, **options)
        moved = apply_edits(ws, edits, known)
        offset = moved[0] - ws[0]
        drawn = synthesizer.images(seeds, indices, labels, **options, offset=apply_edits(0 * ws[:1], edits, known)[0])
        assert np.array_equal(drawn, synthesizer.images_from_ws(moved))
        assert not np.array_equal(drawn, synthesizer.images(seeds, indices, labels, **options))
        with pytest.raises(RequestError, match="offset"):
            synthesizer.images(seeds, indices, labels, offset=offset[:2])
    assert np.allclose(offset[0, 0], 2.0, atol=1e-5) and np.allclose(offset[:, 2], [0, -4.5, -4.5, 0, 0, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        ({"direction": "nowhere", "strength": 1.0}, "edits[0].direction"),
        ({"direction": "axis-0", "strength": 1.0, "layers": [4, 9]}, "edits[0].layers"),
    ],
)
def test_edits_that_the_bundle_cannot_make_are_refused(bundle: Bundle, edit: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_against(dataset_request(edits=[edit]), bundle, 10**6)
    assert caught.value.field == field


# -- every way to make a dataset


def test_service_makes_same_gated_dataset_as_library(bundle: Bundle, tmp_path: Path) -> None:
    body = {
        "model": "tiny",
        "classes": {"malignant": 9, "benign": 6},
        "shard_size": 6,
        "edits": [{"direction": "axis-1", "strength": -2.0, "layers": [0, 2]}],
        "privacy": {"gate": "authentic", "on_reject": "resample", "tries": 16},
    }
    with service(bundle.location, tmp_path / "data") as running:
        dataset = running.wait(running.ask(body))
        assert dataset["state"] == "succeeded", dataset
        listed = running.client.get(dataset["links"]["files"]).json()["data"]
        served = {file["name"]: running.client.get(file["url"]).content for file in listed}
        refused = running.client.post("/v1/datasets", json={**body, "edits": [{"direction": "x", "strength": 1.0}]})
        assert refused.status_code == 422 and "edits[0].direction" in refused.text
    direct = make_directly(open_bundle(bundle.location), body, tmp_path / "direct")
    assert served == direct
    assert json.loads(direct["manifest.json"])["privacy"]["exposure"]["attack"] is not None


def test_generate_command_reports_gate_and_reproduces_dataset(bundle: Bundle, tmp_path: Path) -> None:
    run = CliRunner().invoke(
        app,
        [
            *("generate", "--bundle", bundle.location, "--out", str(tmp_path / "a"), "--device", "cpu"),
            *("--classes", "benign=5,malignant=6", "--edit", "axis-0=1.5@0-3", "--edit", "axis-1=-1"),
            *("--gate", "min_distance", "--percentile", "5", "--on-reject", "flag"),
        ],
    )
    assert run.exit_code == 0, run.output
    assert "0 rejected by the gate" in run.output and "authentic" in run.output
    request = json.loads((tmp_path / "a" / "manifest.json").read_text())["request"]
    assert request["edits"][0] == {"direction": "axis-0", "strength": 1.5, "layers": [0, 3]}
    again = CliRunner().invoke(
        app,
        [
            *("generate", "--bundle", bundle.location, "--out", str(tmp_path / "b"), "--device", "cpu"),
            *("--manifest", str(tmp_path / "a" / "manifest.json")),
        ],
    )
    assert again.exit_code == 0 and "byte for byte" in again.output, again.output
    wrong = CliRunner().invoke(
        app, ["generate", "--bundle", bundle.location, "--out", "x", "--classes", "benign=1", "--edit", "a"]
    )
    assert isinstance(wrong.exception, RequestError) and "DIRECTION=STRENGTH" in str(wrong.exception)
