"""Tests of the report of a dataset: planted properties show in its numbers, and what was not measured says so."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dermis.authenticity.attack import exposure
from dermis.authenticity.checker import Checker
from dermis.bundle import Bundle, amend_bundle, open_bundle
from dermis.bundle.reference import (
    MINIMUM_GROUP,
    ClassFeatures,
    ClassReference,
    FeatureSpace,
    ReferenceDescription,
    read_features,
    read_reference_files,
    write_reference_folder,
)
from dermis.classifier.onnx_session import Classifier
from dermis.dataset.manifest import DatasetAudit, finalize
from dermis.dataset.plan import plan_for
from dermis.dataset.privacy import examiner
from dermis.dataset.reading import read_samples
from dermis.dataset.request import DatasetRequest
from dermis.dataset.scoring import Synthesize
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.errors import BundleError, DataError
from dermis.privacy.verdict import Outcome, Scope, verdict_of
from dermis.report import content, sample
from dermis.report.appearance import Appearance, appearances
from dermis.report.build import RealImages, build_reference
from dermis.report.features import baseline, compare, statistics_of
from dermis.report.sample import choose, evenly_spaced
from dermis.skin_tone import skin_tone, to_lab, tone_class, typology_angle
from lesions import framed, lesion
from tiny import make_bundle
from tiny_index import make_complete_bundle

SEVEN = ("congruence", "coverage", "constraint", "completeness", "compliance", "comprehension", "consistency")
SIDE = 24
PER_CLASS = 55


def noise(indices: Sequence[int], labels: Sequence[int]) -> Any:
    """Images whose class shows in their colour, and which differ from each other."""
    images = [np.random.default_rng(index).integers(0, 200, (SIDE, SIDE, 3), dtype=np.uint8) for index in indices]
    for image, label in zip(images, labels, strict=True):
        image[..., 0] = np.minimum(image[..., 0] // 2 + 100 * label, 255)
    return np.stack(images)


def constant(indices: Sequence[int], labels: Sequence[int]) -> Any:
    """One image for each class."""
    return noise([5] * len(indices), labels)


def make(
    folder: Path,
    bundle: Bundle,
    paint: Synthesize,
    *,
    reverse: bool = False,
    examined: list[Any] | None = None,
    **request: Any,
) -> dict[str, Any]:
    """Make a dataset, and return its report.

    With `examined`, the images whose features are computed for it are added to that list, and their appearance is not measured.
    """
    wanted = DatasetRequest.model_validate({"model": bundle.name, "shard_size": 25, "image_format": "png", **request})
    planned, store = plan_for(wanted, bundle), Store(folder)
    with Classifier(bundle, device="cpu", threads=1) as classifier, Checker(bundle, device="cpu", threads=1) as checker:
        for shard in sorted(range(planned.shards), reverse=reverse):
            write_shard(
                planned,
                shard,
                paint,
                store,
                score=lambda images: classifier.classify(images).calibrated,
                examine=examiner(planned, checker),
            )
        expose = partial(exposure, checker.index) if planned.gated else None

        def examine(images: Any) -> Any:
            if examined is not None:
                examined.extend(images)
            return checker.nearest(images)

        def nothing(images: Any) -> list[Appearance]:
            return [Appearance((), None)] * len(images)

        measure_images = appearances if examined is None else nothing
        finalize(planned, store, bundle, {}, expose, examine=examine, measure_images=measure_images)
    report: dict[str, Any] = json.loads((folder / "report.json").read_bytes())
    return report


def number(section: dict[str, Any], name: str, class_name: str | None = None) -> Any:
    return next(each for each in section["numbers"] if (each["name"], each["class_name"]) == (name, class_name))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose reference is of images that `noise` paints."""
    root = tmp_path_factory.mktemp("bundles")
    labels = [0] * PER_CLASS + [1] * PER_CLASS
    real = noise(range(10**6, 10**6 + 2 * PER_CLASS), labels)
    opened = make_complete_bundle(root, real)
    assert opened.authenticity is not None
    with Checker(opened, device="cpu", threads=1) as checker:
        features = checker.nearest(real).embeddings
    measured = RealImages([("benign", "malignant")[label] for label in labels], appearances(real), None, features)
    description, statistics = build_reference(measured, resolution=SIDE, index=opened.authenticity.digest)
    write_reference_folder(root / "r", description, statistics)
    return amend_bundle(opened, parts={"reference": root / "r"})


