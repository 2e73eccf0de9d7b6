"""Tests of classifier folders: incomplete ones are refused, in a bundle or alone, and scores depend only on the image."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import amend_bundle, open_bundle
from dermis.bundle.classifier import NOTICE, InputSpec, open_classifier, write_classifier
from dermis.classifier.onnx_session import Classifier
from dermis.classifier.preprocess import to_input
from dermis.classifier.scores import scores_of
from dermis.errors import BundleError, DermisError, RequestError
from dermis.image_reading import read_training_image
from dermis.imaging import Images, encode
from services.inference import pixels
from tiny import make_bundle
from tiny_classifier import FEATURES, SIZE, describe, make_classifier, make_model


def images(count: int = 5) -> list[Images]:
    """Random images of different sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + 3 * i, 31, 3), dtype=np.uint8) for i in range(count)]


# -- the folder


def test_written_classifier_opens_unchanged(tmp_path: Path) -> None:
    made = make_classifier(tmp_path / "c", metrics={"auc": 0.75})
    opened = open_classifier(tmp_path / "c")
    assert opened == made
    assert (opened.input.size, opened.metrics, set(opened.files)) == (
        SIZE,
        {"auc": 0.75},
        {"classifier.onnx", "CLASSIFIER_CARD.md"},
    )
    assert make_classifier(tmp_path / "d", metrics={"auc": 0.75}).digest == made.digest
    assert make_classifier(tmp_path / "e", temperature=3.0).digest != made.digest


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / "classifier.json").read_text())
    change(document)
    (folder / "classifier.json").write_text(json.dumps(document))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "changed weights": (lambda c: _flip(c / "classifier.onnx"), "classifier.onnx.*SHA-256"),
    "missing card": (lambda c: (c / "CLASSIFIER_CARD.md").unlink(), "CLASSIFIER_CARD.md is missing"),
    "extra file": (lambda c: (c / "weights.pt").write_bytes(b""), "does not list weights.pt"),
    "no descriptor": (lambda c: (c / "classifier.json").unlink(), "classifier.json is missing; is this the folder"),
    "newer format": (lambda c: _rewrite(c, lambda d: d.update(format_version=2)), "install a newer dermis"),
    "NaN": (
        lambda c: _rewrite(c, lambda d: d["metrics"].update(auc=float("nan"))),
        "metrics.auc: must be a finite number",
    ),
    "no temperature": (lambda c: _rewrite(c, lambda d: d.update(temperature=0)), "temperature"),
    "no default": (lambda c: _rewrite(c, lambda d: d["thresholds"].pop("default")), "'default'"),
    "threshold of 2": (lambda c: _rewrite(c, lambda d: d["thresholds"].update(default=2.0)), "thresholds.default"),
    "other label": (lambda c: _rewrite(c, lambda d: d.update(positive_class="benign")), "positive_class"),
    "other pixels": (lambda c: _rewrite(c, lambda d: d["input"].update(interpolation="bicubic")), "interpolation"),
    "model not listed": (lambda c: _rewrite(c, lambda d: d["files"].pop("classifier.onnx")), "does not list"),
    "path out of it": (
        lambda c: _rewrite(c, lambda d: d["files"].update({"../x": {"sha256": "0" * 64, "bytes": 1}})),
        "'../x' is not a file name",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_classifier_is_refused_with_reason(tmp_path: Path, case: str) -> None:
    make_classifier(tmp_path / "c")
    damage, reason = DAMAGE[case]
    damage(tmp_path / "c")
    with pytest.raises(BundleError, match=reason) as caught:
        open_classifier(tmp_path / "c")
    assert str(tmp_path / "c") in str(caught.value)


def test_invalid_classifier_is_not_written(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"class_names": ("malignant", "Malignant"), "positive_class": "Malignant"},
        {"temperature": float("nan")},
        {"thresholds": {}},
        {"input": InputSpec(SIZE, (0.5, 0.5, 0.5), (0.5, 0.0, 0.5))},
        {"metrics": {"auc": float("nan")}},
    ]
    for change in wrong:
        with pytest.raises(BundleError):
            write_classifier(tmp_path / "c", describe(**change), b"onnx", "# card\n")
    assert list(tmp_path.iterdir()) == []


# -- in a bundle


