"""Tests of croissant.json and of the terms in it: an independent reader opens every layout by it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dermis.bundle import Bundle
from dermis.bundle.reference import ClassReference, ReferenceDescription
from dermis.dataset.croissant import croissant
from dermis.dataset.plan import DatasetPlan
from dermis.dataset.shards import FileEntry
from dermis.dataset.terms import known_biases, terms_of, use_in_words
from painted_dataset import make, planned
from tiny import make_bundle


@pytest.mark.parametrize("file_format", ["imagefolder", "webdataset", "parquet"])
def test_mlcroissant_accepts_the_description_and_reads_all_images_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str
) -> None:
    mlcroissant: Any = pytest.importorskip("mlcroissant", reason="mlcroissant is not installed")
    from etils import epath
    from mlcroissant._src.operation_graph.operations import extract

    # The library keeps unpacked archives by their name alone: it would take images.zip of another dataset for this one.
    monkeypatch.setattr(extract, "EXTRACT_PATH", epath.Path(tmp_path / "cache"))
    bundle = make_bundle(tmp_path / "bundle", classes=("benign", "malignant", "a b.c"))
    make(tmp_path / "made", bundle, format=file_format, classes={"malignant": 6, "a b.c": 5})
    dataset = mlcroissant.Dataset(tmp_path / "made" / "croissant.json")
    issues = dataset.metadata.ctx.issues
    assert not issues.errors
    # A date would make the bytes of a dataset differ; `dermis export croissant` adds it.
    assert all("datePublished" in warning for warning in issues.warnings) and len(issues.warnings) == 1
    rows = sorted(dataset.records("images"), key=lambda row: row["images/index"])
    layout = planned(bundle, classes={"malignant": 6, "a b.c": 5})
    labels = [label for shard in range(layout.shards) for label in layout.labels(shard)]
    assert [row["images/label"] for row in rows] == labels
    assert [row["images/target"].decode() for row in rows] == [bundle.class_names[label] for label in labels]
    for index, row in enumerate(rows):
        assert row["images/isic_id"].decode() == f"SYN_{index:08d}"
        assert (np.asarray(row["images/image"]) == (index, labels[index], 7)).all()
    names = [(row["classes/label"], row["classes/name"]) for row in dataset.records("classes")]
    assert names == list(enumerate(bundle.class_names))


def _files(plan: DatasetPlan, name: str) -> list[FileEntry]:
    count = 1 if name.endswith(".zip") else plan.shards
    return [FileEntry("metadata.csv", 10, "0" * 64), *[FileEntry(name.format(i), 10, "0" * 64) for i in range(count)]]


@pytest.mark.parametrize(
    ("file_format", "name"),
    [("imagefolder", "images.zip"), ("webdataset", "data-{}.tar"), ("parquet", "data-{}.parquet")],
)
def test_size_does_not_depend_on_the_number_of_images(tiny_bundle: Bundle, file_format: str, name: str) -> None:
    sizes = []
    for count in (65, 1_000_000):
        plan = planned(tiny_bundle, classes={"benign": count}, format=file_format, shard_size=1 if count == 65 else 250)
        sizes.append(len(croissant(plan, tiny_bundle, _files(plan, name), count)))
    assert abs(sizes[1] - sizes[0]) < 100 and max(sizes) < 16_000


def test_it_has_what_the_specifications_ask_for_but_no_date_and_no_address(tiny_bundle: Bundle, tmp_path: Path) -> None:
    make(tmp_path, tiny_bundle)
    text = (tmp_path / "croissant.json").read_text()
    document = json.loads(text)
    for name in ("name", "description", "license", "creator", "citeAs", "version", "distribution", "recordSet"):
        assert document[name]
    for name in ("dataBiases", "dataLimitations", "personalSensitiveInformation", "dataCollection", "dataUseCases"):
        assert document[f"rai:{name}"]
    assert document["conformsTo"][0].endswith("/croissant/1.0")
    assert "url" not in document and not re.search(r"\b20[2-9]\d-\d\d|date[A-Z]", text)
    listed = {file["name"]: file["sha256"] for file in json.loads((tmp_path / "manifest.json").read_text())["files"]}
    described = {each["name"]: each["sha256"] for each in document["distribution"] if "sha256" in each}
    assert described == {name: listed[name] for name in ("images.zip", "metadata.csv")}
    assert "croissant.json" in listed


@pytest.mark.parametrize(
    ("licence", "identifier", "words"),
    [
        ("CC-BY-NC-4.0", "cc-by-nc-4.0", "general research use (DUO:0000042), non-commercial use only (DUO:0000046)"),
        ("CC-0", "cc0-1.0", "no restriction (DUO:0000004)"),
        ("Hospital's own", None, "not known, as the licence has no known terms: ask the owners of the training data"),
    ],
)
def test_terms_follow_from_the_licence(tiny_bundle: Bundle, licence: str, identifier: str | None, words: str) -> None:
    terms = terms_of(replace(tiny_bundle, provenance={"licence": licence}))
    assert (terms.identifier, use_in_words(terms)) == (identifier, words)
    assert (terms.url is None) == (identifier is None)


def test_biases_have_the_numbers_of_the_bundle(tiny_bundle: Bundle) -> None:
    def of_class(images: int, frames: int, light: int, dark: int) -> ClassReference:
        tones = {"very light": light, "light": 0, "intermediate": images - light - dark, "dark": dark}
        return ClassReference(images, None, {"frame": frames, "hair": images // 2}, tones, 60.0)

    reference = ReferenceDescription(
        8,
        {"benign": of_class(300, 3, 270, 0), "malignant": of_class(100, 20, 90, 2)},
        (),
        {},
        provenance={"dataset": {"is_training_set": True}},
    )
    provenance = {"dataset": {"classes": {"benign": 300, "malignant": 100}}}
    plan = planned(tiny_bundle, truncation_psi=0.5)
    text = "\n".join(known_biases(plan, replace(tiny_bundle, reference=reference, provenance=provenance)))
    assert "trained on 400 images: 300 of benign, 100 of malignant" in text
    assert "very light in 90% of the training images that show it, and tan, brown or dark in 0.5%" in text
    assert "a black frame is in 20% of malignant and 1% of benign." in text and "hair" not in text
    assert "Truncation (0.5)" in text
    unknown = "\n".join(known_biases(planned(tiny_bundle), replace(tiny_bundle, reference=None, provenance={})))
    assert "is not known" in unknown and "are not known" in unknown and "Truncation" not in unknown


def test_skin_tones_are_shares_of_the_images_that_show_skin(tiny_bundle: Bundle) -> None:
    shown = ClassReference(1000, None, {}, {"light": 95, "dark": 5}, 50.0)
    suppressed = ClassReference(60, None, {}, {"light": 0, "dark": 0}, 0.0)

    def biases(**classes: ClassReference) -> str:
        reference = ReferenceDescription(8, classes, (), {})
        return "\n".join(known_biases(planned(tiny_bundle), replace(tiny_bundle, reference=reference)))

    text = biases(benign=shown, malignant=suppressed)
    assert "very light in 95% of the" in text and "tan, brown or dark in 5.0%" in text
    assert "Skin around the lesion" not in biases(malignant=suppressed)
