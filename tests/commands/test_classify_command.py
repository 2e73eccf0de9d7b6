"""Tests of `dermis classify`: the scores of files are those of the library."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from commands import classify
from commands.main import app
from dermis.bundle import amend_bundle
from dermis.bundle.classifier import NOTICE
from dermis.classifier.onnx_session import Classifier
from dermis.errors import BundleError, DermisError
from dermis.image_reading import read_image
from pictures import BAD, picture, with_exif
from tiny import make_bundle
from tiny_classifier import make_classifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in three formats, and a file that is not an image."""
    images = tmp_path / "images"
    (images / "deeper").mkdir(parents=True)
    (images / "a.png").write_bytes(picture())
    (images / "b.JPG").write_bytes(with_exif(6))
    (images / "c.webp").write_bytes(picture("WEBP"))
    (images / "deeper" / "a.jpeg").write_bytes(picture("JPEG", "L"))
    (images / "notes.txt").write_text("no image")
    make_classifier(tmp_path / "c")
    return images


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["classify", *map(str, arguments)])


def test_folder_of_images_is_scored_into_csv_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classify, "_CHUNK", 3)
    done = run(folder, "--classifier", folder.parent / "c", "--out", folder.parent / "out" / "scores.csv")
    assert done.exit_code == 0, done.output
    assert NOTICE in done.stderr and done.stdout == ""
    rows = list(csv.DictReader((folder.parent / "out" / "scores.csv").open()))
    files = [folder / name for name in ("a.png", "b.JPG", "c.webp", "deeper/a.jpeg")]
    with Classifier(folder.parent / "c", threads=1) as classifier:
        scores = classifier.classify([read_image(file.read_bytes()) for file in files])
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [float(row["probability"]) for row in rows] == scores.probabilities.tolist()
    assert [float(row["calibrated"]) for row in rows] == scores.calibrated.tolist()
    assert [row["class"] for row in rows] == ["malignant" if c >= 0.5 else "benign" for c in scores.calibrated]
    assert sorted(path.name for path in (folder.parent / "out").iterdir()) == ["scores.csv"]


def test_classifier_of_bundle_scores_files_as_json_and_csv(folder: Path, tmp_path: Path) -> None:
    amend_bundle(make_bundle(tmp_path / "b"), parts={"classifier": tmp_path / "c"})
    out = tmp_path / "scores.json"
    done = run(folder / "a.png", "--classifier", tmp_path / "b", "--out", out, "--threshold", "sensitivity_90")
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text())
    assert document["threshold"] == {"name": "sensitivity_90", "value": 0.25}
    assert document["notice"] == NOTICE
    printed = run(folder / "a.png", folder / "a.png", "--classifier", tmp_path / "b", "--threshold", "0.001")
    (row,) = csv.DictReader(io.StringIO(printed.stdout))  # a file named twice counts once
    assert float(row["calibrated"]) == document["data"][0]["calibrated"]
    assert row["class"] == "malignant"


def test_unreadable_images_are_named_and_others_scored(folder: Path, tmp_path: Path) -> None:
    (folder / "bad.png").write_bytes(BAD["PNG of 60,000 px"][0]())
    (folder / "empty.jpg").write_bytes(b"")
    done = run(folder, tmp_path / "nowhere.png", "--classifier", tmp_path / "c", "--out", tmp_path / "s.csv")
    assert isinstance(done.exception, DermisError) and "3 of 7 images" in str(done.exception)
    assert f"{folder / 'bad.png'}: is 60,000 x 60,000 px" in done.stderr
    assert f"{folder / 'empty.jpg'}: is empty" in done.stderr
    assert f"{tmp_path / 'nowhere.png'}: No such file" in done.stderr
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 4


def test_invalid_arguments_are_refused_before_writing(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    make_bundle(tmp_path / "plain")
    cases: list[tuple[tuple[str | Path, ...], str]] = [
        ((folder, "--classifier", tmp_path / "c", "--out", tmp_path / "s.txt"), "must end in .csv or .json"),
        ((folder, "--classifier", tmp_path / "c", "--threshold", "best"), "default, sensitivity_90"),
        ((folder, "--classifier", tmp_path / "c", "--threshold", "2"), "from 0 to 1"),
        ((folder, "--classifier", tmp_path / "c", "--device", "tpu"), "device"),
        ((empty, "--classifier", tmp_path / "c"), "has no images"),
        ((folder, "--classifier", empty), "classifier.json is missing"),
        ((folder, "--classifier", tmp_path / "plain"), "has no classifier"),
    ]
    for arguments, words in cases:
        done = run(*arguments)
        assert isinstance(done.exception, DermisError) and words in str(done.exception), (arguments, done.exception)
    assert isinstance(run(folder, "--classifier", tmp_path / "plain").exception, BundleError)
    assert not list(tmp_path.glob("s.*"))
