"""Tests of the tables of public collections: each is recognised, and its columns are mapped to one set of attributes.

The headers are those of the files that the publishers distribute; the rows are made up.
"""

from __future__ import annotations

import csv
import io
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermis.errors import DataError
from dermis.skin_tone import skin_tone, tone_class
from training.classifier.data import load_real
from training.data.attributes import SYNONYMS, value_of
from training.data.inspection import attribute_counts, inspect_source, with_skin_tones
from training.data.prepare import prepare
from training.data.sources import Source, read_source
from training.data.splits import split_by_patient, write_split

SLICE_3D = (
    "isic_id,target,patient_id,age_approx,sex,anatom_site_general,clin_size_long_diam_mm,image_type,tbp_tile_type,tbp_lv_A,"
    "tbp_lv_Aext,tbp_lv_B,tbp_lv_Bext,tbp_lv_C,tbp_lv_Cext,tbp_lv_H,tbp_lv_Hext,tbp_lv_L,tbp_lv_Lext,tbp_lv_areaMM2,"
    "tbp_lv_area_perim_ratio,tbp_lv_color_std_mean,tbp_lv_deltaA,tbp_lv_deltaB,tbp_lv_deltaL,tbp_lv_deltaLB,"
    "tbp_lv_deltaLBnorm,tbp_lv_eccentricity,tbp_lv_location,tbp_lv_location_simple,tbp_lv_minorAxisMM,"
    "tbp_lv_nevi_confidence,tbp_lv_norm_border,tbp_lv_norm_color,tbp_lv_perimeterMM,tbp_lv_radial_color_std_max,tbp_lv_stdL,"
    "tbp_lv_stdLExt,tbp_lv_symm_2axis,tbp_lv_symm_2axis_angle,tbp_lv_x,tbp_lv_y,tbp_lv_z,attribution,copyright_license,"
    "lesion_id,iddx_full,iddx_1,iddx_2,iddx_3,iddx_4,iddx_5,mel_mitotic_index,mel_thick_mm,tbp_lv_dnn_lesion_confidence"
)
# The tables of the official release together have the columns of Kaggle's table, with malignant in place of target.
SUPPLEMENT_2024 = "isic_id,attribution,copyright_license," + SLICE_3D[SLICE_3D.index("lesion_id,") :]
METADATA_2024 = SLICE_3D.replace("isic_id,target,", "isic_id,attribution,copyright_license,")
METADATA_2024 = METADATA_2024[: METADATA_2024.index(",attribution,copyright_license,lesion_id")]
PAD_UFES_20 = (
    "patient_id,lesion_id,smoke,drink,background_father,background_mother,age,pesticide,gender,skin_cancer_history,"
    "cancer_history,has_piped_water,has_sewage_system,fitspatrick,region,diameter_1,diameter_2,diagnostic,itch,grew,hurt,"
    "changed,bleed,elevation,img_id,biopsed"
)


def _row(header: str, **values: str) -> str:
    names = header.split(",")
    assert values.keys() <= set(names)
    return ",".join(values.get(name, "") for name in names)


def _table(header: str, *rows: Mapping[str, str]) -> str:
    return "\n".join([header, *(_row(header, **row) for row in rows)]) + "\n"


@dataclass(frozen=True)
class Collection:
    """Files of a collection, and what is read of its first image."""

    tables: Mapping[str, str]
    images: tuple[str, ...]
    first: Mapping[str, str]  # attributes of the first image by id
    classes: tuple[str, ...]
    binary: tuple[str, ...]
    notes: str = ""
    recognised: str = ""  # by default the key in COLLECTIONS


