"""Tests of `dermis evaluate` on a tiny bundle and tiny folders, and of the modules that it uses."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

import dermis.features
from commands.main import app
from dermis.bundle import Bundle, open_bundle
from dermis.errors import DataError, DermisError
from dermis.features import FeatureExtractor
from dermis.imaging import decode
from dermis.report.build import build_reference
from dermis.synthesizer import Synthesizer
from tiny import make_bundle
from training.data.images import ImageDataset
from training.data.isic import load_isic
from training.data.sources import Record
from training.evaluation.evaluation import evaluate_bundle
from training.evaluation.features import labels_in_proportion, real_features
from training.evaluation.holdout import check_holdout, groups_of
from training.evaluation.measure import compare, subset
from training.evaluation.record import discriminator_space, read_metrics
from training.evaluation.reference import measure_real
from training.evaluation.report import write_report
from training.evaluation.sets import load_spaces, parse_noise_modes
from training.evaluation.table import copies, held_out_text, space_tables
from training.gan.card import model_card, renewed_card

LABELS = [0] * 24 + [1] * 12


def _colours(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Means over the 4 quarters of an image, in all channels: a feature space of 12 dimensions."""
    n, side = len(images), images.shape[1] // 2
    return images.reshape(n, 2, side, 2, side, 3).mean(axis=(2, 4)).reshape(n, 12).astype(np.float32)


def _space(identity: str = "quarters/1") -> FeatureExtractor:
    def embed(x):  # type: ignore[no-untyped-def]
        return x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5)).flatten(1)

    return FeatureExtractor("quarters" if identity == "quarters/1" else identity, identity, 12, _colours, embed)


def _folder(out: Path, images: NDArray[np.uint8], labels: Sequence[int], first: int = 0) -> Path:
    """An ISIC-layout folder."""
    out.mkdir()
    rows = ["isic_id,target"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True), start=first):
        Image.fromarray(image).save(out / f"ISIC_{i:07d}.png")
        rows.append(f"ISIC_{i:07d},{label}")
    (out / "metadata.csv").write_text("\n".join(rows) + "\n")
    return out


@pytest.fixture(scope="module")
def generated(tiny_bundle: Bundle) -> NDArray[np.uint8]:
    """Samples of the tiny bundle, of a seed that no test evaluates: real images that the generator was not trained on."""
    with Synthesizer(tiny_bundle, device="cpu") as synthesizer:
        return synthesizer.images([99] * 72, list(range(72)), LABELS * 2)


