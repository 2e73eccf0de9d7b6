"""Tests of sources in other forms: foreign tables, layouts and files are read correctly, or refused by name."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import Bundle
from dermis.errors import DataError
from painted_dataset import make
from training.data.class_names import parse_mapping
from training.data.diagnoses import binary_class
from training.data.files import ImageFile
from training.data.images import load_images
from training.data.prepare import prepare
from training.data.sources import Source, read_source
from training.data.splits import read_split, split_by_patient, write_split
from training.data.tables import read_grid


def _image(path: Path, seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((20, 16)).save(path, **options)  # type: ignore[arg-type]
    return path


def _classes(source: Source) -> dict[str, str]:
    return {record.id: record.class_name for record in source.records}


def _with_table(folder: Path, table: str | bytes, names: tuple[str, ...], file: str = "metadata.csv") -> Path:
    for i, name in enumerate(names):
        _image(folder / name, i)
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(table if isinstance(table, bytes) else table.encode())
    return folder


# --- classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        *((value, "malignant") for value in (
            "mel", "MEL", "malignant", "Melanoma in situ", "melanoma_in_situ", "melanoma-in-situ", "melanomas", "Melanoma, NOS",
            "melanoma metastasis", "lentigo maligna", "melanoma (0.76 to 1.5 mm)", "nodular-melanoma-(nm)",
            "Malignant melanocytic proliferations (Melanoma)", "Malignant::Malignant melanocytic proliferations (Melanoma)",
        )),
        *((value, "benign") for value in (
            "nevus", "NV", "nevi", "no melanoma", "not melanoma", "non-melanoma skin cancer", "nonmelanoma", "melanocytoma",
            "benign (not melanoma)", "Atypical melanocytic proliferation", "Basal cell carcinoma", "other", "ACK",
            "lentigo NOS",
            "Nevus, Atypical, Dysplastic, or Clark", "squamous-cell-carcinoma-in-situ", "Pigmented benign keratosis",
        )),
        *((value, "") for value in ("", "unknown", "NA", "n/a", "Indeterminate")),
        *((value, None) for value in (
            "melanom", "Mélanome", "melenoma", "suspected melanoma", "melanoma vs nevus", "melanoma?", "melanoma: no", "nevus?",
            "not a nevus", "history of melanoma", "melanoma simulator", "true", "1", "xyz", "malignant tumor",
            "Malignant melanocytic proliferation", "acral lentiginous",
        )),
    ],
)  # fmt: skip
def test_diagnosis_wordings_are_classified_or_left_unknown(value: str, answer: str | None) -> None:
    assert binary_class(value) == answer
    assert binary_class(f"  {value.upper()} ") == answer


@given(st.text(st.characters(categories=["L"]), max_size=30))  # one word: no separators
def test_text_without_known_word_has_no_class(text: str) -> None:
    assert binary_class(f"zzqx {text}zzq") is None


BINARY_TABLES = {
    "booleans of any malignancy": ("image,malignant\na,True\nb,False\n", {"class_column": "malignant"}, "mb"),
    "booleans in other columns": ("image,biopsied\na,True\nb,False\n", {"class_column": "biopsied"},
                                  "biopsied: .*'False'.*--map"),
    "numbers in other columns": ("image,label\na,1\nb,0\n", {},
                                 "label: cannot decide whether these values mean melanoma.*'0'.*--map"),
    "numbers that are mapped": ("image,label\na,1\nb,0\n", {"mapping": {"1": "malignant", "0": "benign"}}, "mb"),
    "any malignancy beside diagnoses": ("isic_id,target,iddx_full,iddx_1\na,1,Melanoma Invasive,Malignant\n"
                                        "b,1,Basal cell carcinoma,Malignant\n", {}, "mb"),
    "levels with a known general one": ("isic_id,iddx_full,iddx_1\na,Malignant::Melanoma,Malignant\n"
                                        "b,Something new,Benign\n", {}, "mb"),
    "target against diagnosis": ("image,target,diagnosis\na,1,melanoma\nb,1,basal cell carcinoma\n", {},
                                 "target makes 1 images another class.*--class-column"),
    "misspelt": ("image,dx\na,mel\nb,melanoma?\n", {}, "'melanoma\\?'"),
    "all unknown ones are named": ("image,dx\na,qqq\nb,rrr\n", {}, "'qqq' \\(1\\), 'rrr' \\(1\\).*--map"),
    "of two diagnoses, ISIC 2017": ("image_id,melanoma,seborrheic_keratosis\na,1.0,0.0\nb,0.0,0.0\n", {}, "mb"),
    "without header, ISIC 2016": ("ISIC_0000001,malignant\nISIC_0000002,benign\n", {}, "mb"),
    "without header, numbers": ("ISIC_0000001,1.0\nISIC_0000002,0.0\n", {}, "mb"),
    "PAD-UFES-20": ("patient_id,lesion_id,diagnostic,img_id\nP_1,1,MEL,a.png\nP_2,2,NEV,b.png\n", {}, "mb"),
    "DDI": ("DDI_ID,DDI_file,skin_tone,malignant,disease\n1,a.png,56,True,melanoma-in-situ\n"
            "2,b.png,12,True,mycosis-fungoides\n", {}, "mb"),
    "derm7pt": ("case_num,diagnosis,derm,clinic\n1,melanoma (less than 0.76 mm),A/a.jpg,A/c.jpg\n"
                "2,reed or spitz nevus,A/b.jpg,A/d.jpg\n", {}, "mb"),
    "Fitzpatrick17k": ("md5hash,fitzpatrick_scale,label,three_partition_label\na,3,malignant melanoma,malignant\n"
                       "b,3,lyme disease,non-neoplastic\n", {}, "mb"),
    "mapped to no class": ("image,dx\na,mel\nb,bkl\nc,AIMP odd\n", {"mapping": {"aimp odd": ""}}, "mb-"),
}  # fmt: skip


@pytest.mark.parametrize("name", BINARY_TABLES)
def test_binary_classes_come_only_from_known_values(tmp_path: Path, name: str) -> None:
    table, options, expected = BINARY_TABLES[name]
    (tmp_path / "table.csv").write_text(table)
    if len(expected) > 3:
        with pytest.raises(DataError, match=expected):
            read_source(tmp_path / "table.csv", binary=True, **options)  # type: ignore[arg-type]
        return
    source = read_source(tmp_path / "table.csv", binary=True, **options)  # type: ignore[arg-type]
    letters = {"malignant": "m", "benign": "b", "": "-"}
    assert "".join(letters[record.class_name] for record in source.records) == expected


def test_spellings_of_class_name_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('image,class\na,Benign\nb,"benign "\nc, benign\nd,Basal  Cell\ne,"Melanoma, NOS"\nf,Nävus\n')
    source = read_source(file)
    assert list(_classes(source).values()) == ["benign"] * 3 + ["Basal Cell", "Melanoma NOS", "Navus"]
    counts = {(origin.value, origin.class_name): origin.count for origin in source.report.origins}
    assert counts["Benign", "benign"] == 1 and counts["Melanoma, NOS", "Melanoma NOS"] == 1
    file.write_text("image,class\na,x/y\nb,x y\n")
    with pytest.raises(DataError, match="'x y' and 'x/y' would both be the class x y.*--map"):
        read_source(file)
    assert set(_classes(read_source(file, mapping={"x/y": "other"})).values()) == {"other", "x y"}
    with pytest.raises(DataError, match="--map: 'x' does not have the form"):
        parse_mapping(["x"])


def test_numbers_are_malignant_only_in_target_columns(tmp_path: Path) -> None:
    for column, names in (("target", ("benign", "malignant")), ("ulcerated", ("0", "1"))):
        (tmp_path / "t.csv").write_text(f"image,{column}\na,0\nb,1\n")
        assert read_source(tmp_path / "t.csv", class_column=column).class_names == names


# --- tables ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "file"),
    [
        ("image;target\na;benign\nsub/b;malignant\n", "metadata.csv"),
        ('sep=;\r\nimage;target\r\n"=""a""";benign\r\nb;malignant\r\n', "metadata.csv"),
        ("image\ttarget\na\tbenign\nsub/b\tmalignant\n", "all.tsv"),
        (" Image ,Target\na.jpg, benign\nsub/b.png,malignant\n,\n\n", "metadata.csv"),
        ("\ufeffFile Name,Target\na.jpg,benign\nsub\\b.png,malignant\n", "metadata.csv"),
        ("target,filename\nbenign,/home/us/a.JPG\nmalignant,C:\\data\\sub\\b.png\n", "labels/list.csv"),
        ("image,target\na,benign\nb,malignant\n".encode("utf-16"), "metadata.csv"),
        ("image,target\na,benign\nb,malignant\n", "HAM_metadata"),
    ],
)
def test_common_table_dialects_are_read(tmp_path: Path, table: str | bytes, file: str) -> None:
    folder = _with_table(tmp_path, table, ("a.jpg", "sub/b.png"), file)
    source = read_source(folder)
    assert _classes(source) == {"a": "benign", "b": "malignant"}
    assert all(record.image for record in source.records)