COLLECTIONS = {
    "ISIC 2016 part 3": Collection(
        {"ISBI2016_ISIC_Part3_Training_GroundTruth.csv": "ISIC_0000001,benign\nISIC_0000002,malignant\n"},
        ("ISBI2016_ISIC_Part3_Training_Data/ISIC_0000001.jpg", "ISBI2016_ISIC_Part3_Training_Data/ISIC_0000002.jpg"),
        {},  # the table has the class only
        ("benign", "malignant"),
        ("benign", "malignant"),
    ),
    "ISIC 2017 part 3": Collection(
        {
            "ISIC-2017_Training_Part3_GroundTruth.csv": "image_id,melanoma,seborrheic_keratosis\n"
            "ISIC_0000001,1.0,0.0\nISIC_0000002,0.0,1.0\n",
            "ISIC-2017_Training_Data/ISIC-2017_Training_Data_metadata.csv": "image_id,age_approximate,sex\n"
            "ISIC_0000001,55,female\nISIC_0000002,unknown,unknown\n",
        },
        tuple(
            f"ISIC-2017_Training_Data/ISIC_000000{name}"
            for name in ("1.jpg", "1_superpixels.png", "2.jpg", "2_superpixels.png")
        ),
        {"diagnosis": "melanoma", "age_approx": "55", "sex": "female"},
        ("melanoma", "seborrheic keratosis"),
        ("malignant", "benign"),
        "ISIC-2017_Training_Data_metadata.csv adds age_approximate, sex to 2 of 2 images",
    ),
    "ISIC 2018 task 3": Collection(
        {
            "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv": "image,MEL,NV,BCC,AKIEC,BKL,DF,"
            "VASC\n"
            "ISIC_0000001,0.0,1.0,0.0,0.0,0.0,0.0,0.0\nISIC_0000002,1.0,0.0,0.0,0.0,0.0,0.0,0.0\n",
            "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_LesionGroupings.csv": "image,lesion_id,"
            "diagnosis_confirm_type\nISIC_0000001,HAM_0000001,histo\nISIC_0000002,HAM_0000002,histo\n",
        },
        ("ISIC2018_Task3_Training_Input/ISIC_0000001.jpg", "ISIC2018_Task3_Training_Input/ISIC_0000002.jpg"),
        {"lesion_id": "HAM_0000001", "diagnosis": "nv"},
        ("nv", "mel"),
        ("benign", "malignant"),
        "adds lesion_id to 2 of 2 images",
    ),
    "ISIC 2019": Collection(
        {
            "ISIC_2019_Training_GroundTruth.csv": "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK\n"
            "ISIC_0000001,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,0.0\nISIC_0000002,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0\n",
            "ISIC_2019_Training_Metadata.csv": "image,age_approx,anatom_site_general,lesion_id,sex\n"
            "ISIC_0000001,85.0,head/neck,BCN_0000001,male\nISIC_0000002,,,,\n",
        },
        ("ISIC_2019_Training_Input/ISIC_0000001.jpg", "ISIC_2019_Training_Input/ISIC_0000002.jpg"),
        {"lesion_id": "BCN_0000001", "diagnosis": "scc", "age_approx": "85", "sex": "male", "anatom_site": "head/neck"},
        ("scc", "mel"),
        ("benign", "malignant"),
        "ISIC_2019_Training_Metadata.csv adds",
    ),
    "ISIC 2020": Collection(
        {
            "ISIC_2020_Training_GroundTruth_v2.csv": "image_name,patient_id,lesion_id,sex,age_approx,"
            "anatom_site_general_challenge,diagnosis,benign_malignant,target\n"
            "ISIC_0000001,IP_0000001,IL_0000001,female,45,torso,nevus,benign,0\n"
            "ISIC_0000002,IP_0000002,IL_0000002,male,70,palms/soles,melanoma,malignant,1\n"
        },
        ("train/ISIC_0000001.jpg", "train/ISIC_0000002.jpg"),
        {"patient_id": "IP_0000001", "lesion_id": "IL_0000001", "diagnosis": "nevus", "age_approx": "45", "sex": "female",
         "anatom_site": "torso"},
        ("benign", "malignant"),
        ("benign", "malignant"),
    ),
    "ISIC 2024 (SLICE-3D)": Collection(
        {
            "train-metadata.csv": _table(
                SLICE_3D,
                {"isic_id": "ISIC_0000001", "target": "1", "patient_id": "IP_0000001", "age_approx": "60.0", "sex": "male",
                 "anatom_site_general": "posterior torso", "lesion_id": "IL_0000001",
                 "iddx_full": "Malignant::Malignant epidermal proliferations::Basal cell carcinoma",
                 "iddx_1": "Malignant", "iddx_2": "Malignant epidermal proliferations", "iddx_3": "Basal cell carcinoma"},
                {"isic_id": "ISIC_0000002", "target": "0", "patient_id": "IP_0000002", "iddx_full": "Benign",
                 "iddx_1": "Benign"},
            )
        },
        ("train-image/image/ISIC_0000001.jpg", "train-image/image/ISIC_0000002.jpg"),
        {"patient_id": "IP_0000001", "lesion_id": "IL_0000001", "age_approx": "60", "sex": "male",
         "anatom_site": "posterior torso",
         "diagnosis": "Malignant::Malignant epidermal proliferations::Basal cell carcinoma"},
        ("malignant", "benign"),
        ("benign", "benign"),
    ),
    "ISIC 2024, official": Collection(
        {
            "ISIC_2024_Training_GroundTruth.csv": "isic_id,malignant\nISIC_0000001,1.0\nISIC_0000002,0.0\n",
            "ISIC_2024_Training_Supplement.csv": _table(
                SUPPLEMENT_2024,
                {"isic_id": "ISIC_0000001", "attribution": "Clinic", "lesion_id": "IL_0000001",
                 "iddx_full": "Malignant::Malignant epidermal proliferations::Basal cell carcinoma",
                 "iddx_1": "Malignant", "iddx_2": "Malignant epidermal proliferations", "iddx_3": "Basal cell carcinoma"},
                {"isic_id": "ISIC_0000002", "iddx_1": "Indeterminate", "iddx_2": "Indeterminate melanocytic proliferations",
                 "iddx_3": "Atypical melanocytic neoplasm",
                 "iddx_full": "Indeterminate::Indeterminate melanocytic proliferations::Atypical melanocytic neoplasm"},
            ),
            "ISIC_2024_Training_Input/metadata.csv": _table(
                METADATA_2024,
                {"isic_id": "ISIC_0000001", "attribution": "Clinic", "patient_id": "IP_0000001", "age_approx": "60",
                 "sex": "male", "anatom_site_general": "posterior torso", "tbp_tile_type": "3D: XP"},
                {"isic_id": "ISIC_0000002", "patient_id": "IP_0000002"},
            ),
        },
        ("ISIC_2024_Training_Input/ISIC_0000001.jpg", "ISIC_2024_Training_Input/ISIC_0000002.jpg"),
        {"patient_id": "IP_0000001", "lesion_id": "IL_0000001", "age_approx": "60", "sex": "male",
         "anatom_site": "posterior torso",
         "diagnosis": "Malignant::Malignant epidermal proliferations::Basal cell carcinoma"},
        ("malignant", "benign"),
        ("benign", "benign"),
        "ISIC_2024_Training_Supplement.csv adds lesion_id, iddx_full",
        "ISIC 2024 (SLICE-3D)",
    ),
    "HAM10000": Collection(
        {
            "HAM10000_metadata": "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"
            "HAM_0000001,ISIC_0000001,akiec,histo,50.0,female,lower extremity,vidir_modern\n"
            "HAM_0000002,ISIC_0000002,mel,histo,65.0,male,back,rosendahl\n"
        },
        ("HAM10000_images_part_1/ISIC_0000001.jpg", "HAM10000_images_part_2/ISIC_0000002.jpg"),
        {"lesion_id": "HAM_0000001", "diagnosis": "akiec", "age_approx": "50", "sex": "female",
         "anatom_site": "lower extremity"},
        ("akiec", "mel"),
        ("benign", "malignant"),
    ),
    "BCN20000": Collection(
        {
            "bcn_20k_train.csv": "bcn_filename,age_approx,anatom_site_general,diagnosis,lesion_id,capture_date,sex,split\n"
            "BCN_0000000001.jpg,55.0,anterior torso,BCC,BCN_0003884,2012-05-16,male,train\n"
            "BCN_0000000002.jpg,,,MEL,BCN_0000019,2013-01-01,,train\n"
        },
        ("BCN_20k_train/bcn_20k_train/BCN_0000000001.jpg", "BCN_20k_train/bcn_20k_train/BCN_0000000002.jpg"),
        {"lesion_id": "BCN_0003884", "diagnosis": "BCC", "age_approx": "55", "sex": "male",
         "anatom_site": "anterior torso"},
        ("BCC", "MEL"),
        ("benign", "malignant"),
    ),
    "PAD-UFES-20": Collection(
        {
            "metadata.csv": _table(
                PAD_UFES_20,
                {"patient_id": "PAT_1516", "lesion_id": "1765", "age": "8", "gender": "FEMALE", "fitspatrick": "3.0",
                 "region": "ARM", "diagnostic": "NEV", "img_id": "PAT_1516_1765_530.png", "biopsed": "False"},
                {"patient_id": "PAT_46", "lesion_id": "881", "diagnostic": "MEL", "img_id": "PAT_46_881_939.png"},
            )
        },
        ("imgs_part_1/PAT_1516_1765_530.png", "imgs_part_2/PAT_46_881_939.png"),
        {"patient_id": "PAT_1516", "lesion_id": "1765", "diagnosis": "NEV", "age_approx": "8", "sex": "female",
         "anatom_site": "arm", "skin_type": "III"},
        ("NEV", "MEL"),
        ("benign", "malignant"),
    ),
    "Fitzpatrick17k": Collection(
        {
            "fitzpatrick17k.csv": "md5hash,fitzpatrick_scale,fitzpatrick_centaur,label,nine_partition_label,"
            "three_partition_label,qc,url,url_alphanum\n"
            "5e82a45bc5d78bd24ae9202d194423f8,5,3,dermatofibroma,benign dermal,benign,,https://www.example.org/1.jpg,"
            "httpwwwexampleorg1jpg.jpg\n"
            "fa2911a9b13b6f8af79cb700937cc14f,-1,1,melanoma,malignant melanoma,malignant,,https://www.example.org/2.jpg,"
            "httpwwwexampleorg2jpg.jpg\n"
        },
        ("images/5e82a45bc5d78bd24ae9202d194423f8.jpg", "images/fa2911a9b13b6f8af79cb700937cc14f.jpg"),
        {"diagnosis": "dermatofibroma", "skin_type": "V"},
        ("dermatofibroma", "melanoma"),
        ("benign", "malignant"),
    ),
    "DDI": Collection(
        {
            "ddi_metadata.csv": ",DDI_ID,DDI_file,skin_tone,malignant,disease\n0,1,000001.png,56,TRUE,mycosis-fungoides\n"
            "1,2,000002.png,12,TRUE,melanoma-in-situ\n"
        },
        ("000001.png", "000002.png"),
        {"diagnosis": "mycosis-fungoides", "skin_type": "V-VI"},
        ("malignant", "malignant"),
        ("benign", "malignant"),
    ),
    "ISIC Archive": Collection(
        {
            "metadata.csv": "isic_id,attribution,copyright_license,age_approx,anatom_site_general,diagnosis_1,diagnosis_2,"
            "diagnosis_3,fitzpatrick_skin_type,image_type,lesion_id,patient_id,sex\n"
            "ISIC_0000001,Clinic,CC-BY,30,anterior torso,Benign,Benign melanocytic proliferations,Nevus,IV,dermoscopic,"
            "IL_1,IP_1,female\n"
            'ISIC_0000002,Clinic,CC-BY,,,Malignant,Malignant melanocytic proliferations (Melanoma),"Melanoma, NOS",,'
            "dermoscopic,,,\n"
        },
        ("ISIC_0000001.jpg", "ISIC_0000002.jpg"),
        {"patient_id": "IP_1", "lesion_id": "IL_1", "diagnosis": "Nevus", "age_approx": "30", "sex": "female",
         "anatom_site": "anterior torso", "skin_type": "IV"},
        ("Benign", "Malignant"),
        ("benign", "malignant"),
    ),
}  # fmt: skip