@pytest.fixture
def folders(tmp_path: Path, generated: NDArray[np.uint8]) -> tuple[Path, Path]:
    return (
        _folder(tmp_path / "data", generated[:36], LABELS),
        _folder(tmp_path / "held", generated[36:], LABELS, first=500),
    )


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_evaluate_command_writes_metrics_card_and_report(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dermis.features.EXTRACTORS, "quarters", lambda device: _space())
    bundle = make_bundle(tmp_path / "bundle")
    data, held = folders
    common = ("--data", data, "--extractor", "quarters", "--cache", tmp_path / "cache", "--device", "cpu")
    output = _run(
        *("--bundle", bundle.location, *common, "--holdout", held, "--count", 60),
        *("--ppl-paths", 40, "--report", tmp_path / "report"),
    )
    metrics = open_bundle(bundle.location).metrics
    assert (list(metrics["spaces"]), metrics["images"], metrics["real_images"]) == (["quarters"], 60, 36)
    assert (metrics["holdout"]["images"], metrics["holdout"]["name"], metrics["noise_mode"]) == (36, "held", "random")
    space = metrics["spaces"]["quarters"]
    assert set(space["comparisons"]) == {"generated_training", "generated_holdout", "training_holdout"}
    of_classes = space["classes"]
    assert {name: parts["generated_holdout"]["images"] for name, parts in of_classes.items()} == {
        "benign": 24,
        "malignant": 12,
    }
    assert all(set(parts) == set(space["comparisons"]) for parts in of_classes.values())
    class_head = space_tables(metrics)[0].class_rows[0]
    assert class_head[1:] == [f"{name}: {what}" for name in of_classes for what in ("generated", "real images instead")]
    class_fd = f"{of_classes['benign']['generated_holdout']['fd']:.4g} ["
    assert space_tables(metrics)[0].class_rows[2][1].startswith(class_fd), "against held-out images where there are any"
    for part in (*space["comparisons"].values(), *(part for parts in of_classes.values() for part in parts.values())):
        assert part["images"] == part["real_images"], "the sets of a comparison are of equal size"
        for name in ("fd", "kid", "mmd"):
            assert part[f"{name}_interval"][0] < part[name] < part[f"{name}_interval"][1]
    assert {part["images"] for part in space["comparisons"].values()} == {36}
    for part in (metrics["ppl"], *metrics["ppl"]["classes"].values()):
        assert 0 < part["end"] != part["full"] > 0
    assert metrics["ppl"]["distance"] == "quarters"
    measured = space["comparisons"]["generated_holdout"]
    assert measured["precision"] > 0.8 < measured["recall"], "real and generated images are of one distribution here"
    assert space["copies"]["memorising"]["p_value"] > 0.01, "and the generator does not copy"
    assert metrics["real_is_training_set"] is False
    card = open_bundle(bundle.location).model_card
    assert card.startswith(bundle.model_card), "parts that training did not write stay"
    against = space["comparisons"]["generated_training"]["fd"]
    assert f"| FD@quarters | {against:.4g} [" in card and "| reference: real images vs held-out" in card
    assert f"FD@quarters │ {against:.4g} [" in re.sub(" +", " ", output)
    assert "Held out: 36 real images (held)" in card and "not known whether the generator was trained on" in card
    assert "is not the set that the bundle names" in output
    assert "Whether it memorises is not known" in re.sub(r"\s+", " ", output)

    page = (tmp_path / "report" / "index.html").read_text()
    pictures = [decode(base64.b64decode(data)) for data in re.findall(r"base64,([^\"]+)", page)]
    shapes = {picture.shape for picture in pictures}
    assert (16, 16 * 6 + 4, 3) in shapes, "a sample, a gap and its 5 neighbours"
    assert (
        len(pictures) == 12 + 8 + 2 + 3
    )  # closest, unselected, samples and interpolations of 2 classes, and between them
    text = re.sub(r"base64,[^\"]+", "", page)  # base64 of a picture can contain any letters
    assert "http:" not in text and "https:" not in text and "url(" not in text, "the page loads no other files"
    assert "This page shows training images" in page
    assert not list(Path(bundle.location).glob("**/*.html"))

    fast = _run("--bundle", bundle.location, *common, "--metrics", "fast")
    metrics = open_bundle(bundle.location).metrics
    assert "ppl" not in metrics
    part = metrics["spaces"]["quarters"]["comparisons"]["generated_training"]
    assert "density" not in part and "mmd" not in part and "fld" not in part
    card = open_bundle(bundle.location).model_card
    assert card.count("## Measured") == 1 and "path length" not in card, "the section is renewed"
    assert metrics["images"] == 36
    assert "path length" not in fast


def test_report_inside_bundle_is_refused(tmp_path: Path, tiny_bundle: Bundle) -> None:
    inside = Path(tiny_bundle.location) / "report"
    with pytest.raises(DermisError, match="lies inside the bundle"):
        _run("--bundle", tiny_bundle.location, "--data", tmp_path, "--report", inside)
    assert not inside.exists()


def _dataset(images: NDArray[np.uint8], labels: Sequence[int] = LABELS, prefix: str = "a") -> ImageDataset:
    ids = tuple(f"{prefix}{i}" for i in range(len(images)))
    return ImageDataset(images, np.array(labels), ("benign", "malignant"), ids, prefix * 64)