def test_typology_angle_of_known_colours() -> None:
    lab = to_lab(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255]], np.float32))
    expected = [[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.20, -107.86]]  # of CIE and W3C tables
    assert lab == pytest.approx(np.array(expected), abs=0.05)
    assert typology_angle(70, 15) == pytest.approx(53.13, abs=0.01)
    assert typology_angle(50, 20) == 0 and typology_angle(30, 20) == -45
    angles = (56, 55, 42, 41, 29, 28, 11, 10, -29, -30)
    classes = [tone_class(angle) for angle in angles]
    assert classes == ["very light", *["light"] * 2, *["intermediate"] * 2, *["tan"] * 2, *["brown"] * 2, "dark"]


def test_skin_tone_is_that_of_the_skin_and_not_of_lesion_or_frame() -> None:
    skin = np.full((160, 160, 3), (224, 172, 140), np.uint8)
    (lightness, _, yellow), *_ = to_lab(skin[0, :1].astype(np.float32))
    expected = typology_angle(lightness, yellow)
    y, x = np.mgrid[:160, :160] - 80
    with_lesion = np.where((np.hypot(y, x) < 55)[..., None], np.uint8(60), skin)
    for image in (skin, with_lesion, framed(with_lesion, 0.55)):
        assert skin_tone(image) == pytest.approx(expected, abs=0.5)


def test_planted_frames_are_counted_in_their_class(bundle: Bundle, tmp_path: Path) -> None:
    def paint(indices: Sequence[int], labels: Sequence[int]) -> Any:
        pictures = [lesion(index % 3, 96) for index in indices]
        return np.stack([framed(p) if label == 1 else p for p, label in zip(pictures, labels, strict=True)])

    report = make(tmp_path / "d", bundle, paint, classes={"malignant": 4, "benign": 4})
    shares = [number(report["artefacts"], "frame", name)["value"] for name in ("benign", "malignant")]
    assert shares == [0, 1]
    consistency = next(each for each in report["scorecard"] if each["id"] == "consistency")
    assert number(consistency, "difference in frame")["value"] == 1