def _skin(path: Path, colour: tuple[int, int, int]) -> None:
    """A picture of one skin colour with a dark spot in the middle."""
    pixels = np.full((48, 48, 3), colour, np.uint8)
    pixels[16:32, 16:32] = 60
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def _collection(folder: Path, name: str) -> Source:
    collection = COLLECTIONS[name]
    for image in collection.images:
        _skin(folder / image, (224, 180, 160))
    for table, text in collection.tables.items():
        (folder / table).parent.mkdir(parents=True, exist_ok=True)
        (folder / table).write_text(text)
    return read_source(folder)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_public_collection_is_recognised_and_its_columns_are_mapped(tmp_path: Path, name: str) -> None:
    collection, source = COLLECTIONS[name], _collection(tmp_path, name)
    assert source.report.recognised == (collection.recognised or name)
    assert [record.image is not None for record in source.records] == [True, True]
    assert tuple(record.class_name for record in source.records) == collection.classes
    binary = read_source(tmp_path, binary=True)
    assert tuple(record.class_name for record in binary.records) == collection.binary
    first = source.records[0]
    read = {"patient_id": first.patient_id, "lesion_id": first.lesion_id}
    for attribute in ("diagnosis", "age_approx", "sex", "anatom_site", "skin_type"):
        read[attribute] = value_of(first.row, attribute)
    assert read == dict.fromkeys(read, "") | collection.first
    assert collection.notes in " ".join(source.report.notes)