@pytest.mark.full
def test_copying_generator_is_detected_and_shown(tiny_bundle: Bundle, generated: NDArray[np.uint8]) -> None:
    """Training images that are samples of the evaluated seed: the test finds them, the page shows them side by side."""
    with Synthesizer(tiny_bundle, device="cpu") as synthesizer:
        images = synthesizer.images([0] * 36, list(range(36)), LABELS, noise_mode="random")
    data, held = _dataset(images), _dataset(generated[36:], prefix="b")
    evaluation = evaluate_bundle(tiny_bundle, data, [_space()], holdout=held, ppl_paths=10, device="cpu", page=True)
    space = evaluation.metrics["spaces"]["quarters"]
    copied, numbers = space["copies"], space["comparisons"]
    assert copied["authenticity"] == 0 and copied["holdout_authenticity"] > 0.2
    assert numbers["generated_training"]["fd"] == pytest.approx(0, abs=1e-3)
    assert copied["memorising"]["p_value"] < 1e-3 and copied["memorising"]["nearer_train"] == 1
    assert copied["membership"]["auc"]["value"] > 0.95 and copied["membership"]["found_at_1_percent"]["value"] > 0.9
    assert numbers["generated_holdout"]["fld_gap"] < 2 * numbers["training_holdout"]["fld_gap"] < 0
    assert json.loads(json.dumps(evaluation.metrics, allow_nan=False)) == evaluation.metrics, (
        "a bundle takes plain JSON only"
    )
    assert evaluation.page is not None
    rows = [decode(base64.b64decode(x)) for x in re.findall(r"<figure><img[^>]*base64,([^\"]+)", evaluation.page)]
    assert len(rows) == 20
    for row in rows:
        assert np.array_equal(row[:, :16], row[:, 20:36])


def _records(ids: Sequence[str], patients: Sequence[str], lesions: Sequence[str]) -> tuple[Record, ...]:
    known = zip(ids, patients, lesions, strict=True)
    return tuple(Record(name, "benign", patient, lesion, None, {}) for name, patient, lesion in known)


@pytest.mark.full
def test_memorising_test_permutes_whole_patients(tiny_bundle: Bundle, generated: NDArray[np.uint8]) -> None:
    """Two patients a set: of 6 ways to call two of four training, even plain copies cannot be surer than 1 in 6."""
    with Synthesizer(tiny_bundle, device="cpu") as synthesizer:
        images = synthesizer.images([0] * 36, list(range(36)), LABELS, noise_mode="random")
    data, held = _dataset(images), _dataset(generated[36:], prefix="b")
    data = replace(data, records=_records(data.ids, ["P1"] * 18 + ["P2"] * 18, [""] * 36))
    held = replace(held, records=_records(held.ids, ["P3"] * 18 + [""] * 18, [""] * 18 + ["L4"] * 18))
    evaluation = evaluate_bundle(tiny_bundle, data, [_space()], holdout=held, selection="fast", device="cpu")
    assert evaluation.metrics["holdout"]["patients"] == 2
    copied = evaluation.metrics["spaces"]["quarters"]["copies"]
    assert copied["memorising"]["p_value"] == pytest.approx(1 / 6, abs=0.03)
    text = json.dumps(evaluation.metrics)
    assert not any(f'"{name}"' in text for name in ("P1", "P3", "L4", "a0", "b0")), "no identifier gets into a bundle"


def test_held_out_images_without_an_id_are_stated_beside_patients(
    tiny_bundle: Bundle, generated: NDArray[np.uint8]
) -> None:
    data, held = _dataset(generated[:36]), _dataset(generated[36:], prefix="b")
    data = replace(data, records=_records(data.ids, ["P1"] * 18 + ["P2"] * 18, [""] * 36))
    held = replace(held, records=_records(held.ids, ["P3"] * 18 + [""] * 18, [""] * 33 + ["L4"] * 3))
    metrics = evaluate_bundle(tiny_bundle, data, [_space()], holdout=held, selection="fast", device="cpu").metrics
    assert (metrics["holdout"]["patients"], metrics["holdout"]["without_ids"]) == (17, 15)
    assert "36 real images of 17 patients or lesions, of which 15 are images without an id" in held_out_text(metrics)
    assert "(17 groups by patient or lesion, of which 15 are images without an id)" in copies(metrics)[0]


def test_reference_counts_known_patients(tiny_bundle: Bundle, generated: NDArray[np.uint8]) -> None:
    data = _dataset(generated, labels=[0] * 72)
    data = replace(data, records=_records(data.ids, ["P1"] * 10 + [""] * 62, [""] * 62 + ["L2"] * 10))
    real, _ = measure_real(tiny_bundle, data, None, "cpu")
    description, _ = build_reference(real, resolution=16, index=None)
    assert description.classes["benign"].patients == 2, "52 images have no id"


