"""Tests of the classifier in datasets: a column, a filter, and the same bytes for every way of generating the dataset."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import Bundle, amend_bundle
from dermis.classifier.onnx_session import Classifier
from dermis.dataset.manifest import Manifest, finalize, parse_manifest, read_manifest
from dermis.dataset.plan import latent_index, plan_for
from dermis.dataset.request import MAX_TRIES, DatasetRequest, check_against
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.errors import RequestError
from dermis.imaging import Images, decode
from dermis.latents import MAX_INDEX
from service_kit import make_directly, service
from tiny import make_bundle
from tiny_classifier import make_classifier

IDENTITY = {"device": "test"}
AGREEING = {"keep": "agreeing", "tries": 4}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of two classes, with a classifier that assigns about half of all noise images to each."""
    root = tmp_path_factory.mktemp("bundles")
    make_classifier(root / "c")
    return amend_bundle(make_bundle(root / "tiny"), parts={"classifier": root / "c"})


def paint(indices: Sequence[int], labels: Sequence[int]) -> Images:
    """Noise of each (index, label), 12 px."""
    drawn = [
        np.random.default_rng([index, label]).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        for index, label in zip(indices, labels, strict=True)
    ]
    return np.stack(drawn)


def dataset_request(**changes: Any) -> DatasetRequest:
    return DatasetRequest.model_validate(
        {"model": "tiny", "classes": {"malignant": 20, "benign": 13}, "shard_size": 9, **changes}
    )


def make(
    folder: Path, bundle: Bundle, *, order: Sequence[int] | None = None, size: int = 32, **changes: Any
) -> Manifest:
    request = dataset_request(**changes)
    check_against(request, bundle, 10**6)
    planned, store = plan_for(request, bundle), Store(folder)
    with Classifier(bundle, device="cpu", threads=1) as classifier:
        for shard in order or range(planned.shards):
            write_shard(
                planned,
                shard,
                paint,
                store,
                score=lambda images: classifier.classify(images).calibrated,
                identity=IDENTITY,
                batch_size=size,
            )
    return finalize(planned, store, bundle, IDENTITY)


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metadata.csv").open()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def probabilities(bundle: Bundle, images: Sequence[Images]) -> list[float]:
    with Classifier(bundle, device="cpu", threads=1) as classifier:
        return [round(p, 6) for p in classifier.classify(images).calibrated.tolist()]


# -- the column


def test_probability_column_matches_classifier_on_stored_images(bundle: Bundle, tmp_path: Path) -> None:
    manifest = make(tmp_path / "a", bundle)
    rows = table(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a" / "images.zip") as archive:
        images = [decode(archive.read(row["file_name"])) for row in rows]
    assert [float(row["probability"]) for row in rows] == probabilities(bundle, images)
    assert manifest.classifier is not None
    agreeing = sum((float(row["probability"]) >= 0.5) == (row["target"] == "malignant") for row in rows)
    assert sum(tally.agreeing or 0 for tally in manifest.classifier.values()) == agreeing
    assert [(tally.images, tally.rejected) for tally in manifest.classifier.values()] == [(13, 0), (20, 0)]
    assert parse_manifest(manifest.to_json(), "x") == manifest
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Not a medical device" in card and "Filtered" not in card


def test_tar_and_parquet_have_same_probability_column(bundle: Bundle, tmp_path: Path) -> None:
    for kind in ("webdataset", "parquet"):
        make(tmp_path / kind, bundle, format=kind)
    expected = {row["isic_id"]: float(row["probability"]) for row in table(tmp_path / "webdataset")}
    assert expected == {row["isic_id"]: float(row["probability"]) for row in table(tmp_path / "parquet")}
    from_tar = {}
    for path in sorted((tmp_path / "webdataset").glob("*.tar")):
        with tarfile.open(path) as archive:
            for name in archive.getnames():
                if name.endswith(".json"):
                    row = json.load(archive.extractfile(name) or io.BytesIO())
                    from_tar[row["isic_id"]] = row["probability"]
    assert from_tar == expected
    files = sorted((tmp_path / "parquet").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file, columns=["isic_id", "probability"]).to_pylist()]
    assert {row["isic_id"]: row["probability"] for row in rows} == expected


def test_dataset_without_scores_is_unchanged(bundle: Bundle, tmp_path: Path) -> None:
    """Requests without a classifier keep the digest that they had before the field existed."""
    assert "classifier" not in dataset_request().model_dump()
    assert "classifier" not in json.loads(dataset_request().model_dump_json())
    plain = make_bundle(tmp_path / "plain", name="tiny")
    for name, of, changes in (("a", plain, {}), ("b", bundle, {"classifier": {"score": False}})):
        planned = plan_for(dataset_request(**changes), of)
        assert not planned.scored
        store = Store(tmp_path / name)
        for shard in range(planned.shards):
            write_shard(planned, shard, paint, store, identity=IDENTITY)
        assert finalize(planned, store, of, IDENTITY).classifier is None
    assert "probability" not in table(tmp_path / "a")[0]
    # The files name the digest of their bundle, so they differ in their hashes alone.
    a, b = ([{**row, "sha256": ""} for row in table(tmp_path / name)] for name in "ab")
    assert a == b
    assert (tmp_path / "a" / "images.zip").read_bytes() != b""
    with pytest.raises(ValueError, match="needs a classifier"):
        write_shard(plan_for(dataset_request(), bundle), 0, paint, Store(tmp_path / "c"), identity=IDENTITY)