def test_tables_of_isic_2024_are_joined_wherever_they_are(tmp_path: Path) -> None:
    _collection(tmp_path / "isic", "ISIC 2024, official")
    truth = tmp_path / "isic" / "ISIC_2024_Training_GroundTruth.csv"
    supplement = tmp_path / "isic" / "ISIC_2024_Training_Supplement.csv"
    images = tmp_path / "isic" / "ISIC_2024_Training_Input"

    def attributes(path: Path, metadata: Path | None = None) -> tuple[str, ...]:
        source = read_source(path, metadata=metadata, binary=True)
        first = source.records[0]
        assert source.report.recognised == "ISIC 2024 (SLICE-3D)"
        return first.class_name, first.patient_id, first.lesion_id, value_of(first.row, "sex")

    whole = ("benign", "IP_0000001", "IL_0000001", "male")
    assert attributes(tmp_path / "isic", truth) == whole
    assert attributes(images, truth) == whole
    assert attributes(images, supplement) == whole
    assert attributes(images, images / "metadata.csv") == whole
    assert attributes(truth) == whole, "the table alone"
    packed = shutil.make_archive(str(images), "zip", tmp_path / "isic", images.name)
    shutil.rmtree(images)
    assert attributes(tmp_path / "isic") == whole, "images and metadata in a zip beside the tables"
    assert attributes(Path(packed), truth) == whole
    assert attributes(truth) == whole

    supplement.write_text(
        supplement.read_text().replace("isic_id,", "isic_id,patient_id,", 1).replace("_0000001,", "_0000001,IP_9,", 1)
    )
    with pytest.raises(
        DataError, match="Supplement.csv: gives ISIC_0000001 the patient_id 'IP_9', and another table 'IP_0000001'"
    ):
        read_source(tmp_path / "isic")


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("gender", " FEMALE", "female"),
        ("sex", "Female", "female"),
        ("sex", "F", "female"),
        ("sex", "m", "male"),
        ("localization", "Upper  Extremity", "upper extremity"),
        ("anatom_site_general", "upper_extremity", "upper extremity"),
        ("anatom_site_general", "Head / Neck", "head/neck"),
        ("region", "ARM", "arm"),
        ("age", "55.0", "55"),
        ("age_approx", "57.5", "57.5"),
        ("fitzpatrick", "Dark", "dark"),
        ("dx", "Nevus", "Nevus"),
        *((column, value, "") for column in ("sex", "age", "region", "dx", "fitzpatrick", "lesion_id") for value in (
            " ", "unknown", "UNK", "N/A", "n/a", "NaN", "<NA>", "Not specified", "None", "?", "-",
        )),
    ],
)  # fmt: skip
def test_attributes_are_written_in_one_way(column: str, value: str, expected: str) -> None:
    name = next(name for name, columns in SYNONYMS.items() if column in columns)
    assert value_of({column: value}, name) == expected