def test_holdout_seen_in_training_is_refused(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    data, held = (load_isic(folder, 16) for folder in folders)
    check_holdout(data, held, "0" * 64)
    (tmp_path / "whole").mkdir()
    tables = [(folder / "metadata.csv").read_text().splitlines() for folder in folders]
    (tmp_path / "whole" / "metadata.csv").write_text("\n".join([*tables[0], *tables[1][1:]]) + "\n")
    for folder in folders:
        for file in folder.glob("*.png"):
            (tmp_path / "whole" / file.name).write_bytes(file.read_bytes())
    whole = load_isic(tmp_path / "whole", 16)
    with pytest.raises(DataError, match="was trained on --data and --holdout together"):
        check_holdout(data, held, whole.sha256)
    with pytest.raises(DataError, match="was trained on --holdout, so"):
        check_holdout(data, held, held.sha256)
    (folders[1] / "ISIC_0000500.png").write_bytes((folders[0] / "ISIC_0000003.png").read_bytes())
    with pytest.raises(
        DataError, match="1 of its files are in --data under other names, the first is ISIC_0000500, wh"
    ):
        check_holdout(data, load_isic(folders[1], 16), None)


def test_patient_in_data_and_holdout_is_refused(generated: NDArray[np.uint8]) -> None:
    data, held = _dataset(generated[:36]), _dataset(generated[36:], prefix="b")
    data = replace(data, records=_records(data.ids, ["P1"] * 36, ["L1"] * 36))
    held = replace(held, records=_records(held.ids, ["P1"] * 36, ["L2"] * 36))
    with pytest.raises(DataError, match="--holdout: 1 patients or lesions also have images in --data.*data split"):
        check_holdout(data, held, None)
    assert groups_of(data, replace(held, records=())) is None


def _provenance(**configuration: object) -> dict[str, object]:
    run = {"configuration": {"resolution": 64, "c_dim": 0} | configuration, "hardware": "x", "hours": 1.0}
    dataset = {"name": "d", "images": 2, "classes": {"a": 2}, "sha256": "5" * 64}
    facts = {"dataset": dataset, "training": run | {"augment_p": 0.0}, "kimg": 1.0, "code_version": "0"}
    return facts | {"licence": "x", "attribution": ""}


EARLY = {
    **{"extractor": "lite0", "real_sha256": "5" * 64, "images": 50, "real_images": 60, "seed": 0},
    **{"truncation_psi": 1.0, "fid": 12.0, "kid": 0.1, "kid_std": 0.01},
}
TEST = {"p_value": 5e-4, "nearer_train": 0.9, "expected_nearer_train": 0.8, "permutations": 2000}
HELD = {"images": 20, "patients": 7, "instead_of_generated": {"fid": 3.0, "kid": 0.0}, "test": TEST}


def test_card_lists_measured_and_unmeasured_properties() -> None:
    card = model_card("m", _provenance(projected=True), EARLY)
    assert "| FD@lite0 | 12 |" in card and "| KID@lite0 x 1000 | 100 |" in card, "also from before there were intervals"
    assert "50 generated images" in card and "60 training images were compared" in card
    assert "learnt to score well here" in card and "memorising was not tested" in card
    later = EARLY | {"fid_interval": [11.0, 13.0], "holdout": HELD, "extractor": "inception"}
    card = model_card("m", _provenance(projected=True), later)
    assert "| FID@inception | 12 [11, 13] | 3 |" in card
    assert "It memorises" in card and "20 held-out ones (7 groups by patient or lesion)" in card
    assert "learnt to score well" not in card and "The discriminator did not use this space" in card
    card = model_card("m", _provenance(), later | {"real_sha256": "6" * 64})
    assert "60 real images, which are not the training set," in card
    assert "It memorises" not in card and "Whether it memorises is not known" in card


def test_card_shows_held_out_columns_of_each_space() -> None:
    part = {
        "images": 20,
        "real_images": 20,
        "fd": 5.0,
        "fd_interval": [4.0, 6.0],
        "mmd": 0.002,
        "fld": 1.5,
        "fld_gap": -2.0,
    }
    attack = {
        "auc": {"value": 0.52, "low": 0.5, "high": 0.54},
        "found_at_1_percent": {"value": 0.03, "low": 0.0, "high": 0.05},
    }
    comparisons = {
        "generated_training": {"images": 20, "real_images": 20, "fd": 7.0},
        "generated_holdout": part,
        "training_holdout": part | {"fd": 1.0, "fd_interval": [0.5, 1.5], "fld": 0.0},
    }
    space = {
        "comparisons": comparisons,
        "mmd_kernel": {"bandwidth": 16.25},
        "classes": {"mole": {"generated_holdout": part, "training_holdout": part}},
        "copies": {"memorising": TEST, "membership": attack, "authenticity": 0.7, "holdout_authenticity": 0.8},
    }
    measured = {
        **{"format_version": 2, "real_sha256": "5" * 64, "real_is_training_set": True, "images": 50, "real_images": 60},
        **{"seed": 0, "truncation_psi": 1.0, "noise_mode": "random", "interval_level": 0.95},
        "holdout": {"images": 20, "patients": 7, "name": "held-out.csv", "sha256": "6" * 64},
        "spaces": {"lite0": space | {"trained_discriminator": True}, "clip": space | {"trained_discriminator": False}},
    }
    card = model_card("m", _provenance(projected=True), measured)
    reference = "reference: training images vs held-out images"
    assert card.count(f"| generated vs training images | generated vs held-out images | {reference} |") == 2
    assert "| FD@lite0 | 7 | 5 [4, 6] | 1 [0.5, 1.5] |" in card
    assert "| MMD@lite0 x 1000 (bandwidth 16.2) |  | 2 | 2 |" in card and "| CMMD@clip x 1000" in card
    assert "| FLD@clip, of all images |  | 1.50 | 0.00 |" in card
    assert "| mole: generated | mole: real images instead |" in card
    assert "20 real images of 7 patients or lesions (held-out.csv), sha256 6666666666666666" in card
    assert "The training set does not contain them" in card and "is not recorded" in card
    judged, other = card.index("### Feature space `lite0`"), card.index("### Feature space `clip`")
    assert (
        judged
        < card.index("learnt to score well here")
        < other
        < card.index("The discriminator did not use this space")
    )
    assert "AUC 0.520 [0.500, 0.540]" in card and "finds 3.0% [0.0%, 5.0%] of the training images" in card
    assert "Authenticity 0.700; held-out images instead of generated ones have 0.800." in card
    unknown = model_card("m", _provenance(projected=True), measured | {"real_is_training_set": False})
    assert "they chose nothing" not in unknown and "not known whether the generator was trained on" in unknown


def test_discriminator_space_includes_earlier_projected_training() -> None:
    assert discriminator_space(_provenance(projected=True)) == "lite0"
    assert discriminator_space(_provenance()) == ""
    assert discriminator_space({"training": "by us"}) is None
    provenance = _provenance(projected=False)
    changes = [{"kimg": 5, "before": {"projected": True}, "after": {"projected": False}}]
    run = provenance["training"]
    assert isinstance(run, dict)
    assert discriminator_space(provenance | {"training": run | {"changes": changes}}) == "lite0"


def test_metrics_of_the_first_version_are_read() -> None:
    ppl = {"distance": "lite0", "end": 3.0, "end_error": 0.1, "full": 4.0, "full_error": 0.2, "paths": 20}
    share = {"fid": 9.0, "kid": 0.1, "precision": 0.5, "images": 20, "real_images": 30, "ppl": ppl}
    first = (
        EARLY | share | {"authenticity": 0.7, "extractor_identity": "x", "classes": {"mole": share}, "holdout": HELD}
    )
    read = read_metrics(first)
    space = read["spaces"]["lite0"]
    assert space["comparisons"]["generated_training"]["fd"] == 9.0
    assert space["comparisons"]["holdout_training"] == {"fd": 3.0, "kid": 0.0}
    assert space["classes"]["mole"]["generated_training"]["precision"] == 0.5
    assert (read["holdout"], space["copies"]["memorising"]) == ({"images": 20, "patients": 7}, TEST)
    assert (read["ppl"]["end"], read["ppl"]["classes"]["mole"]["full"]) == (3.0, 4.0)
    assert "fid" not in read and "authenticity" not in read and read["noise_mode"] == "const"
    assert read_metrics(read) == read
    assert read_metrics({"kid": 0.5})["spaces"] == {}
    assert "reference: held-out images vs real images" in model_card("m", _provenance(), first | {"real_sha256": ""})


@pytest.mark.parametrize(
    "provenance", [{}, {"dataset": None, "training": None}, {"dataset": "ours", "training": ["by us"]}]
)
def test_foreign_card_gets_measured_section(provenance: dict[str, object]) -> None:
    section = renewed_card("# Theirs\n", provenance, EARLY)
    assert section.startswith("# Theirs\n\n## Measured\n\n50 generated images") and "not the training set" in section
    assert "does not say whether" in section
    again = renewed_card(section + "\n## Contact\n\nWard 3\n", provenance, EARLY | {"fid": 7.0})
    assert again.count("## Measured") == 1 and "| FD@lite0 | 7 |" in again and "| 12 |" not in again
    assert again.endswith("\n\n## Contact\n\nWard 3\n")
    assert renewed_card(again, provenance, EARLY | {"fid": 7.0}) == again
    marked = section + "\n<!-- classifier: written by dermis -->\n## Classifier\n"
    assert renewed_card(marked, provenance, EARLY) == marked, "the comment before the next section belongs to that one"


def test_failed_report_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DermisError, match="--report: .*file: cannot be written"):
        write_report(tmp_path / "file", "page")

    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path / "report", "page")
    assert not list((tmp_path / "report").iterdir())