def test_bundle_keeps_attached_classifier_when_amended(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "b")
    assert plain.classifier is None
    description = make_classifier(tmp_path / "c")
    with_it = amend_bundle(plain, parts={"classifier": tmp_path / "c"})
    assert with_it.classifier == description
    assert with_it.digest != plain.digest
    assert with_it.files["generator.safetensors"] == plain.files["generator.safetensors"]
    assert with_it.model_card.startswith("# Tiny\n") and NOTICE in with_it.model_card
    # The section about it stays when the card is replaced, and occurs once.
    again = amend_bundle(with_it, model_card="# New\n", metrics={"kid": 1.0})
    assert again.classifier == description and again.model_card.count(NOTICE) == 1
    other = make_classifier(tmp_path / "d", temperature=3.25)
    replaced = amend_bundle(again, parts={"classifier": tmp_path / "d"})
    assert replaced.classifier == other and replaced.model_card.count(NOTICE) == 1
    assert "3.25" in replaced.model_card and replaced.model_card.startswith("# New\n")
    subject = {"members": 1, "non_members": 1, "generated": 1, "bundle_digest": ""}
    audit = {"subject": subject, "verdict": {"status": "pass", "text": "."}, "outcomes": []}
    assert amend_bundle(replaced, privacy_audit=audit).privacy_audit == audit
    # Another classifier was not attacked by the audit.
    assert amend_bundle(open_bundle(tmp_path / "b"), parts={"classifier": tmp_path / "c"}).privacy_audit is None


def _listed_otherwise(bundle: Path) -> None:
    """A further file of the classifier, which bundle.json lists and classifier.json does not."""
    import hashlib

    (bundle / "classifier" / "more.txt").write_bytes(b"more")
    document = json.loads((bundle / "bundle.json").read_text())
    document["files"]["classifier/more.txt"] = {"sha256": hashlib.sha256(b"more").hexdigest(), "bytes": 4}
    (bundle / "bundle.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: _flip(b / "classifier" / "classifier.onnx"), "classifier/classifier.onnx.*SHA-256"),
        (lambda b: (b / "classifier" / "classifier.json").unlink(), "classifier/classifier.json is missing"),
        (_listed_otherwise, "lists other files"),
    ],
)
def test_bundle_with_damaged_classifier_is_refused(tmp_path: Path, damage: Any, reason: str) -> None:
    make_classifier(tmp_path / "c")
    amend_bundle(make_bundle(tmp_path / "b"), parts={"classifier": tmp_path / "c"})
    damage(tmp_path / "b")
    with pytest.raises(BundleError, match=reason):
        open_bundle(tmp_path / "b")