def test_groups_of_a_classifier_do_not_depend_on_spelling(tmp_path: Path) -> None:
    rows = ["image,diagnosis,sex,site,source"]
    for number in range(24):
        _skin(tmp_path / "mixed" / f"{number:02d}.png", (224, 180, 160))
        sex = ("male", "MALE", " Male ", "M")[number % 4]
        source = "clinic a" if number == 5 else "Clinic A"
        rows.append(f"{number:02d},{'nevus' if number % 3 else 'melanoma'},{sex},{('arm', 'ARM')[number % 2]},{source}")
    (tmp_path / "mixed" / "metadata.csv").write_text("\n".join(rows).replace("site", "anatom_site") + "\n")
    shares = {"train": 0.5, "validation": 0.25, "test": 0.25}
    data = load_real(tmp_path / "mixed", 16, shares=shares, progress=False)
    for part in data.parts.values():
        assert set(part.attributes["sex"]) == {"male"} and set(part.attributes["site"]) == {"arm"}
        assert set(part.attributes["source"]) == {"Clinic A"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1", "I"),
        ("6.0", "VI"),
        ("iv", "IV"),
        ("FST3", "III"),
        ("Type II", "II"),
        ("34", "III-IV"),
        ("-1", ""),
        ("dark", "dark"),
    ],
)
def test_skin_types_are_written_in_one_way(value: str, expected: str) -> None:
    assert value_of({"fitzpatrick": value}, "skin_type") == expected