def test_degenerate_generator_has_less_coverage_and_spread(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE", 6)
    request = {"classes": {"malignant": 50, "benign": 50}, "privacy": {"on_reject": "flag"}}
    varied, again = (make(tmp_path / name, bundle, noise, reverse=name == "b", **request) for name in ("a", "b"))
    alike = make(tmp_path / "c", bundle, constant, **request)
    for name in ("malignant", "benign"):
        good, bad = (report["variety"] for report in (varied, alike))
        assert number(good, "spread", name)["value"] > 0.5 and number(bad, "spread", name)["value"] < 0.01
        assert number(bad, "coverage", name)["value"] <= number(good, "coverage", name)["value"]
        distances = [number(each["fidelity"], "Fréchet distance", name)["value"] for each in (varied, alike)]
        assert distances[0] < distances[1]
    assert varied == again
    for name in ("report.json", "report.html", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert verify(tmp_path / "a").ok
    (tmp_path / "a" / "report.html").write_text("all is well")
    assert verify(tmp_path / "a").changed == ("report.html",)


def test_features_are_computed_of_classes_that_can_be_compared_only(bundle: Bundle, tmp_path: Path) -> None:
    examined: list[Any] = []
    report = make(tmp_path / "d", bundle, noise, examined=examined, classes={"malignant": 3, "benign": 50})
    assert len(examined) == 50 and all(image[..., 0].max() < 100 for image in examined)  # `noise` of class 0
    section = report["fidelity"]
    values = {name: number(section, "Fréchet distance", name)["value"] for name in ("benign", "malignant")}
    assert values["benign"] is not None and values["malignant"] is None
    assert (section["status"], section["images"]) == ("partly measured", 50)
    assert section["reason"].startswith("a class has fewer than 50 images here")


def test_coverage_counts_the_modes_that_are_reached() -> None:
    random = np.random.default_rng(1)
    centres = 10 * random.normal(size=(4, 8))

    def draw(modes: Sequence[int], size: int) -> Any:
        chosen = random.choice(modes, size)
        return (centres[chosen] + random.normal(size=(size, 8))).astype(np.float32)

    statistics, cells, typical = statistics_of(draw(range(4), 800))
    assert min(cells) >= MINIMUM_GROUP and sum(cells) == 800
    samples = baseline(draw(range(4), 300), statistics, cells, typical)
    real = ClassReference(800, None, {}, {}, 0.0, cells, typical, samples)
    whole, half = (compare(draw(modes, 200), statistics, real) for modes in (range(4), range(2)))
    assert whole.coverage.value > 0.85 and whole.coverage.low <= whole.coverage.value <= whole.coverage.high
    assert half.coverage.value == pytest.approx(0.5, abs=0.1)
    assert whole.real_coverage == pytest.approx(whole.coverage.value, abs=0.05)
    assert whole.real_distance is not None and half.distance.low > 2 * whole.real_distance


def test_typical_images_are_compared_with_held_out_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dermis.report.features.REPLICATES", 20)
    random = np.random.default_rng(1)
    training, held_out, generated = (random.normal(size=(n, 64)).astype(np.float32) for n in (3200, 2000, 10_000))
    statistics, cells, typical = statistics_of(training)
    samples = baseline(held_out, statistics, cells, typical)
    real = ClassReference(3200, None, {}, {}, 0.0, cells, typical, samples)
    result = compare(generated, statistics, real)
    assert result.real_typical is not None
    assert result.typical.low < result.real_typical < result.typical.high < 0.95
    assert compare(generated[:100], statistics, replace(real, baseline=())).real_typical is None

    description = ReferenceDescription(SIDE, {"a": real}, (), {}, FeatureSpace("0" * 64, 64))
    write_reference_folder(tmp_path / "r", description, {"a": statistics})
    file = tmp_path / "r" / "reference.json"
    assert read_reference_files(tmp_path / "r")[0].classes["a"].baseline == samples
    document = json.loads(file.read_text())
    for each in document["classes"]["a"]["baseline"]:
        del each["typical"]
    file.write_text(json.dumps(document))
    earlier = read_reference_files(tmp_path / "r")[0].classes["a"]
    assert compare(generated[:100], statistics, earlier).real_typical is None


def test_report_says_what_was_not_measured_and_never_passes_it(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "b")
    wanted = DatasetRequest.model_validate({"model": "tiny", "classes": {"malignant": 2, "benign": 1}})
    planned, store = plan_for(wanted, plain), Store(tmp_path / "d")
    write_shard(planned, 0, noise, store)
    (tmp_path / "d" / "AUDIT.md").write_text("of a run that was killed before it finished")
    finalize(planned, store, plain, {})
    assert verify(tmp_path / "d").ok
    report = json.loads((tmp_path / "d" / "report.json").read_bytes())
    assert tuple(each["id"] for each in report["scorecard"]) == SEVEN
    for name in ("fidelity", "variety", "utility", "privacy"):
        section = report[name]
        assert section["status"] == "not measured" and section["reason"] and section["remedy"]
        assert section["numbers"] and all(each["value"] is None for each in section["numbers"])
    assert report["audit"]["verdict"] == "not measured"
    assert report["artefacts"]["status"] == "partly measured"  # there is nothing to compare them with
    status = {each["id"]: each["status"] for each in report["scorecard"]}
    assert status["congruence"] == status["coverage"] == status["compliance"] == "not measured"
    page = (tmp_path / "d" / "report.html").read_text()
    assert "not measured" in page and not re.search(r">\s*(pass|passed)\b", page)


def _audit_document(outcomes: list[dict[str, Any]], scope: Scope = "bundle") -> dict[str, Any]:
    """The part of privacy_audit.json that a report reads."""
    verdict = verdict_of([Outcome(**each) for each in outcomes], scope)
    return {"format_version": 2, "subject": {"scope": scope}, "verdict": asdict(verdict), "outcomes": outcomes}


@pytest.mark.parametrize("file_format", ["imagefolder", "parquet"])
def test_own_audit_of_a_dataset_replaces_that_of_the_bundle(tmp_path: Path, file_format: str) -> None:
    plain = make_bundle(tmp_path / "b")
    wanted = DatasetRequest.model_validate({"classes": {"malignant": 2, "benign": 1}, "format": file_format})
    planned, store = plan_for(wanted, plain), Store(tmp_path / "d")
    write_shard(planned, 0, noise, store)
    document = _audit_document([{"rule": "epsilon", "status": "fail", "finding": "large"}], "dataset")

    def audit(samples: Iterable[tuple[Any, Any]]) -> DatasetAudit:
        assert [(sample.index, pixels.shape) for sample, pixels in samples] == [(i, (24, 24, 3)) for i in range(3)]
        assert not (tmp_path / "d" / "manifest.json").exists()
        return DatasetAudit(document, "# Audit\n")

    finalize(planned, store, replace(plain, privacy_audit=_audit_document([])), {}, audit=audit)
    report = json.loads((tmp_path / "d" / "report.json").read_bytes())
    assert (report["audit"]["scope"], report["audit"]["verdict"]) == ("dataset", "fail")
    assert "Privacy audit of the dataset: fail." in str(report["scorecard"])
    assert ">Privacy audit of the dataset</h2>" in (tmp_path / "d" / "report.html").read_text()
    assert json.loads((tmp_path / "d" / "privacy_audit.json").read_text()) == document
    assert verify(tmp_path / "d").ok and len(list(read_samples(tmp_path / "d"))) == 3


def test_numbers_of_a_small_gated_dataset_claim_no_more_than_it_can_show(bundle: Bundle, tmp_path: Path) -> None:
    gate = {"gate": "authentic", "on_reject": "flag"}
    report = make(tmp_path / "d", bundle, noise, classes={"malignant": 6, "benign": 6}, privacy=gate)
    numbers = {each["name"]: each for each in report["privacy"]["numbers"]}
    assert {"nearest distance, 25 %", "nearest distance, 75 %"} <= set(numbers)
    assert not {"nearest distance, 1 %", "nearest distance, 95 %"} & set(numbers)  # they need more than 12 images
    assert numbers["AUC of the distance attack"]["reference"] is None
    assert any("counts images as independent" in note for note in report["privacy"]["notes"])
    complete = [numbers["authentic before the gate"], numbers["authentic after the gate"]]
    complete += next(each for each in report["scorecard"] if each["id"] == "completeness")["numbers"]
    assert all(each["value"] is not None and each["low"] is None for each in complete)
    assert not re.search("no real person", (tmp_path / "d" / "README.md").read_text() + json.dumps(report))


def test_page_loads_nothing_and_escapes_all_text(bundle: Bundle, tmp_path: Path) -> None:
    attack = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    hostile = replace(bundle, provenance={**bundle.provenance, "licence": attack, "attribution": attack})
    audit = _audit_document([{"rule": attack, "status": "warn", "finding": attack}])
    report = make(tmp_path / "d", replace(hostile, privacy_audit=audit), noise, classes={"benign": 1})
    assert report["audit"]["verdict"] == "warn" and report["origin"]["licence"] == attack
    page = (tmp_path / "d" / "report.html").read_text()
    tags: list[tuple[str, list[tuple[str, str | None]]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, attrs))  # type: ignore[method-assign]
    parser.feed(page)
    assert not {"script", "img", "link", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    attributes = [(name, value or "") for _, attrs in tags for name, value in attrs]
    assert not any(name in ("src", "style") or name.startswith("on") for name, _ in attributes)
    assert all(value.startswith("#") for name, value in attributes if name == "href")
    assert not re.search(r"url\(|@import|https?://", page) and "&lt;script&gt;" in page


def test_reference_holds_groups_only_and_is_refused_when_changed(bundle: Bundle, tmp_path: Path) -> None:
    reference = bundle.reference
    assert reference is not None and reference.space is not None
    assert not reference.suppressed
    for of_class in reference.classes.values():
        assert all(count >= MINIMUM_GROUP for count in of_class.cells)
        assert all(count % 5 == 0 for count in (*of_class.artefacts.values(), *of_class.skin_tones.values()))
    dim = reference.space.dim
    floats = sum(dim + dim * (dim + 1) // 2 + len(each.cells) * dim for each in reference.classes.values())
    size = reference.files["statistics.safetensors"].bytes
    assert 4 * floats <= size <= 4 * floats + 1000  # nothing else is in it
    path = Path(bundle.location) / "reference" / "statistics.safetensors"
    original = path.read_bytes()
    try:
        path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"statistics\.safetensors: differs"):
            open_bundle(bundle.location)
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typical_distance": None}, "typical_distance"),
        ({"cells": (MINIMUM_GROUP - 1,)}, "cells"),
        ({"artefacts": {"hair": -5}}, "artefacts"),
    ],
)
def test_reference_that_cannot_be_compared_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    description, features = statistics_for_test(8)
    of_class = replace(description.classes["a"], **change)
    with pytest.raises(BundleError, match=rf"reference\.json: classes\.a\.{message}"):
        write_reference_folder(tmp_path / "r", replace(description, classes={"a": of_class}), features)


def test_reference_without_variance_is_refused(tmp_path: Path) -> None:
    description, features = statistics_for_test(8)
    flat = {"a": replace(features["a"], covariance=np.zeros_like(features["a"].covariance))}
    written = write_reference_folder(tmp_path / "r", description, flat)
    with pytest.raises(BundleError, match=r"statistics\.safetensors: 0\.covariance"):
        read_features(tmp_path / "r", written)


def test_reference_of_more_dimensions_than_the_index_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    copy = open_bundle(shutil.copytree(bundle.location, tmp_path / "b"))
    assert copy.authenticity is not None
    description, features = statistics_for_test(copy.authenticity.dim + 1)
    space = replace(description.space, index=copy.authenticity.digest)  # type: ignore[type-var]
    write_reference_folder(tmp_path / "r", replace(description, space=space), features)
    with pytest.raises(BundleError, match=r"reference/reference\.json: space\.dim"):
        amend_bundle(copy, parts={"reference": tmp_path / "r"})


def statistics_for_test(dim: int) -> tuple[ReferenceDescription, dict[str, ClassFeatures]]:
    """Statistics of 60 random vectors of one class."""
    values = np.random.default_rng(0).normal(size=(60, dim)).astype(np.float32)
    features, cells, typical = statistics_of(values)
    of_class = ClassReference(60, None, {"hair": 0}, {}, 0.0, cells, typical)
    description = ReferenceDescription(SIDE, {"a": of_class}, (), {}, FeatureSpace("0" * 64, dim))
    return description, {"a": features}


def test_no_skin_tone_of_fewer_than_50_images_is_stored() -> None:
    skin, no_skin = Appearance((), 58.0), Appearance((), None)
    for visible in (MINIMUM_GROUP - 1, MINIMUM_GROUP):
        pictures = [skin] * visible + [no_skin] * 20
        description, _ = build_reference(RealImages(["a"] * len(pictures), pictures), resolution=64, index=None)
        of_class = description.classes["a"]
        assert (sum(of_class.skin_tones.values()) > 0) == (visible == MINIMUM_GROUP)
        assert (of_class.skin_tone_median != 0) == (visible == MINIMUM_GROUP)


def test_report_has_no_number_that_is_not_finite(bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.classifier is not None
    at = {"value": "nan"}
    tests = {"test": {"at_thresholds": {"x": {"sensitivity": at, "specificity": at}}}, "default_threshold": "x"}
    hostile = replace(bundle, classifier=replace(bundle.classifier, metrics=tests))
    make(tmp_path / "d", hostile, noise, classes={"benign": 2, "malignant": 2})
    text = (tmp_path / "d" / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in report.json"))


def test_small_classes_have_no_statistics() -> None:
    pictures = appearances([lesion(seed, 64) for seed in range(2)]) * 30
    real = RealImages(["many"] * 50 + ["few"] * 10, pictures)
    description, features = build_reference(real, resolution=64, index=None)
    assert tuple(description.classes) == ("many",) and description.suppressed == ("few",) and not features
    with pytest.raises(DataError, match="at least 50"):
        build_reference(RealImages(["few"] * 49, pictures[:49]), resolution=64, index=None)


def test_statistics_need_patients_and_not_only_images() -> None:
    tone = Appearance((), 40.0)

    def build(patients: list[str], features: Any = None, held_out: RealImages | None = None) -> Any:
        real = RealImages(["a"] * len(patients), [tone] * len(patients), patients, features)
        return build_reference(real, resolution=64, index=None if features is None else "0" * 64, held_out=held_out)

    with pytest.raises(DataError, match="at least 50 patients"):
        build(["patient p"] * 60)
    assert build([""] * 60)[0].classes["a"].images == 60, "nothing says that these are of one patient"
    # Two modes of the features: 160 images of 160 patients, and 240 images of 40 others.
    many, few = [f"p{i}" for i in range(160)], [f"q{i % 40}" for i in range(240)]
    random = np.random.default_rng(0)
    features = random.normal(size=(400, 4)) + np.repeat([[0.0], [50.0]], [160, 240], axis=0)
    held_out = RealImages(["a"] * 60, (), ["patient h"] * 60, random.normal(size=(60, 4)).astype(np.float32))
    of_class = build(many + few, features.astype(np.float32), held_out)[0].classes["a"]
    assert of_class.cells == (400,), "the mode with 40 patients is no cell of its own"
    assert of_class.baseline == (), "the held-out images are of one patient"
    seen = RealImages(["a"] * 120, [tone] * 60 + [Appearance((), None)] * 60, ["p"] * 60 + [""] * 60)
    assert build_reference(seen, resolution=64, index=None)[0].classes["a"].skin_tone_median == 0


def test_sample_is_evenly_spaced_and_includes_every_class() -> None:
    assert evenly_spaced(10, 5) == [1, 3, 5, 7, 9] and evenly_spaced(3, 5) == [0, 1, 2] and evenly_spaced(0, 5) == []
    samples: dict[str, list[Any]] = {"rare": list(range(2)), "common": list(range(1000)), "none": []}
    chosen = choose(samples, 100)
    assert [len(each) for each in chosen.values()] == [2, 98, 0]


def test_report_shows_the_audit_that_a_bundle_holds(tmp_path: Path) -> None:
    held = json.loads((Path("bundles/demo") / "privacy_audit.json").read_bytes())
    shown = content.report_audit(held)
    assert shown.verdict == held["verdict"]["status"]
    assert [rule.id for rule in shown.rules] == [outcome["rule"] for outcome in held["outcomes"]]
    for damaged in (None, {}, {"verdict": "pass"}, {"verdict": {"status": "fine"}}):
        assert content.report_audit(damaged).verdict == "not measured"
    assert content.report_audit({"verdict": {"status": "pass"}, "outcomes": "x"}).rules == ()
    passed = [{**outcome, "status": "pass"} for outcome in held["outcomes"]]
    passing = {**held, "outcomes": passed, "verdict": {"status": "pass", "complete": True, "text": ""}}
    assert content.report_audit(passing).verdict == "pass"
    for change in (
        {"format_version": 1},
        {"format_version": 3},
        {"outcomes": []},
        {"outcomes": [{**passed[0], "status": "fail"}, *passed[1:]]},
        {"outcomes": [*passed, passed[0]]},
    ):
        assert content.report_audit({**passing, **change}).verdict == "not measured"
    failed = [{**outcome, "status": "fail"} for outcome in held["outcomes"]]
    former = {**passing, "format_version": 1, "outcomes": failed, "verdict": {**passing["verdict"], "status": "fail"}}
    assert content.report_audit(former).verdict == "fail", "a fail is not hidden"