def test_the_image_column_can_be_named_and_is_proposed(tmp_path: Path) -> None:
    folder = _with_table(tmp_path, "scan,target\na,benign\nb,malignant\n", ("a.jpg", "b.jpg"))
    with pytest.raises(DataError, match=r"name one of scan, target with --image-column \(scan names 2 of 2\)"):
        read_source(folder)
    assert _classes(read_source(folder, image_column="Scan")) == {"a": "benign", "b": "malignant"}
    (folder / "metadata.csv").write_text("image,target,file_name\n1,benign,a.jpg\n2,malignant,b.jpg\n")
    assert _classes(read_source(folder)) == {"a": "benign", "b": "malignant"}, "the column that names the images"
    (folder / "metadata.csv").write_text("image,target\nx1,benign\nx2,malignant\n")
    with pytest.raises(DataError, match=r"none of its 2 images .* image has 'x1', a file there is 'a.jpg'"):
        read_source(folder)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("image,target\na,benign,x\n", "row 2 has 3 cells where the header has 2"),
        ("image,target\n,benign\na,benign\n", "row 2 has no image"),
        ("image,target,Target\na,benign,malignant\n", "two columns target have different values"),
        ("image,target\na,0\nb,2\n", "target mixes '2' with '0'.*--map"),
        ("image,target\na,0.2\nb,0.9\n", "'0.2' is a measurement or probability"),
        ("image,target\na,benign\na.jpg,benign\n", "a is in more than one row"),
    ],
)
def test_invalid_table_rows_are_refused_by_name(tmp_path: Path, table: str, message: str) -> None:
    folder = _with_table(tmp_path, table, ("a.jpg", "b.jpg"))
    with pytest.raises(DataError, match=message):
        read_source(folder)