def test_skin_types_and_tones_are_in_the_prepared_set_its_splits_and_its_reports(tmp_path: Path) -> None:
    colours = {"very light": (224, 180, 160), "dark": (90, 60, 48)}
    rows = []
    for number in range(24):
        tone = "dark" if number % 2 else "very light"
        _skin(tmp_path / "ddi" / f"{number:06d}.png", colours[tone])
        disease = "verruca-vulgaris" if number % 3 else "melanoma"
        rows.append(f"{number},{number},{number:06d}.png,{56 if number % 2 else 12},{number % 3 == 0},{disease}")
    table = "\n".join([",DDI_ID,DDI_file,skin_tone,malignant,disease", *rows]) + "\n"
    (tmp_path / "ddi" / "ddi_metadata.csv").write_text(table)
    prepare([read_source(tmp_path / "ddi", binary=True)], tmp_path / "set.zip", 32, progress=False)
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        prepared = list(csv.DictReader(io.StringIO(archive.read("metadata.csv").decode())))
        card = archive.read("README.md").decode()
        pixels = np.asarray(Image.open(io.BytesIO(archive.read(prepared[1]["file_name"]))))
    assert [row["skin_type"] for row in prepared[:2]] == ["I-II", "V-VI"]
    assert [row["ita_class"] for row in prepared[:2]] == ["very light", "dark"]
    angle = skin_tone(pixels)
    assert angle is not None and prepared[1]["ita"] == f"{angle:.1f}" and tone_class(angle) == "dark"
    assert "| Fitzpatrick type I-II | 12 |" in card and "| skin tone dark | 12 |" in card

    again = read_source(tmp_path / "set.zip")
    counts = attribute_counts(inspect_source(again, workers=1, progress=False))
    assert counts["skin_type"] == {"I-II": {"benign": 8, "malignant": 4}, "V-VI": {"benign": 8, "malignant": 4}}
    assert counts["skin_tone"]["very light"] == {"benign": 8, "malignant": 4}
    assert counts["skin_tone"]["tan"] == {"benign": 0, "malignant": 0}
    shares = {"train": 0.5, "validation": 0.25, "test": 0.25}
    write_split(again, split_by_patient(again.records, shares, 0), tmp_path / "split")
    with (tmp_path / "split" / "test.csv").open() as file:
        part = list(csv.DictReader(file))
    assert {(row["skin_type"], row["ita_class"]) for row in part} <= {("I-II", "very light"), ("V-VI", "dark")}
    data = load_real(tmp_path / "set.zip", 32, split=tmp_path / "split", progress=False)
    assert set(data.test.attributes["skin_type"]) <= {"I-II", "V-VI"} and "skin_tone" in data.test.attributes
    plain = load_real(tmp_path / "ddi", 32, shares=shares, progress=False)
    assert "skin_type" in plain.test.attributes and "skin_tone" not in plain.test.attributes

    # A split of the images as they are has the tones only on request, and a classifier uses them.
    source, broken = with_skin_tones(read_source(tmp_path / "ddi", binary=True), workers=1, progress=False)
    assert not broken and with_skin_tones(source, workers=1, progress=False) == (source, ())
    write_split(source, split_by_patient(source.records, shares, 0), tmp_path / "toned")
    toned = load_real(tmp_path / "ddi", 32, split=tmp_path / "toned", progress=False)
    assert set(zip(toned.test.attributes["skin_type"], toned.test.attributes["skin_tone"], strict=True)) == {
        ("I-II", "very light"),
        ("V-VI", "dark"),
    }
    (tmp_path / "ddi" / "000001.png").write_bytes(b"broken")
    source, broken = with_skin_tones(read_source(tmp_path / "ddi", binary=True), workers=1, progress=False)
    assert [name for name, _ in broken] == ["000001"] and source.records[1].row["ita_class"] == ""
    with pytest.raises(DataError, match="--skin-tone"):
        with_skin_tones(read_source(tmp_path / "ddi" / "ddi_metadata.csv"))