def test_attach_command_adds_only_valid_classifier(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    description = make_classifier(tmp_path / "c")
    done = CliRunner().invoke(app, ["bundle", "attach-classifier", str(tmp_path / "b"), str(tmp_path / "c")])
    assert done.exit_code == 0 and description.digest in done.output and "warning" not in done.output
    assert CliRunner().invoke(app, ["bundle", "verify", str(tmp_path / "b")]).exit_code == 0
    shown = json.loads(CliRunner().invoke(app, ["bundle", "show", str(tmp_path / "b")]).output)
    assert shown["classifier"]["digest"] == description.digest
    make_classifier(tmp_path / "fine", size=2 * open_bundle(tmp_path / "b").generator.img_resolution)
    finer = CliRunner().invoke(app, ["bundle", "attach-classifier", str(tmp_path / "b"), str(tmp_path / "fine")])
    assert finer.exit_code == 0 and "warning: the classifier's input has" in finer.output
    before = open_bundle(tmp_path / "b").digest
    write_classifier(tmp_path / "bad", describe(), b"no graph", "# Bad\n")
    refused = CliRunner().invoke(app, ["bundle", "attach-classifier", str(tmp_path / "b"), str(tmp_path / "bad")])
    assert isinstance(refused.exception, BundleError) and "is not an ONNX file" in str(refused.exception)
    assert open_bundle(tmp_path / "b").digest == before


# -- pixels


def test_classifier_input_equals_prepared_training_image() -> None:
    for image in images(3):
        assert (to_input(image, SIZE) == read_training_image(encode(image), SIZE)).all()


def test_input_is_centre_crop_and_right_size_is_unchanged() -> None:
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = 200
    assert (to_input(wide, 16) == 200).all()
    assert (to_input(wide, 8)[:, 3:-3] == 200).all()  # the filter reads a few pixels outside of the square
    square_one = images(1)[0][:20, :20]
    assert to_input(square_one, 20) is square_one


# -- scores


def test_scores_depend_only_on_image(tmp_path: Path) -> None:
    make_classifier(tmp_path / "c")
    many = images(9)
    with Classifier(tmp_path / "c", threads=1) as one, Classifier(tmp_path / "c", threads=3) as three:
        alone = [one.classify([image]) for image in many]
        together = three.classify(many)
    assert together.logits.tolist() == [float(scores.logits[0]) for scores in alone]
    assert (together.features == np.concatenate([scores.features for scores in alone])).all()
    assert len({round(logit, 3) for logit in together.logits.tolist()}) == 9  # they do differ


def test_scores_follow_from_the_logits(tmp_path: Path) -> None:
    make_classifier(tmp_path / "c")
    with Classifier(tmp_path / "c", threads=1) as classifier:
        scores = classifier.classify(images())
        assert classifier.logits(np.stack([to_input(image, SIZE) for image in images()])).tolist() == (
            scores.logits.tolist()
        )
        assert scores.features.shape == (5, FEATURES)
        assert classifier.classify([], features=True).features.shape == (0, FEATURES)
        with pytest.raises(ValueError, match="takes uint8"):
            classifier.logits(np.zeros((1, 8, 8, 3), np.uint8))
    expected = 1 / (1 + np.exp(-scores.logits.astype(float) / 2.0))
    assert np.allclose(scores.calibrated, expected, atol=1e-12)


def test_extreme_logits_give_probabilities_without_warnings() -> None:
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        scores = scores_of([-1e4, 0.0, 1e4], 2.0)
    assert scores.probabilities.tolist() == [0.0, 0.5, 1.0]


def test_threshold_is_accepted_by_name_or_number() -> None:
    description = describe()
    assert (description.threshold(), description.threshold("sensitivity_90"), description.threshold(0.125)) == (
        0.5,
        0.25,
        0.125,
    )
    assert (description.class_at(0.25, 0.25), description.class_at(0.2499, 0.25)) == ("malignant", "benign")
    for wrong in ("best", -0.1, 1.5, float("nan")):
        with pytest.raises(RequestError, match="threshold"):
            description.threshold(wrong)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": TensorProto.FLOAT},
        {"outputs": ("features", "score")},
        {"size": 8},
    ],
)
def test_onnx_graph_with_wrong_interface_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    model = make_model(**change)
    write_classifier(tmp_path / "c", describe(), model, "# Card\n")
    with pytest.raises(BundleError, match=r"classifier\.onnx"):
        Classifier(tmp_path / "c")


def test_source_without_classifier_is_refused(tmp_path: Path) -> None:
    plain = make_bundle(tmp_path / "b")
    for source in (plain, tmp_path / "b"):
        with pytest.raises(BundleError, match="attach-classifier"):
            Classifier(source)
    with pytest.raises(BundleError, match=r"classifier\.json is missing"):
        Classifier(tmp_path)
    make_classifier(tmp_path / "c")
    with pytest.raises(DermisError, match="device"):
        Classifier(tmp_path / "c", device="tpu")


def test_running_a_classifier_needs_no_torch(tmp_path: Path) -> None:
    make_classifier(tmp_path / "c")
    amend_bundle(make_bundle(tmp_path / "b"), parts={"classifier": tmp_path / "c"})
    code = "import sys; from dermis.classifier.onnx_session import Classifier; Classifier(sys.argv[1]); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], cwd=Path.cwd()).returncode == 0


# -- between gateway and service


def test_rows_of_several_classifiers_share_a_batch(tmp_path: Path) -> None:
    small, large = make_classifier(tmp_path / "small"), make_classifier(tmp_path / "large", size=24, seed=1)
    length = pixels.row_bytes([small.input.size, large.input.size])
    rng = np.random.default_rng(0)
    inputs = {size: rng.integers(0, 256, (3, size, size, 3), dtype=np.uint8) for size in (SIZE, 24)}
    rows = np.concatenate(
        [
            pixels.pack_rows(small.digest, inputs[SIZE], length),
            pixels.pack_rows("0" * 64, inputs[SIZE][:1], length),
            pixels.pack_rows(large.digest, inputs[24], length),
        ]
    )
    shuffled = rng.permutation(len(rows))
    with Classifier(tmp_path / "small", threads=1) as one, Classifier(tmp_path / "large", threads=1) as other:
        results = pixels.classify_rows({small.digest: one, large.digest: other}, rows[shuffled])
        expected = [*one.logits(inputs[SIZE]).tolist(), None, *other.logits(inputs[24]).tolist()]
    for place, item in zip(shuffled, results, strict=True):
        if place == 3:
            assert isinstance(item, str) and "restart the service" in item
        else:
            assert item == expected[place]