def test_lesion_ids_of_second_table_keep_images_together(tmp_path: Path) -> None:
    names = tuple(f"images/ISIC_{i}.jpg" for i in range(12))
    rows = "".join(f"ISIC_{i},{i % 2},{1 - i % 2},0\n" for i in range(12))
    folder = _with_table(tmp_path, f"image,MEL,NV,AKIEC\n{rows}", names, "Truth/GroundTruth.csv")
    groups = "".join(f"ISIC_{i},HAM_{i // 4},histo\n" for i in range(12))
    (folder / "Truth" / "Groupings.csv").write_text(f"image,lesion_id,confirmed\n{groups}")
    source = read_source(folder)
    assert {record.id: record.lesion_id for record in source.records} == {
        f"ISIC_{i}": f"HAM_{i // 4}" for i in range(12)
    }
    assert "Groupings.csv adds lesion_id to 12 of 12 images" in source.report.notes[0]
    write_split(source, split_by_patient(source.records, {"a": 0.5, "b": 0.5}, 0), tmp_path / "split")
    parts = read_split(tmp_path / "split")
    for lesion in range(3):
        assert len({parts[f"ISIC_{i}"] for i in range(4 * lesion, 4 * lesion + 4)}) == 1
    (folder / "Truth" / "Groupings.csv").write_text("image,lesion_id\nISIC_1,A\nISIC_1,B\n")
    with pytest.raises(DataError, match="ISIC_1 is in two rows with different lesion_id"):
        read_source(folder)