def test_evaluation_with_invalid_options_is_refused(tiny_bundle: Bundle, generated: NDArray[np.uint8]) -> None:
    data = _dataset(generated[:36])
    for options, complaint in (
        ({"count": 3}, "--count: 3 images are too few"),
        ({"ppl_paths": 1}, "--ppl-paths: 1 paths are too few"),
        ({"holdout": data}, "--holdout: 36 of its images are also in --data, the first is a0"),
        ({"holdout": _dataset(generated[:5], LABELS[:5], "b")}, "--holdout: 5 images are too few"),
    ):
        with pytest.raises(DataError, match=complaint):
            evaluate_bundle(tiny_bundle, data, [_space()], device="cpu", **options)  # type: ignore[arg-type]
    other = ImageDataset(data.images, data.labels, ("mole", "nevus"), data.ids, data.sha256)
    with pytest.raises(DataError, match="--data: has the classes .*mole"):
        evaluate_bundle(tiny_bundle, other, [_space()], device="cpu")


def test_class_with_few_images_is_not_measured_alone(tiny_bundle: Bundle, generated: NDArray[np.uint8]) -> None:
    labels = [0] * 32 + [1] * 4
    evaluation = evaluate_bundle(
        tiny_bundle, _dataset(generated[:36], labels), [_space()], selection="fast", device="cpu", count=50
    )
    assert list(evaluation.metrics["spaces"]["quarters"]["classes"]) == ["benign"]
    assert evaluation.metrics["images"] == 50
    with pytest.raises(DataError, match="too few"):
        compare(np.zeros((4, 3), np.float32), np.zeros((40, 3), np.float32))


