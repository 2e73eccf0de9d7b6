"""Every DICOM object against the tables of the standard, by dicom-validator's IODValidator.

dicom-validator gets its tables from the network. Those of highdicom are used instead: modules of the storage classes, and
attributes of modules and nested items with their types. They have no conditions and no enumerated values: those of the
attributes that the objects have, or could miss, are below, from the same part of the standard (PS3.3).
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import pytest

from dermis.exports.dicom import DicomClass, dicom_files
from dermis.exports.source import open_source
from painted_dataset import make
from tiny import make_bundle

pydicom: Any = pytest.importorskip("pydicom", reason="pydicom is not installed")
pytest.importorskip("highdicom", reason="highdicom is not installed")
pytest.importorskip("dicom_validator", reason="dicom-validator is not installed")

IODS = {"dermoscopic": "dermoscopic-photography-image", "photographic": "vl-photographic-image"}
MODALITIES = {"dermoscopic": "DMS", "photographic": "XC"}
# In the edition of these tables dermoscopic photography has no frame of reference, which earlier ones require.
FURTHER = {"dermoscopic": {"FrameOfReferenceUID", "PositionReferenceIndicator"}, "photographic": set[str]()}


def when(keyword: str, op: str, *values: Any, index: int = 0, kind: str = "MU") -> dict[str, Any]:
    """A condition: required if it holds, and otherwise allowed (MU) or not (MN)."""
    return {"type": kind, "tag": tag(keyword), "op": op, "index": index, "values": list(values)}


def tag(keyword: str) -> str:
    number = pydicom.datadict.tag_for_keyword(keyword)
    return f"({number >> 16:04X},{number & 0xFFFF:04X})"


@cache
def conditions() -> dict[tuple[str, ...], dict[str, Any]]:
    palette = when("PhotometricInterpretation", "=", "PALETTE COLOR", kind="MN")
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    item = ("AcquisitionContextSequence",)
    value = {"TEXT": "TextValue", "CODE": "ConceptCodeSequence", "NUMERIC": "NumericValue", "DATE": "Date"}
    return {
        ("PlanarConfiguration",): when("SamplesPerPixel", ">", 1, kind="MN"),
        **{(f"{name}{end}",): palette for name in names for end in ("Descriptor", "Data")},
        ("DeidentificationMethod",): {
            "type": "MU",
            "and": [when("PatientIdentityRemoved", "=", "YES"), when("DeidentificationMethodCodeSequence", "-")],
        },
        ("TrackingID",): when("TrackingUID", "+", kind="MN"),
        ("TrackingUID",): when("TrackingID", "+", kind="MN"),
        ("SpecificCharacterSet",): when("PatientName", "+"),  # objects have texts in UTF-8
        ("WindowWidth",): when("WindowCenter", "+", kind="MN"),
        **{(*item, keyword): when("ValueType", "=", kind, kind="MN") for kind, keyword in value.items()},
        **{
            (*path, "CodingSchemeDesignator"): when("CodeValue", "+")
            for path in [
                (*item, "ConceptNameCodeSequence"),
                (*item, "ConceptCodeSequence"),
                ("AnatomicRegionSequence",),
            ]
        },
    }


def enumerated(kind: str) -> dict[tuple[str, ...], list[Any]]:
    """Enumerated values. The first and the second value of ImageType are in `index_values`."""
    return {
        ("Modality",): [MODALITIES[kind]],
        ("SyntheticData",): ["YES", "NO"],
        ("PatientSex",): ["M", "F", "O"],
        ("PatientIdentityRemoved",): ["YES", "NO"],
        ("BurnedInAnnotation",): ["YES", "NO"],
        ("RecognizableVisualFeatures",): ["YES", "NO"],
        ("Laterality",): ["R", "L"],
        ("LossyImageCompression",): ["00", "01"],
        ("PhotometricInterpretation",): ["MONOCHROME2", "RGB", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"],
        ("SamplesPerPixel",): [1, 3],
        ("PlanarConfiguration",): [0],
        ("BitsAllocated",): [8],
        ("BitsStored",): [8],
        ("HighBit",): [7],
        ("PixelRepresentation",): [0],
        ("AcquisitionContextSequence", "ValueType"): ["TEXT", "NUMERIC", "CODE", "DATE", "TIME", "PNAME"],
    }


@cache
def standard(name: str) -> Any:
    """A file of highdicom's tables."""
    return json.loads((files("highdicom") / "_standard" / name).read_text())