def test_split_part_of_table_with_paths_keeps_image_ids(tmp_path: Path) -> None:
    table = "file_name,target\nx/1.jpg,benign\ny/1.jpg,malignant\ny/2.jpg,benign\ny/3.jpg,malignant\n"
    folder = _with_table(tmp_path / "d", table, ("x/1.jpg", "y/1.jpg", "y/2.jpg", "y/3.jpg"))
    whole = read_source(folder)
    assert [record.id for record in whole.records] == ["x/1", "y/1", "y/2", "y/3"]
    write_split(whole, split_by_patient(whole.records, {"a": 0.5, "b": 0.5}, 0), tmp_path / "split")
    parts = read_split(tmp_path / "split")
    assert set(parts) == {record.id for record in whole.records}
    for part in "ab":
        source = read_source(folder, metadata=tmp_path / "split" / f"{part}.csv")
        assert {record.id for record in source.records} == {name for name, of in parts.items() if of == part}


def test_lesion_ids_of_several_tables_are_merged(tmp_path: Path) -> None:
    folder = _with_table(tmp_path, "image,dx\na,nv\nb,mel\nc,nv\n", ("a.jpg", "b.jpg", "c.jpg"), "truth.csv")
    (folder / "g1.csv").write_text("image,lesion_id\na,1\nb,1\n")
    (folder / "g2.csv").write_text("image,lesion_id\nb,1\nc,2\n")
    assert [record.lesion_id for record in read_source(folder).records] == ["1", "1", "2"]
    (folder / "g2.csv").write_text("image,lesion_id\nb,3\n")
    with pytest.raises(DataError, match="g2.csv: gives b the lesion_id '3', and another table '1'"):
        read_source(folder)


def test_table_refers_to_images_in_its_own_folder(tmp_path: Path) -> None:
    for part, name in (("train", "nv"), ("test", "mel")):
        _with_table(tmp_path / part, f"file_name,label\n1.jpg,{name}\n", ("1.jpg",))
    for part, name in (("train", "nv"), ("test", "mel")):
        source = read_source(tmp_path, metadata=tmp_path / part / "metadata.csv")
        assert _classes(source) == {f"{part}/1": name}


def test_a_mapped_table_is_split_and_read_back(tmp_path: Path) -> None:
    folder = _with_table(tmp_path / "d", "image,dx\na,x/y\nb,x y\n", ("a.jpg", "b.jpg"))
    source = read_source(folder, mapping={"x/y": "odd"})
    write_split(source, split_by_patient(source.records, {"all": 1.0}, 0), tmp_path / "split")
    assert read_split(tmp_path / "split") == {"a": "all", "b": "all"}
    (tmp_path / "t.csv").write_text("path,dx\nx/1.jpg,nv\ny/1.jpg,mel\n")
    assert _classes(read_source(tmp_path / "t.csv")) == {"x/1": "nv", "y/1": "mel"}


# --- files and layouts -------------------------------------------------------------------------------------------


