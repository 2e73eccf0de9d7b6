"""Tests of data: all layouts give the same source; the official loader reads a prepared zip, which is complete or absent."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from commands.main import app
from dermis.errors import DataError
from dermis.skin_tone import tone_class
from training.data import images as images_room
from training.data import prepare as prepare_room
from training.data.diagnoses import is_melanoma
from training.data.images import load_images
from training.data.prepare import prepare
from training.data.sources import Record, Source, read_source
from training.data.tables import read_table

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
NAMES = ("ISIC_1", "ISIC_2", "ISIC_3", "ISIC_4")


def _jpeg(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(path, quality=90)


def _folder(path: Path, table: str, name: str = "metadata.csv", images: tuple[str, ...] = NAMES) -> Path:
    for i, image in enumerate(images):
        _jpeg(path / "images" / f"{image}.jpg", i)
    (path / name).write_text(table)
    return path


def _classes(source: Source) -> dict[str, str]:
    return {record.id: record.class_name for record in source.records}


GROUND_TRUTH_2019 = (
    "image,MEL,NV,BCC,UNK\n" + "ISIC_3,0.0,0.0,1.0,0.0\nISIC_1,1.0,0.0,0.0,0.0\nISIC_2,0,1,0,0\nISIC_4,0,0,0,1\n"
)
TABLES = {
    "2019": (
        GROUND_TRUTH_2019,
        {"ISIC_1": "mel", "ISIC_2": "nv", "ISIC_3": "bcc", "ISIC_4": "unk"},
        {"ISIC_1": "malignant", "ISIC_2": "benign", "ISIC_3": "benign", "ISIC_4": ""},
    ),
    "2020": (
        "image_name,patient_id,sex,diagnosis,benign_malignant,target\nISIC_1,IP_1,male,melanoma,malignant,1\n"
        "ISIC_2,IP_1,,nevus,benign,0\nISIC_3,IP_2,,unknown,benign,0\nISIC_4,IP_2,,unknown,benign,0\n",
        {"ISIC_1": "malignant", "ISIC_2": "benign", "ISIC_3": "benign", "ISIC_4": "benign"},
        {"ISIC_1": "malignant", "ISIC_2": "benign", "ISIC_3": "benign", "ISIC_4": "benign"},
    ),
    "HAM10000": (
        "lesion_id,image_id,dx,age,localization\nHAM_1,ISIC_1,mel,50.0,back\nHAM_1,ISIC_2,mel,50.0,back\n"
        "HAM_2,ISIC_3,bcc,,unknown\nHAM_3,ISIC_4,nv,5.0,foot\n",
        {"ISIC_1": "mel", "ISIC_2": "mel", "ISIC_3": "bcc", "ISIC_4": "nv"},
        {"ISIC_1": "malignant", "ISIC_2": "malignant", "ISIC_3": "benign", "ISIC_4": "benign"},
    ),
    "archive": (
        "isic_id,attribution,copyright_license,diagnosis_1,diagnosis_2,diagnosis_3,patient_id\n"
        'ISIC_1,A,CC-0,Malignant,Malignant melanocytic proliferations (Melanoma),"Melanoma, NOS",IP_1\n'
        "ISIC_2,A,CC-0,Malignant,Malignant epidermal proliferations,Basal cell carcinoma,IP_1\n"
        "ISIC_3,A,CC-0,Malignant,,,IP_1\nISIC_4,A,CC-0,Benign,,,\n",
        {"ISIC_1": "Malignant", "ISIC_2": "Malignant", "ISIC_3": "Malignant", "ISIC_4": "Benign"},
        {"ISIC_1": "malignant", "ISIC_2": "benign", "ISIC_3": "", "ISIC_4": "benign"},
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_of_each_isic_challenge_is_read(tmp_path: Path, name: str) -> None:
    table, classes, binary = TABLES[name]
    folder = _folder(tmp_path, table, f"ISIC_{name}_GroundTruth.csv")
    source = read_source(folder)
    assert [record.id for record in source.records] == list(NAMES), "records must come in the order of their ids"
    assert _classes(source) == classes
    assert source.class_names == tuple(sorted(set(classes.values())))
    assert _classes(read_source(folder, binary=True)) == binary
    data = (folder / "images" / "ISIC_2.jpg").read_bytes()
    assert source.records[1].read_bytes() == data


def test_metadata_beside_the_ground_truth_of_2019_is_joined(tmp_path: Path) -> None:
    folder = _folder(tmp_path, GROUND_TRUTH_2019, "ISIC_2019_Training_GroundTruth.csv")
    (folder / "ISIC_2019_Training_Metadata.csv").write_text(
        "image,age_approx,lesion_id,sex\nISIC_2,30,L_2,male\nISIC_1,55,L_1,\nISIC_3,,,\n"
    )
    first, second, _, fourth = read_source(folder).records
    assert (first.lesion_id, first.row["age_approx"], first.row["MEL"]) == ("L_1", "55", "1.0")
    assert (second.lesion_id, second.row["sex"]) == ("L_2", "male")
    assert (fourth.lesion_id, fourth.row["age_approx"]) == ("", "")


def test_unknown_patient_ids_are_read_as_empty(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("isic_id,patient_id,lesion_id,target\na,NA,unknown,0\nb, IP_1 ,nan,1\n")
    a, b = read_source(tmp_path / "t.csv").records
    assert (a.patient_id, a.lesion_id, b.patient_id, b.lesion_id) == ("", "", "IP_1", "")
    with pytest.raises(DataError, match="a: has no image file"):
        a.read_bytes()


@pytest.mark.parametrize(
    ("value", "melanoma"),
    [
        ("mel", True),
        ("MEL", True),
        ("1.0", True),
        ("malignant", True),
        ("Melanoma in situ", True),
        ("melanoma metastasis", True),
        ("nevus", False),
        ("non-melanoma skin cancer", False),
        ("Atypical melanocytic proliferation", False),
        ("melanocytoma", False),
        ("0", False),
    ],
)
def test_melanoma_wordings_are_recognised(value: str, melanoma: bool) -> None:
    assert is_melanoma(value) is melanoma


def test_image_folder_has_a_class_for_each_sub_folder(tmp_path: Path) -> None:
    for i, place in enumerate(("nv/a.jpg", "nv/deep/b.jpg", "mel/c.jpg")):
        _jpeg(tmp_path / place, i)
    source = read_source(tmp_path)
    assert (source.layout, _classes(source)) == ("imagefolder", {"a": "nv", "b": "nv", "c": "mel"})
    assert _classes(read_source(tmp_path, binary=True)) == {"a": "benign", "b": "benign", "c": "malignant"}
    _jpeg(tmp_path / "mel" / "a.jpg", 3)
    assert sorted(_classes(read_source(tmp_path))) == ["mel/a", "mel/c", "nv/a", "nv/deep/b"]
    part = tmp_path / "part.csv"
    part.write_text("image,class\nmel/a,mel\nnv/a,nv\n")
    assert _classes(read_source(tmp_path, metadata=part)) == {"mel/a": "mel", "nv/a": "nv"}


def _stylegan_zip(path: Path, labels: object, count: int = 3) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (i, 2 * i, 3)).save(buffer, "png")
            archive.writestr(f"00000/img{i:08d}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def test_official_zip_and_its_unpacked_folder_read_alike(tmp_path: Path) -> None:
    labels = [["00000/img00000002.png", 0], ["00000/img00000000.png", 2], ["00000/img00000001.png", 0]]
    file = _stylegan_zip(tmp_path / "set.zip", labels)
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path / "set")
    from_zip, from_folder = (load_images(read_source(path), 8, progress=False) for path in (file, tmp_path / "set"))
    assert from_zip.labels.tolist() == [2, 0, 0]
    assert from_zip.class_names == ("0", "1", "2"), "label 1 has no image, but keeps its number"
    assert from_zip.images[:, 0, 0].tolist() == [[0, 0, 3], [1, 2, 3], [2, 4, 3]]
    assert from_folder.sha256 == from_zip.sha256
    assert np.array_equal(from_folder.images, from_zip.images)


def test_zip_without_labels_trains_as_one_class(tmp_path: Path) -> None:
    source = read_source(_stylegan_zip(tmp_path / "set.zip", None))
    assert source.class_names == ()
    assert load_images(source, 8, progress=False).class_names == ("unlabelled",)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["00000/img00000009.png", 0]], "img00000009"),
        ([["00000/img00000000.png", 0.5]], "img00000000"),
        ([["00000/img00000000.png", [1, 1]]], "img00000000"),
        ([["00000/img00000000.png", [0.3, 0.7]]], "img00000000"),
        ("no", "dataset.json"),
        ([["00000/img00000000.png", 0]], "no class, the first is 00000/img00000001|rows have no class"),
    ],
)
def test_zips_with_wrong_labels_are_refused(tmp_path: Path, labels: object, message: str) -> None:
    file = _stylegan_zip(tmp_path / "set.zip", labels)
    with pytest.raises(DataError, match=message):
        load_images(read_source(file), 8, progress=False)


def _two_tables(folder: Path) -> None:
    (folder / "metadata.csv").rename(folder / "a.csv")
    (folder / "b.csv").write_bytes((folder / "a.csv").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: _jpeg(folder / "masks" / "ISIC_1.png", 0), "ISIC_1 is two images"),
        (
            lambda folder: (folder / "metadata.csv").write_text("isic_id,target\nISIC_1,0\nISIC_1,1\n"),
            "ISIC_1 is in more",
        ),
        (lambda folder: (folder / "metadata.csv").write_text("isic_id,target\n"), "no rows"),
        (lambda folder: (folder / "metadata.csv").write_text("isic_id,MEL,NV\nISIC_1,1,1\n"), "row 2"),
        (lambda folder: (folder / "metadata.csv").write_text("isic_id,MEL,NV\nISIC_1,x,1\n"), "MEL"),
        (lambda folder: (folder / "metadata.csv").write_text("isic_id,size\nISIC_1,9\n"), "--class-column"),
        (lambda folder: (folder / "metadata.csv").write_bytes(b"\xff\xfe\x00"), "not a readable CSV"),
        (_two_tables, "--metadata"),
        (lambda folder: (folder / "metadata.csv").unlink(), "metadata.csv"),
    ],
)
def test_unreadable_folders_are_refused_with_reason(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    _folder(tmp_path, TABLES["2020"][0])
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        load_images(read_source(tmp_path), 8, progress=False)


def test_class_column_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(TABLES["2020"][0])
    assert read_table(file, "diagnosis").classes == ("melanoma", "nevus", "unknown", "unknown")
    assert read_table(file, "diagnosis", binary=True).classes == ("malignant", "benign", "", "")
    with pytest.raises(DataError, match="no column dx"):
        read_table(file, "dx")
    file.write_text("isic_id,benign_malignant\na,malignant\n")
    with pytest.raises(DataError, match="no known column with a diagnosis"):
        read_table(file, binary=True)


def _prepare(*folders: Path, out: Path, **options: object) -> bytes:
    prepare([read_source(folder) for folder in folders], out, 16, progress=False, **options)  # type: ignore[arg-type]
    assert not out.with_name(f"{out.name}.partial").exists()
    return out.read_bytes()


def test_prepared_zip_has_official_layout_and_metadata(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "ham", TABLES["HAM10000"][0])
    _prepare(folder, out=tmp_path / "set.zip", licence="CC-BY-NC-4.0", attribution="Tschandl")
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        images = sorted(name for name in archive.namelist() if name.endswith(".png"))
        labels = json.loads(archive.read("dataset.json"))["labels"]
        rows = list(csv.DictReader(io.StringIO(archive.read("metadata.csv").decode())))
        card = archive.read("README.md").decode()
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    assert images == [f"00000/img{i:08d}.png" for i in range(4)]
    assert labels == [[images[0], 1], [images[1], 1], [images[2], 0], [images[3], 2]]
    assert tone_class(float(rows[2].pop("ita"))) == rows[2].pop("ita_class")
    assert rows[2] == {
        "file_name": images[2],
        "isic_id": "ISIC_3",
        "class": "bcc",
        "label": "0",
        "patient_id": "",
        "lesion_id": "HAM_2",
        "diagnosis": "bcc",
        "age_approx": "",
        "sex": "",
        "anatom_site": "",
        "skin_type": "",
        "source": "ham",
    }
    assert "| ham | 4 | 1 | 2 | 1 |" in card
    assert "CC-BY-NC-4.0" in card
    assert "Tschandl" in card


def test_prepared_zip_gives_same_training_data_as_folder(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set", TABLES["HAM10000"][0])
    prepared = prepare([read_source(folder)], tmp_path / "set.zip", 16, progress=False)
    from_folder = load_images(read_source(folder), 16, progress=False)
    from_zip = load_images(read_source(tmp_path / "set.zip"), 16, progress=False)
    assert np.array_equal(from_zip.images, from_folder.images)
    assert (from_zip.ids, from_zip.class_names) == (from_folder.ids, from_folder.class_names)
    assert from_zip.labels.tolist() == from_folder.labels.tolist()
    assert from_zip.sha256 == prepared.sha256
    part = tmp_path / "part.csv"
    part.write_text("isic_id\nISIC_4\nISIC_1\n")
    selected = load_images(read_source(tmp_path / "set.zip", metadata=part), 16, progress=False)
    assert (selected.ids, selected.labels.tolist()) == (("ISIC_1", "ISIC_4"), [1, 2])
    assert [record.lesion_id for record in read_source(tmp_path / "set.zip").records[:2]] == ["HAM_1", "HAM_1"]
    binary = read_source(tmp_path / "set.zip", binary=True)
    assert [record.class_name for record in binary.records] == ["malignant", "malignant", "benign", "benign"]


def test_kept_digests_read_changed_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = _folder(tmp_path / "set", TABLES["2020"][0]), tmp_path / "cache"
    source, read = read_source(folder), list[str]()
    original = Record.read_bytes

    def counted(record: Record) -> bytes:
        read.append(record.id)
        return original(record)

    monkeypatch.setattr(Record, "read_bytes", counted)
    first = load_images(source, 16, cache=cache, keep_digests=True, progress=False)
    read.clear()
    again = load_images(source, 16, cache=cache, keep_digests=True, progress=False)
    assert read == [] and again.sha256 == first.sha256 and again.contents == first.contents
    os.utime(folder / "images" / f"{NAMES[1]}.jpg", (1, 1))
    assert load_images(source, 16, cache=cache, keep_digests=True, progress=False).sha256 == first.sha256
    assert read == [NAMES[1]]
    _jpeg(folder / "images" / f"{NAMES[2]}.jpg", 99)
    changed = load_images(source, 16, cache=cache, keep_digests=True, progress=False)
    assert [a == b for a, b in zip(changed.contents, first.contents, strict=True)] == [True, True, False, True]
    assert not np.array_equal(changed.images[2], first.images[2])
    (kept,) = cache.glob("digests-*.json")
    assert "ISIC" not in kept.read_text(), "it names no image"
    kept.write_text("{")
    assert load_images(source, 16, cache=cache, keep_digests=True, progress=False).sha256 == changed.sha256


def test_image_cache_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = read_source(_folder(tmp_path / "set", TABLES["2020"][0])), tmp_path / "cache"
    expected = load_images(source, 16, progress=False).images
    decode = images_room.read_training_image
    calls = 0

    def interrupted(data: bytes, resolution: int) -> NDArray[np.uint8]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return decode(data, resolution)

    monkeypatch.setattr(images_room, "read_training_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(source, 16, cache=cache, progress=False)
    assert list(cache.iterdir()) == [], "no file of gigabytes may remain"
    assert np.array_equal(load_images(source, 16, cache=cache, progress=False).images, expected)
    before = calls
    kept = load_images(source, 16, cache=cache, progress=False).images
    assert calls == before and np.array_equal(kept, expected) and not kept.flags.writeable
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:500])
    assert np.array_equal(load_images(source, 16, cache=cache, progress=False).images, expected), "made again"
    with pytest.raises(DataError, match="--cache: .*set.*metadata.csv: cannot be written .*choose another folder"):
        load_images(source, 16, cache=tmp_path / "set" / "metadata.csv", progress=False)


def test_zip_bytes_do_not_depend_on_path_workers_or_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (_folder(tmp_path / place / "set", TABLES["HAM10000"][0]) for place in "ab")
    expected = _prepare(first, out=tmp_path / "a.zip", workers=1)
    real, done = prepare_room.read_training_image, []

    def stop_at_third(data: bytes, resolution: int) -> np.ndarray:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(data)
        return real(data, resolution)

    monkeypatch.setattr(prepare_room, "read_training_image", stop_at_third)
    out = tmp_path / "b" / "a.zip"
    with pytest.raises(KeyboardInterrupt):
        _prepare(second, out=out, workers=1)
    assert not out.exists()
    again = []
    monkeypatch.setattr(
        prepare_room, "read_training_image", lambda data, size: (again.append(data), real(data, size))[1]
    )
    assert _prepare(second, out=out, workers=3) == expected
    assert len(again) == 2, "what was finished before the interruption was made again"
    with pytest.raises(DataError, match="exists already"):
        _prepare(second, out=out)


def test_broken_images_are_skipped_and_reported(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set", TABLES["HAM10000"][0])
    good = (folder / "images" / "ISIC_2.jpg").read_bytes()
    (folder / "images" / "ISIC_2.jpg").write_bytes(good[: len(good) // 2])
    (folder / "images" / "ISIC_3.jpg").unlink()
    out = tmp_path / "set.zip"
    command = ["data", "prepare", str(folder), "--out", str(out), "--resolution", "16"]
    strict = CliRunner().invoke(app, [*command, "--strict"])
    assert isinstance(strict.exception, DataError)
    assert not out.exists()
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, "2 images were skipped" in result.output) == (3, True), result.output
    with zipfile.ZipFile(out) as archive:
        skipped = archive.read("skipped.csv")
        assert json.loads(archive.read("dataset.json"))["labels"] == [
            ["00000/img00000000.png", 0],
            ["00000/img00000001.png", 1],
        ]
        assert "2 images were skipped" in archive.read("README.md").decode()
    assert skipped == (tmp_path / "set.skipped.csv").read_bytes()
    rows = list(csv.DictReader(io.StringIO(skipped.decode())))
    assert [(row["isic_id"], row["source"]) for row in rows] == [("ISIC_2", "set"), ("ISIC_3", "set")]
    assert "truncated" in rows[0]["reason"].lower()
    (folder / "images" / "ISIC_2.jpg").write_bytes(good)
    _jpeg(folder / "images" / "ISIC_3.jpg", 2)
    out.unlink()
    result = CliRunner().invoke(app, [*command, "--strict"])
    assert (result.exit_code, (tmp_path / "set.skipped.csv").exists()) == (0, False), result.output


def test_sources_are_merged_unless_an_id_comes_twice(tmp_path: Path) -> None:
    ham = _folder(tmp_path / "ham", TABLES["HAM10000"][0])
    for i, place in enumerate(("nv/a.jpg", "mel/b.jpg")):
        _jpeg(tmp_path / "mine" / place, i)
    _prepare(ham, tmp_path / "mine", out=tmp_path / "set.zip")
    merged = read_source(tmp_path / "set.zip")
    assert _classes(merged) == TABLES["HAM10000"][1] | {"a": "nv", "b": "mel"}
    assert {record.row["source"] for record in merged.records} == {"ham", "mine"}
    with pytest.raises(DataError, match="ISIC_1 is in both"):
        _prepare(ham, tmp_path / "set.zip", out=tmp_path / "twice.zip")


def test_images_without_a_class_are_left_out_on_request_only(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "set", TABLES["archive"][0])
    source = read_source(folder, binary=True)
    with pytest.raises(DataError, match="--skip-unlabelled"):
        prepare([source], tmp_path / "set.zip", 8, progress=False)
    prepared = prepare([source], tmp_path / "set.zip", 8, skip_unlabelled=True, progress=False)
    assert dict(prepared.classes) == {"benign": 2, "malignant": 1}
    assert [(each.id, each.reason) for each in prepared.skipped] == [("ISIC_3", "no class")]
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert "| licence of the image: CC-0 | 3 images |" in archive.read("README.md").decode()


@pytest.mark.skipif(not (SHARED / "dermoscopy").is_dir(), reason="needs ../shared/data/dermoscopy")
def test_example_collection_has_documented_counts() -> None:
    source = read_source(SHARED / "dermoscopy")
    assert len(source.records) == 6543
    assert {name: len(source.of_class(name)) for name in source.class_names} == {"benign": 5713, "malignant": 830}
    assert all(record.image for record in source.records)
