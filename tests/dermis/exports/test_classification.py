"""Tests of exports for training and viewing: other libraries read the same images with the same classes."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dermis.errors import RequestError, StorageError
from dermis.exports.classification import write_coco, write_fiftyone, write_yolo
from dermis.exports.output import export_output
from dermis.exports.source import open_source
from dermis.torchvision_compat import import_vision
from painted_dataset import make
from tiny import make_bundle

Run = Callable[..., tuple[int, str, str]]
CLASSES = ["benign", "malignant", "a b.c"]


def test_pycocotools_reads_classes_and_boxes_of_whole_images(painted: Path, tmp_path: Path) -> None:
    coco: Any = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    from PIL import Image

    with export_output(tmp_path / "out") as write:
        assert write_coco(open_source(painted), write) == 20
    read = coco.COCO(tmp_path / "out" / "labels.json")
    assert [each["name"] for each in read.loadCats(read.getCatIds())] == CLASSES
    for annotation in read.loadAnns(read.getAnnIds()):
        (image,) = read.loadImgs(annotation["image_id"])
        with Image.open(tmp_path / "out" / "data" / image["file_name"]) as picture:
            index, label, _ = np.asarray(picture)[3, 4].tolist()
        assert image["file_name"] == f"SYN_{index:08d}.png" and annotation["category_id"] == label + 1
        assert annotation["bbox"] == [0, 0, image["width"], image["height"]] == [0, 0, 8, 8]
    notice = (tmp_path / "out" / "README.md").read_text()
    assert "Synthetic" in notice and open_source(painted).digest in notice


def test_fiftyone_labels_name_every_image(painted: Path, tmp_path: Path) -> None:
    with export_output(tmp_path / "out") as write:
        assert write_fiftyone(open_source(painted), write) == 20
    document = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert document["classes"] == CLASSES
    assert {path.stem for path in (tmp_path / "out" / "data").iterdir()} == document["labels"].keys()
    expected = {sample.name: sample.label for sample in open_source(painted).samples()}
    assert document["labels"] == expected and len(expected) == 20


def test_yolo_has_every_class_in_both_parts_and_each_image_once(painted: Path, tmp_path: Path) -> None:
    ImageFolder = import_vision("torchvision.datasets").ImageFolder

    with export_output(tmp_path / "out") as write:
        assert write_yolo(open_source(painted), write, 0.2) == 20
    seen = []
    for part, count in (("train", {"malignant": 9, "a b.c": 7}), ("val", {"malignant": 2, "a b.c": 2})):
        folder = ImageFolder(tmp_path / "out" / part)
        assert folder.classes == sorted(count)
        for picture, target in folder:
            index, label, _ = np.asarray(picture)[0, 0].tolist()
            assert CLASSES[label] == folder.classes[target]
            seen.append(index)
        assert {name: folder.targets.count(folder.class_to_idx[name]) for name in count} == count
    assert sorted(seen) == list(range(20))


def test_a_class_of_one_image_cannot_be_divided(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    make(tmp_path / "set", bundle, classes={"benign": 1, "malignant": 2})
    source = open_source(tmp_path / "set")
    with pytest.raises(RequestError, match="only one image of benign"), export_output(tmp_path / "out") as write:
        write_yolo(source, write, 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "set"]
    with export_output(tmp_path / "out") as write:
        assert write_yolo(source, write, 0) == 3
    assert not (tmp_path / "out" / "val").exists()


def test_a_zip_is_reproducible_and_nothing_is_replaced(painted: Path, tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        with export_output(tmp_path / name) as write:
            write_coco(open_source(painted), write)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert len(archive.namelist()) == 22
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name in ("a.zip", "full"):
        with pytest.raises(StorageError, match="exists already"), export_output(tmp_path / name):
            pass
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_export_commands(run: Run, painted: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed")
    status, out, _ = run("export", "dicom", painted, "--out", tmp_path / "dicom.zip")
    assert (status, out) == (0, f"{tmp_path / 'dicom.zip'}: 20 images as DICOM\n")
    status, _, err = run("export", "dicom", painted)
    assert status == 1 and "give either --out or --to" in err
    status, _, err = run("export", "yolo", tmp_path, "--out", tmp_path / "yolo")
    assert status == 1 and "manifest.json" in err and not (tmp_path / "yolo").exists()
    arguments = (
        "export",
        "croissant",
        painted,
        "--url",
        "https://example.org/set",
        "--out",
        tmp_path / "croissant.json",
    )
    status, _, err = run(*arguments, "--date", "2026-13-01")
    assert status == 1 and "YYYY-MM-DD" in err and not (tmp_path / "croissant.json").exists()
    assert run(*arguments, "--date", "2026-12-01")[0] == 0
    document = json.loads((tmp_path / "croissant.json").read_text())
    assert (document.pop("url"), document.pop("datePublished")) == ("https://example.org/set", "2026-12-01")
    assert document == json.loads((painted / "croissant.json").read_text())
    status, _, err = run(*arguments[:-1], painted / "croissant.json", "--date", "2026-12-01")
    assert status == 1 and "exists already" in err
    status, _, err = run(*arguments[:-1], tmp_path / "new.json", "--date", "20261201")
    assert status == 1 and "YYYY-MM-DD" in err
    changed = shutil.copytree(painted, tmp_path / "changed")
    (changed / "croissant.json").write_text(json.dumps(document | {"license": "mine"}))
    status, _, err = run(*arguments[:2], changed, *arguments[3:-1], tmp_path / "new.json", "--date", "2026-12-01")
    assert status == 1 and "differs from manifest.json" in err and not (tmp_path / "new.json").exists()