@cache
def tables(kind: str) -> Any:
    """The tables of one storage class in the form of dicom-validator."""
    from dicom_validator.validator.dicom_info import DicomInfo

    attributes = standard("module_attribute_map.json")
    values, index_values = enumerated(kind), [("1", ["ORIGINAL", "DERIVED"]), ("2", ["PRIMARY", "SECONDARY"])]
    modules: dict[str, Any] = {}
    used: dict[str, Any] = {}
    for module in standard("iod_module_map.json")[IODS[kind]]:
        key = module["key"]
        used[key] = {"ref": key, "use": "M" if module["usage"] == "M" else "U"}
        modules[key] = {}
        for each in attributes[key]:
            place = modules[key]
            for parent in each["path"]:
                place = place.setdefault(tag(parent), {"type": "3"}).setdefault("items", {})
            if pydicom.datadict.tag_for_keyword(each["keyword"]) is None:
                continue  # newer than pydicom
            path = (*each["path"], each["keyword"])
            entry = place.setdefault(tag(each["keyword"]), {})
            entry |= {"name": each["keyword"], "type": each["type"]}
            if path in conditions():
                entry["cond"] = conditions()[path]
            if path in values:
                entry["enums"] = [{"val": values[path]}]
            if path == ("ImageType",):
                entry["enums"] = [{"val": allowed, "index": index} for index, allowed in index_values]
    uid = {"dermoscopic": "1.2.840.10008.5.1.4.1.1.77.1.7", "photographic": "1.2.840.10008.5.1.4.1.1.77.1.4"}[kind]
    return DicomInfo({}, {uid: {"modules": used, "group_macros": {}}}, modules)


def problems(dataset: Any, kind: str) -> set[tuple[str, str]]:
    """What dicom-validator finds: keyword and kind of each problem."""
    from dicom_validator.validator.error_handler import NullValidationResultHandler
    from dicom_validator.validator.iod_validator import IODValidator

    result = IODValidator(dataset, tables(kind), error_handler=NullValidationResultHandler()).validate()
    return {
        (pydicom.datadict.keyword_for_tag(each.tag), error.code.name)
        for errors in result.module_errors.values()
        for each, error in errors.items()
        if not (each.parents is None and pydicom.datadict.keyword_for_tag(each.tag) in FURTHER[kind])
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a dataset of PNG files and of one of JPEG files."""
    place = tmp_path_factory.mktemp("data")
    bundle = make_bundle(place / "bundle", classes=("benign", "malignant", "a b.c"))
    for kind in ("png", "jpeg"):
        make(place / kind, bundle, classes={"malignant": 5, "a b.c": 4}, seed=3, image_format=kind)
    return place


def datasets(folder: Path, kind: DicomClass) -> Iterator[Any]:
    for _, data in dicom_files(open_source(folder), kind):
        yield pydicom.dcmread(io.BytesIO(data))


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
@pytest.mark.parametrize("kind", get_args(DicomClass))
def test_dicom_validator_finds_no_problem_in_any_object(made: Path, kind: DicomClass, image_format: str) -> None:
    found = [problems(dataset, kind) for dataset in datasets(made / image_format, kind)]
    assert found == [set()] * 9


DAMAGES: list[tuple[str, Any, str]] = [
    ("PatientName", None, "TagMissing"),  # type 2
    ("Rows", None, "TagMissing"),  # type 1
    ("ImageType", "", "TagEmpty"),
    ("PlanarConfiguration", None, "TagMissing"),  # type 1C, as there are 3 samples
    ("DeidentificationMethod", None, "TagMissing"),  # type 1C, as the identity was removed
    ("RedPaletteColorLookupTableDescriptor", [1, 0, 16], "TagNotAllowed"),
    ("BurnedInAnnotation", "MAYBE", "EnumValueNotAllowed"),
    ("Modality", "CT", "EnumValueNotAllowed"),
    ("ImageType", ["DERIVED", "THIRD"], "EnumValueNotAllowed"),
    ("StudyInstanceUID", "no uid", "InvalidValue"),
    ("KVP", "1", "TagUnexpected"),
]


@pytest.mark.parametrize("kind", get_args(DicomClass))
def test_damaged_objects_and_items_are_found(made: Path, kind: DicomClass) -> None:
    whole = next(datasets(made / "png", kind))
    for keyword, value, expected in DAMAGES:
        dataset = copy.deepcopy(whole)
        if value is None:
            del dataset[keyword]
        else:
            with pydicom.config.disable_value_validation():
                setattr(dataset, keyword, value)
        assert (keyword, expected) in problems(dataset, kind), keyword
    first, second = whole.AcquisitionContextSequence[:2]
    del first.ConceptCodeSequence, second.ConceptNameCodeSequence
    del whole.AnatomicRegionSequence[0].CodeMeaning
    found = problems(whole, kind)
    assert {(name, "TagMissing") for name in ("ConceptCodeSequence", "ConceptNameCodeSequence", "CodeMeaning")} <= found