# -- the filter


def test_filter_keeps_agreeing_images_and_redraws_others(bundle: Bundle, tmp_path: Path) -> None:
    unfiltered = make(tmp_path / "all", bundle)
    manifest = make(tmp_path / "kept", bundle, classifier=AGREEING)
    rows = table(tmp_path / "kept")
    assert rows and all((float(row["probability"]) >= 0.5) == (row["target"] == "malignant") for row in rows)
    before = {row["isic_id"]: row for row in table(tmp_path / "all")}
    first_tries = 0
    with zipfile.ZipFile(tmp_path / "kept" / "images.zip") as archive:
        for row in rows:
            # The index of the latent identifies the image, also when it is generated in another way.
            place, index = int(row["isic_id"].removeprefix("SYN_")), int(row["index"])
            assert index in [latent_index(place, attempt) for attempt in range(4)]
            assert (decode(archive.read(row["file_name"])) == paint([index], [int(row["label"])])[0]).all()
            assert row["target"] == before[row["isic_id"]]["target"]
            if index == place:
                first_tries += 1
                assert row["sha256"] == before[row["isic_id"]]["sha256"]
    assert manifest.classifier is not None and unfiltered.classifier is not None
    assert first_tries == sum(tally.agreeing or 0 for tally in unfiltered.classifier.values())
    assert {name: tally.images for name, tally in manifest.classifier.items()} == {
        name: sum(row["target"] == name for row in rows) for name in ("benign", "malignant")
    }
    tries = [4 for _ in range(33 - len(rows))] + [int(row["index"]) // latent_index(0, 1) + 1 for row in rows]
    assert sum(tally.drawn for tally in manifest.classifier.values()) == sum(tries)
    rejected = sum(tally.rejected for tally in manifest.classifier.values())
    assert rejected == sum(tries) - len(rows) > 0
    card = (tmp_path / "kept" / "README.md").read_text()
    assert "**Filtered**" in card and f"# {len(rows)} synthetic" in card


def test_a_filtered_dataset_does_not_depend_on_batches_or_order(bundle: Bundle, tmp_path: Path) -> None:
    make(tmp_path / "a", bundle, classifier=AGREEING)
    make(tmp_path / "b", bundle, classifier=AGREEING, order=(3, 1, 0, 2), size=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_filter_with_one_try_drops_rejected_images(bundle: Bundle, tmp_path: Path) -> None:
    make(tmp_path / "all", bundle)
    everything = table(tmp_path / "all")
    limits = {"min_probability": 0.3, "max_probability": 0.6}
    manifest = make(tmp_path / "some", bundle, classifier=limits, format="parquet")
    kept = [row for row in everything if 0.3 <= float(row["probability"]) <= 0.6]
    assert 0 < len(kept) < 33
    assert [row["isic_id"] for row in table(tmp_path / "some")] == [row["isic_id"] for row in kept]
    assert manifest.classifier is not None
    assert sum(tally.rejected for tally in manifest.classifier.values()) == 33 - len(kept)
    stored = [pq.read_table(file).num_rows for file in sorted((tmp_path / "some").glob("*.parquet"))]
    assert sum(stored) == len(kept)


def test_filter_that_rejects_every_image_is_an_error(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="none of 66 images was kept; change min_probability, or") as caught:
        make(tmp_path / "a", bundle, classifier={"min_probability": 1.0, "tries": 2})
    assert caught.value.field == "classifier.min_probability"
    with pytest.raises(RequestError, match="change keep or min_probability, or") as caught:
        make(tmp_path / "b", bundle, classifier={"keep": "agreeing", "min_probability": 1.0, "tries": 2})
    assert caught.value.field == "classifier"
    assert not (tmp_path / "a" / "manifest.json").exists()


def test_existing_shard_is_not_drawn_again(bundle: Bundle, tmp_path: Path) -> None:
    planned, store = plan_for(dataset_request(classifier=AGREEING), bundle), Store(tmp_path / "a")
    with Classifier(bundle, device="cpu", threads=1) as classifier:

        def score(images: Images) -> Any:
            return classifier.classify(images).calibrated

        made = write_shard(planned, 0, paint, store, score=score, identity=IDENTITY)

    def never(*_: Any) -> Any:
        raise AssertionError("drawn again")

    assert write_shard(planned, 0, never, store, score=never, identity=IDENTITY) == made
    with pytest.raises(AssertionError, match="drawn again"):
        write_shard(planned, 0, never, store, score=never, identity={**IDENTITY, "onnxruntime": "0"})


def test_latent_indices_of_retries_do_not_overlap() -> None:
    assert latent_index(0, 1) > 10**8 and latent_index(latent_index(0, 1) - 1, MAX_TRIES - 1) == MAX_INDEX


# -- options of requests


@pytest.mark.parametrize(
    "options",
    [
        {"keep": "all", "tries": 2},
        {"keep": "agreeing", "score": False},
        {"min_probability": 0.7, "max_probability": 0.3},
        {"tries": 0, "keep": "agreeing"},
        {"tries": 65, "keep": "agreeing"},
        {"keep": "best"},
        {"max_probability": 1.5},
        {"threshold": "../x", "keep": "agreeing"},
        {"temperature": 1},
    ],
)
def test_invalid_classifier_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        dataset_request(classifier=options)
    assert caught.value.errors()[0]["loc"][0] == "classifier"


def test_classifier_request_unsupported_by_bundle_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "plain")
    others = make_bundle(tmp_path / "moles", classes=("nevus", "malignant"))
    make_classifier(tmp_path / "c")
    other = amend_bundle(others, parts={"classifier": tmp_path / "c"})
    cases: list[tuple[Bundle, DatasetRequest, str, str]] = [
        (plain, dataset_request(classifier=AGREEING), "classifier", "has no classifier"),
        (
            bundle,
            dataset_request(classifier=AGREEING | {"threshold": "best"}),
            "classifier.threshold",
            "default, sensitivity_90",
        ),
        (bundle, dataset_request(classifier={"threshold": "best"}), "classifier.threshold", "default, sensitivity_90"),
        (bundle, dataset_request(classifier=AGREEING | {"tries": 40}), "classifier.tries", "up to 1,320 images"),
        (other, dataset_request(classes={"nevus": 3}, classifier=AGREEING), "classifier.keep", "'nevus'"),
    ]
    for of, request, field, words in cases:
        with pytest.raises(RequestError, match=words) as caught:
            check_against(request, of, 1000)
        assert caught.value.field == field
    check_against(dataset_request(classes={"nevus": 3}, classifier={"min_probability": 0.5}), other, 1000)
    check_against(dataset_request(classifier={"score": False}), plain, 1000)


# -- in the service and on the command line


@pytest.mark.full
def test_service_makes_same_filtered_dataset_as_library(bundle: Bundle, tmp_path: Path) -> None:
    request = dataset_request(classifier=AGREEING).model_dump(mode="json")
    direct = make_directly(bundle, request, tmp_path / "direct")
    with service(Path(bundle.location), tmp_path / "data", max_samples_per_dataset=200) as running:
        dataset = running.wait(running.ask(request))
        assert dataset["state"] == "succeeded", dataset["error"]
        assert dataset["request"]["classifier"]["keep"] == "agreeing"
        files = running.client.get(dataset["links"]["files"]).json()["data"]
        assert {file["name"]: running.client.get(file["url"]).content for file in files} == direct
        # An image of a later try can be requested by its index.
        rows = list(csv.DictReader(io.StringIO(direct["metadata.csv"].decode())))
        row = next(row for row in rows if int(row["index"]) >= latent_index(0, 1))
        body = {"classes": {row["target"]: 1}, "start_index": int(row["index"])}
        alone = running.client.post("/v1/images", json=body).json()["data"][0]
        assert alone["sha256"] == row["sha256"]
        # A request without options is scored too, and a request that keeps no image fails with the reason.
        plain = running.wait(running.ask({"classes": {"benign": 3}}))
        csv_file = running.client.get(plain["links"]["files"] + "/metadata.csv").text
        assert csv_file.splitlines()[0].endswith(",sha256,probability")
        none = running.wait(running.ask({"classes": {"benign": 3}, "classifier": {"min_probability": 1.0}}))
        assert none["state"] == "failed" and "none of 3 images" in none["error"]["detail"]
        large = running.client.post("/v1/datasets", json={"classes": {"benign": 60}, "classifier": AGREEING})
        assert large.status_code == 422 and large.json()["errors"][0]["field"] == "classifier.tries"


def test_filtered_dataset_is_reproduced_from_its_manifest(bundle: Bundle, tmp_path: Path) -> None:
    def generate(*arguments: str | Path) -> str:
        done = CliRunner().invoke(app, ["generate", "--bundle", bundle.location, *map(str, arguments)])
        assert done.exit_code == 0, done.output + str(done.exception)
        return done.output

    options = ["--classes", "benign=20", "--keep", "agreeing", "--tries", "2", "--max-probability", "0.45"]
    output = generate(*options, "--out", tmp_path / "a")
    manifest = read_manifest(Store(tmp_path / "a"))
    assert manifest.classifier is not None and bundle.classifier is not None
    counts = manifest.classifier["benign"]
    assert f"{counts.images} images ({counts.rejected} rejected by the filter" in output
    assert manifest.synthesizer["classifier"] == bundle.classifier.digest
    assert all(float(row["probability"]) <= 0.45 for row in table(tmp_path / "a"))
    again = generate("--manifest", tmp_path / "a" / "manifest.json", "--out", tmp_path / "b")
    assert "byte for byte" in again
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    refused = CliRunner().invoke(
        app, ["generate", "--manifest", str(tmp_path / "a" / "manifest.json"), "--tries", "3", "--out", "x"]
    )
    assert isinstance(refused.exception, RequestError) and "--tries" in str(refused.exception)