def test_image_is_drawn_once_for_all_feature_spaces(
    tiny_bundle: Bundle, generated: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int]] = []
    images = Synthesizer.images

    def counted(self: Synthesizer, seeds, indices, labels, **options):  # type: ignore[no-untyped-def]
        drawn.extend((options["noise_mode"], index) for index in indices)
        return images(self, seeds, indices, labels, **options)

    monkeypatch.setattr(Synthesizer, "images", counted)
    means = FeatureExtractor("means", "means/1", 3, lambda images: images.mean(axis=(1, 2)).astype(np.float32))
    evaluation = evaluate_bundle(
        *(tiny_bundle, _dataset(generated[:36]), [_space(), means]),
        holdout=_dataset(generated[36:], prefix="b"),
        selection="fast",
        noise_modes=["const", "random"],
        count=20,
        device="cpu",
    )
    assert sorted(drawn) == [(mode, index) for mode in ("const", "random") for index in range(20)]
    assert evaluation.metrics["noise_mode"] == "const" and list(evaluation.metrics["spaces"]) == ["quarters", "means"]
    for space in evaluation.metrics["spaces"].values():
        assert set(space["other_noise"]) == {"random"}
        others = space["other_noise"]["random"]
        assert set(others) == {"generated_training", "generated_holdout"}
        for name, part in others.items():
            assert part["images"] == part["real_images"] == space["comparisons"][name]["images"] == 20
    head = space_tables(evaluation.metrics)[1].rows[0]
    assert head[4:] == ["generated vs real images, random noise", "generated vs held-out images, random noise"]