def test_images_that_pillow_opens_are_read_and_others_counted(tmp_path: Path) -> None:
    for i, name in enumerate(("a.tif", "b.TIFF", "c.bmp", "d.webp", "e.Jpg", "f.jfif", "g.gif", "h.PNG")):
        _image(tmp_path / "in" / "nv" / name, i, format=Image.registered_extensions()[Path(name.lower()).suffix])
    _image(tmp_path / "in" / "nv" / "exported", 9, format="JPEG")
    _image(tmp_path / "in" / "mel" / "m.jpg", 10)
    (tmp_path / "in" / "mel" / "scan.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 40)
    (tmp_path / "in" / "mel" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "in" / "LICENSE.txt").write_text("CC-0")
    source = read_source(tmp_path / "in")
    assert sorted(_classes(source)) == ["a", "b", "c", "d", "e", "exported", "f", "g", "h", "m"]
    assert len(load_images(source, 8, progress=False).images) == 10
    assert set(source.report.unreadable) == {"mel/scan.dcm", "mel/gone.jpg"}
    result = CliRunner().invoke(
        app, ["data", "prepare", str(tmp_path / "in"), "--out", str(tmp_path / "o.zip"), "--resolution", "8"]
    )
    assert result.exit_code == 3
    assert "recognised: class folders" in result.output and "mel/scan.dcm" in (tmp_path / "o.skipped.csv").read_text()


def test_class_folder_without_readable_images_is_refused(tmp_path: Path) -> None:
    for i, name in enumerate(("benign/a.jpg", "other/b.jpg")):
        _image(tmp_path / name, i)
    (tmp_path / "malignant").mkdir()
    (tmp_path / "malignant" / "m.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 40)
    with pytest.raises(DataError, match=r"malignant has no image that can be read: malignant/m.heic is a format"):
        read_source(tmp_path)
    (tmp_path / "malignant" / "m.heic").unlink()
    assert "folders without images: malignant" in read_source(tmp_path).report.notes


def test_system_files_are_not_read_as_images(tmp_path: Path) -> None:
    for i, name in enumerate(("nv/a.jpg", "mel/b.jpg")):
        _image(tmp_path / "in" / name, i)
        (tmp_path / "in" / name).with_name(f"._{Path(name).name}").write_bytes(b"\0\5\x16\7")
    _image(tmp_path / "in" / "__MACOSX" / "nv" / "a.jpg", 3)
    for name in ("nv/Thumbs.db", ".DS_Store", "nv/.hidden.png", "desktop.ini"):
        (tmp_path / "in" / name).write_bytes(b"x")
    source = read_source(tmp_path / "in")
    assert _classes(source) == {"a": "nv", "b": "mel"} and not source.report.unreadable
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in sorted((tmp_path / "in").rglob("*")):
            archive.write(file, file.relative_to(tmp_path / "in"))
    assert _classes(read_source(tmp_path / "in.zip")) == {"a": "nv", "b": "mel"}


def test_links_are_followed_without_cycles(tmp_path: Path) -> None:
    for i, name in enumerate(("store/mel/a.jpg", "in/nv/b.jpg")):
        _image(tmp_path / name, i)
    (tmp_path / "in" / "mel").symlink_to(tmp_path / "store" / "mel")
    (tmp_path / "in" / "nv" / "up").symlink_to(tmp_path / "in")
    assert _classes(read_source(tmp_path / "in")) == {"a": "mel", "b": "nv"}
    table = _with_table(tmp_path / "t", "image,target\na,malignant\n", ())
    (table / "images").symlink_to(tmp_path / "store")
    assert _classes(read_source(table)) == {"a": "malignant"}
    (tmp_path / "in" / "bcc").write_text(str(tmp_path / "store" / "mel"))
    with pytest.raises(
        DataError, match="the folder bcc has no image that can be read: bcc is a link that was saved as text"
    ):
        read_source(tmp_path / "in")
    (tmp_path / "in" / "bcc").unlink()
    os.mkfifo(tmp_path / "in" / "nv" / "pipe.jpg")
    assert read_source(tmp_path / "in").report.unreadable == {"nv/pipe.jpg": "not a regular file"}
    _image(tmp_path / "in" / "bkl" / "c.jpg")
    (tmp_path / "in" / "df").symlink_to("nowhere")
    with pytest.raises(DataError, match="the folder df has no image that can be read: df is link"):
        read_source(tmp_path / "in")


def test_jpg_and_png_of_same_name_are_distinct_images(tmp_path: Path) -> None:
    for i, name in enumerate(("nv/a.jpg", "nv/a.png", "mel/c.jpg")):
        _image(tmp_path / name, i)
    source = read_source(tmp_path)
    assert _classes(source) == {"nv/a.jpg": "nv", "nv/a.png": "nv", "mel/c": "mel"}
    assert len(load_images(source, 8, progress=False).images) == 3


TRUTH = "image,MEL,NV,AKIEC\nISIC_1,1,0,0\nISIC_2,0,1,0\n"
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, str], str]] = {
    "ISIC 2018 task 3": (("x_Input/ISIC_1.jpg", "x_Input/ISIC_2.jpg"), {"x_GroundTruth/x_GroundTruth.csv": TRUTH}, ""),
    "HAM10000": (("part_1/a.jpg", "part_2/b.jpg"), {"HAM10000_metadata": "lesion_id,image_id,dx\n1,a,mel\n2,b,nv\n"}, ""),
    "class folders in data/": (("data/nv/a.jpg", "data/mel/b.jpg"), {}, ""),
    "parts of a data set": (("train/nv/a.jpg", "train/mel/b.jpg", "test/nv/c.jpg", "test/mel/d.jpg"), {},
                            "test, train look like parts .* each with mel, nv.*--layout"),
    "hospitals": (("one/nv/a.jpg", "one/mel/b.jpg", "two/nv/c.jpg", "two/mel/d.jpg"), {},
                  "the classes may be one, two, or the folders mel, nv"),
    "no table": (("HAM_images_part_1/a.jpg", "HAM_images_part_2/b.jpg"), {}, "not names of classes.*--metadata"),
    "one folder": (("nv/a.jpg",), {"mel/readme.txt": "none"}, "only one folder has images, nv"),
    "two tables": (("a.jpg", "b.jpg"), {"p.csv": "image,dx\na,nv\n", "q.csv": "image,dx\nb,mel\n"},
                   "p.csv and q.csv.*--metadata"),
    "an odd name for parts": (("train_sep/a.jpg", "test_sep/b.jpg"), {}, "look like parts of a data set"),
    "a folder for each patient": (("patient_1/a.jpg", "patient_2/b.jpg"), {}, "a folder for each patient.*--metadata"),
    "PH2": (("IMD3/IMD3_Image/IMD3.bmp", "IMD4/IMD4_Image/IMD4.bmp"), {"PH2.xlsx": "x"}, "PH2.xlsx is not read; save it"),
    "masks": (("nv/a.jpg", "nv/a_segmentation.png", "mel/b.jpg"), {}, "look like masks.*nv/a_segmentation.png, of nv/a.jpg"),
    "StyleGAN in a folder": (("my/00000/a.png", "my/00001/b.png"), {"my/dataset.json": "{}"}, "StyleGAN data set in a folder"),
    "StyleGAN without labels": (("00000/a.png", "00001/b.png"), {}, "--layout stylegan"),
    "a table without classes": (("nv/a.jpg", "mel/b.jpg"), {"metadata.csv": "image,age\na,4\nb,5\n"}, "no column of classes"),
    "images of another part": (("test/1.jpg", "test/2.jpg"), {"t.csv": "path,dx\ntrain/1.jpg,nv\ntrain/2.jpg,mel\n"},
                               "train/1.jpg does not exist"),
    "HAM10000 ": (("a.jpg", "b.jpg"), {"metadata.csv": "image_id,lesion_id,age\na,1,4\n",
                  "gt.csv": "image_id,lesion_id,dx\na,1,nv\nb,2,mel\n", "sample_submission.csv": "image,target\na,0\n"}, ""),
    "images with a table": (("train/a.jpg", "train/b.jpg"),
                            {"train/_classes.csv": "filename, mel, nv, bcc\na.jpg, 1, 0, 0\nb.jpg, 0, 1, 0\n"}, ""),
    "a table of others": (("images/a.jpg", "images/b.jpg"), {"p.csv": "image,dx\nx,nv\n"}, "none of its 1 images"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_recognised_or_refused_with_advice(tmp_path: Path, name: str) -> None:
    images, texts, message = LAYOUTS[name]
    for i, image in enumerate(images):
        _image(tmp_path / image, i)
    for file, text in texts.items():
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_text(text)
    if message:
        with pytest.raises(DataError, match=message):
            read_source(tmp_path)
        if name == "parts of a data set":
            assert read_source(tmp_path, layout="imagefolder").class_names == ("test", "train")
        return
    source = read_source(tmp_path)
    assert source.report.recognised == name.strip()
    assert sorted(set(_classes(source).values())) == ["mel", "nv"] and len(source.records) == 2


def test_zips_are_read_like_folders(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "png")

    def make(name: str, members: tuple[str, ...], **texts: str) -> Path:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member in members:
                archive.writestr(member, data.getvalue())
            for member, text in texts.items():
                archive.writestr(member.replace("__", "."), text)
        return tmp_path / name

    assert _classes(read_source(make("a.zip", ("set/nv/a.png", "set/mel/b.png")))) == {"a": "nv", "b": "mel"}
    table = make("b.zip", ("images/a.png", "images/b.png"), metadata__csv="image,dx\na,nv\nb,mel\n")
    assert _classes(read_source(table)) == {"a": "nv", "b": "mel"}
    plain = read_source(make("c.zip", ("00000/img00000000.png", "00000/img00000001.png")))
    assert (plain.layout, plain.class_names, len(plain.records)) == ("stylegan", (), 2)
    members = ("00000/img0.png", "00000/img1.png")
    for number, labels in enumerate(([1.0, 0.0], [[0, 1], [1.0, 0.0]])):
        text = json.dumps({"labels": list(zip(members, labels, strict=True))})
        source = read_source(make(f"d{number}.zip", members, dataset__json=text))
        assert _classes(source) == {"00000/img0": "1", "00000/img1": "0"}


def test_file_names_in_other_encodings_are_matched(tmp_path: Path) -> None:
    composed, divided = "m\u00e4l", "ma\u0308l"
    for name, said in ((composed, divided), (divided, composed)):
        folder = _with_table(tmp_path / str(len(name)), f"image,dx\n{said}.jpg,nv\n", (f"{name}.jpg",))
        assert _classes(read_source(folder)) == {f"{name}": "nv"}
    for i, name in enumerate(("in/nv/a.jpg", "in/mel/b.jpg")):
        _image(tmp_path / name, i)
    try:
        os.rename(tmp_path / "in/nv/a.jpg", os.fsencode(tmp_path) + b"/in/nv/\xe4.jpg")  # noqa: PTH104 - of bytes
    except OSError:
        pytest.skip("file names are UTF-8 here")
    prepare([read_source(tmp_path / "in")], tmp_path / "o.zip", 8, progress=False)
    assert _classes(read_source(tmp_path / "o.zip")) == {"\u00e4": "nv", "b": "mel"}


def test_zip_member_names_are_decoded_and_must_be_unique(tmp_path: Path) -> None:
    data = _image(tmp_path / "a.png").read_bytes()

    def pack(*names: str) -> Path:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for name in names:
                archive.writestr(name, data)
        return tmp_path / "a.zip"

    assert _classes(read_source(pack("./nv/a.png", "mel\\b.png"))) == {"a": "nv", "b": "mel"}
    file = pack("nv/\u00e4.png", "mel/b.png")
    content = file.read_bytes().replace(b"\x00\x08\x00\x00", b"\x00\x00\x00\x00")  # the flag: names are UTF-8
    file.write_bytes(content)
    assert _classes(read_source(file)) == {"\u00e4": "nv", "b": "mel"}
    with pytest.warns(UserWarning, match="Duplicate name"):
        pack("nv/a.png", "nv/a.png", "mel/b.png")
    with pytest.raises(DataError, match="two files nv/a.png"):
        read_source(file)


def test_an_archive_among_class_folders_is_counted(tmp_path: Path) -> None:
    for i, name in enumerate(("nv/a.jpg", "mel/b.jpg")):
        _image(tmp_path / name, i)
    (tmp_path / "bkl.zip").write_bytes(b"PK")
    assert read_source(tmp_path).report.unreadable == {"bkl.zip": "an archive that is not read; unpack it"}


# --- decoding ----------------------------------------------------------------------------------------------------


def test_16_bit_and_exif_rotated_images_decode_as_displayed(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    upright = Image.fromarray(np.kron(np.eye(8, dtype=np.uint8) * 200, np.ones((8, 8), dtype=np.uint8))[:, :40])
    exif = Image.Exif()
    exif[0x0112] = 6
    for folder, save in {
        "a": lambda file: Image.fromarray(ramp).save(file.with_suffix(".png")),
        "b": lambda file: Image.fromarray(ramp).save(file.with_suffix(".tif")),
        "c": lambda file: upright.save(file.with_suffix(".png")),
        "d": lambda file: upright.transpose(Image.Transpose.ROTATE_90).save(
            file.with_suffix(".jpg"), exif=exif, quality=100
        ),
    }.items():
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / folder)
    a, b, c, d = load_images(read_source(tmp_path), 8, progress=False).images.astype(int)
    assert np.array_equal(a[..., 0], ramp >> 8) and np.array_equal(a, b)
    assert np.abs(c - d).max() < 12


def _spoiled(write: Callable[[Path], object], folder: Path) -> str:
    for i, name in enumerate(("nv/a.jpg", "mel/b.jpg")):
        _image(folder / name, i)
    write(folder / "nv" / "x.jpg")
    return prepare([read_source(folder)], folder.with_suffix(".zip"), 8, progress=False).skipped[0].reason


def test_skip_reasons_are_readable_and_reproducible(tmp_path: Path) -> None:
    cases: dict[str, Callable[[Path], object]] = {
        "is empty (0 bytes)": lambda file: file.write_bytes(b""),
        "is a web page": lambda file: file.write_text("<html>404</html>"),
        "is a Git LFS pointer": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1"),
        "is a DICOM file": lambda file: file.write_bytes(b"\0" * 128 + b"DICM"),
        "ends early": lambda file: file.write_bytes(_image(file.with_name("y.jpg"), 5).read_bytes()[:-200]),
    }
    for i, (words, write) in enumerate(cases.items()):
        reasons = [_spoiled(write, tmp_path / f"{place}{i}") for place in "ab"]
        assert reasons[0] == reasons[1] and reasons[0].startswith(words) and "0x" not in reasons[0]


def test_map_of_absent_value_is_refused(tmp_path: Path) -> None:
    for i, name in enumerate(("nv/a.jpg", "mel/b.jpg")):
        _image(tmp_path / "in" / name, i)
    command = ["data", "prepare", str(tmp_path / "in"), "--out", str(tmp_path / "o.zip"), "--resolution", "8"]
    result = CliRunner().invoke(app, [*command, "--map", "nvv=nevus"])
    assert isinstance(result.exception, DataError) and "no image has the value 'nvv'" in str(result.exception)
    assert CliRunner().invoke(app, [*command, "--map", "NV=nevus"]).exit_code == 0
    with zipfile.ZipFile(tmp_path / "o.zip") as archive:
        assert b"nevus" in archive.read("metadata.csv")


@pytest.mark.full
@pytest.mark.parametrize("kind", ["imagefolder", "webdataset", "parquet"])
def test_generated_dataset_is_read_as_source(tmp_path: Path, tiny_bundle: Bundle, kind: str) -> None:
    make(tmp_path / "made", tiny_bundle, format=kind)
    source = read_source(tmp_path / "made")
    assert source.report.recognised == "data set of dermis" and source.class_names == ("benign", "malignant")
    dataset = load_images(source, 8, progress=False)
    assert dataset.images[:, 0, 0].tolist() == [[i, label, 7] for i, label in enumerate(dataset.labels)]
    assert dataset.labels.tolist().count(1) == 11
    prepare([source], tmp_path / "o.zip", 8, progress=False)
    again = load_images(read_source(tmp_path / "o.zip"), 8, progress=False)
    assert np.array_equal(again.images, dataset.images) and again.ids == dataset.ids
    if kind == "imagefolder":
        packed = load_images(read_source(tmp_path / "made" / "images.zip"), 8, progress=False)
        assert np.array_equal(packed.images, dataset.images)


# --- sizes -------------------------------------------------------------------------------------------------------


def test_many_columns_of_one_name_are_numbered_in_linear_time_and_limited(tmp_path: Path) -> None:
    def hangs(*_: object) -> None:
        raise TimeoutError("reading a table of 10,000 columns takes more than a minute")

    file = tmp_path / "wide.csv"
    file.write_text("a,a.2,a," + "," * 9_996 + "\n1\n")
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        header = read_grid(file).header
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert header[:5] == ("a", "a.2", "a.3", "unnamed", "unnamed.2")
    assert len(header) == len(set(header)) == 10_000 and header[-1] == "unnamed.9997"
    file.write_text("a" + "," * 10_000 + "\n1\n")
    with pytest.raises(DataError, match=r"wide\.csv: line 1 has 10,001 columns, more than 10,000"):
        read_grid(file)
    file.write_text("a" + "," * 9_999 + "\n" + "1\n" * 5_001)  # 30 kB that would become 50 million cells
    with pytest.raises(DataError, match=r"wide\.csv: has more than 50,000,000 cells"):
        read_grid(file)


def test_compressed_table_is_not_read_further_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b"isic_id,target\n" + random.Random(1).randbytes(1 << 18).hex().encode())
    broken = packed[: len(packed) * 3 // 4]  # an error if it is read to its end
    (tmp_path / "m.csv.gz").write_bytes(broken)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("m.csv.gz", broken)
    for file in (ImageFile(tmp_path / "m.csv.gz"), ImageFile(tmp_path / "images.zip", "m.csv.gz")):
        assert read_grid(file, max_rows=1).header == ("isic_id", "target")
        with pytest.raises(DataError, match=r"m\.csv\.gz: is not a readable CSV"):
            read_grid(file)
    monkeypatch.setattr("training.data.tables._MAX_BYTES", 100_000)
    for file in (ImageFile(tmp_path / "m.csv.gz"), ImageFile(tmp_path / "images.zip", "m.csv.gz")):
        with pytest.raises(DataError, match=r"m\.csv\.gz: has more than 100,000 bytes \(decompressed\)"):
            read_grid(file)