def test_subset_keeps_class_proportions() -> None:
    labels = np.repeat([0, 1], [80, 20])
    rows = subset(labels, 50)
    assert len(set(rows.tolist())) == 50 and np.bincount(labels[rows]).tolist() == [40, 10]
    assert subset(labels, 100).tolist() == list(range(100))


def test_default_feature_spaces_are_those_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> FeatureExtractor:
        raise ModuleNotFoundError("no package of weights")

    monkeypatch.setattr(
        dermis.features, "EXTRACTORS", {"lite0": lambda device: _space("one"), "lite1": lambda device: _space("two")}
    )
    cpu = torch.device("cpu")
    assert [space.identity for space in load_spaces([], cpu)[0]] == ["one", "two"] and load_spaces([], cpu)[1] == ""
    assert [space.identity for space in load_spaces(["lite1,lite0"], cpu)[0]] == ["two", "one"]
    monkeypatch.setitem(dermis.features.EXTRACTORS, "lite1", missing)
    spaces, remark = load_spaces([], cpu)
    assert [space.identity for space in spaces] == ["one"]
    assert "lite1 cannot be loaded (no package of weights); measuring in one only" in remark
    with pytest.raises(DermisError, match="none of lite0, lite1"):
        load_spaces(["lite9"], cpu)
    with pytest.raises(DermisError, match="--extractor: lite0 is given more than once"):
        load_spaces(["lite0", "lite0"], cpu)
    for modes, complaint in (
        (["white"], "'white' is none of const"),
        (["const", "const"], "const is given more than once"),
    ):
        with pytest.raises(DermisError, match=f"--noise-mode: {complaint}"):
            parse_noise_modes(modes)


def test_training_and_holdout_tables_may_share_folder(
    tmp_path: Path, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dermis.features.EXTRACTORS, "quarters", lambda device: _space())
    bundle, (data, _) = make_bundle(tmp_path / "bundle"), folders
    head, *rows = (data / "metadata.csv").read_text().splitlines()
    for name, part in (("train", rows[::2]), ("held-out", rows[1::2])):
        (tmp_path / f"{name}.csv").write_text("\n".join([head, *part]) + "\n")
    tables = ("--metadata", tmp_path / "train.csv", "--holdout-metadata", tmp_path / "held-out.csv")
    common = ("--bundle", bundle.location, "--data", data, "--extractor", "quarters", "--metrics", "fast")
    _run(*common, *tables, "--cache", tmp_path / "cache", "--device", "cpu")
    metrics = open_bundle(bundle.location).metrics
    assert (metrics["real_images"], metrics["holdout"]["images"], metrics["holdout"]["name"]) == (
        18,
        18,
        "held-out.csv",
    )


def test_real_features_are_cached_by_content_and_space(tmp_path: Path, folders: tuple[Path, Path]) -> None:
    calls = []

    def counting(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        calls.append(len(images))
        return _colours(images)

    def space(identity: str) -> FeatureExtractor:
        return FeatureExtractor("quarters", identity, 12, counting)

    dataset, cache = load_isic(folders[0], 16), tmp_path / "cache"
    first = real_features(dataset, space("one"), cache)
    assert sum(calls) == 36
    np.testing.assert_array_equal(real_features(dataset, space("one"), cache), first)
    assert sum(calls) == 36, "the second time they are read"
    real_features(dataset, space("two"), cache)
    real_features(load_isic(folders[0], 8), space("one"), cache)
    real_features(load_isic(folders[1], 16), space("one"), cache)
    assert sum(calls) == 4 * 36, "other weights, another resolution and other images are computed"
    for file in cache.glob("features-*.npy"):
        file.write_bytes(file.read_bytes()[:200])
    np.testing.assert_array_equal(real_features(dataset, space("one"), cache), first)
    assert sum(calls) == 5 * 36, "a damaged file is computed again"


def test_generated_labels_keep_class_proportions_of_real_images() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    assert np.bincount(labels_in_proportion(labels, 1000)).tolist() == pytest.approx([500, 300, 200], abs=3)
    assert np.array_equal(labels_in_proportion(labels, 100), np.sort(labels))
