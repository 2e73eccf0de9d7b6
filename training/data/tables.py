"""ISIC tables: which columns name the image, its class, its patient, and how a diagnosis becomes a class.

Understood are the CSVs of the ISIC challenges of 2019 (one-hot GroundTruth, with its Metadata beside it) and 2020, of
HAM10000 and of the ISIC Archive's own download tool.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dermis.errors import DataError

ID_COLUMNS = ("isic_id", "image_name", "image", "image_id")
CLASS_COLUMNS = ("target", "benign_malignant", "diagnosis_1", "class", "label", "dx", "diagnosis")
ONE_HOT_COLUMNS = ("MEL", "NV", "BCC", "AK", "AKIEC", "BKL", "DF", "VASC", "SCC", "UNK")
TABLE_SUFFIXES = (".csv", ".csv.gz")

# What the tables call the same thing.
METADATA_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "diagnosis": ("diagnosis", "dx", "diagnosis_3", "diagnosis_2", "diagnosis_1"),
    "age_approx": ("age_approx", "age"),
    "sex": ("sex",),
    "anatom_site": ("anatom_site", "anatom_site_general_challenge", "anatom_site_general", "localization"),
}
_NO_VALUE = frozenset({"", "na", "nan", "none", "null", "unknown"})
_NO_CLASS = frozenset({"", "na", "nan", "none", "null"})
_MELANOMA = re.compile(r"(?<!non)(?<!non[- ])(?<!not )\bmelanoma\b", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """Rows of a CSV in file order. classes are '' where a row has none; class_column is '' if the table has no class."""

    file: Path
    id_column: str
    class_column: str
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    rows: tuple[dict[str, str], ...]


def read_table(file: Path, class_column: str | None = None, *, binary: bool = False) -> Table:
    """Read a CSV (or .csv.gz) with one row an image.

    `class_column` defaults to the first of CLASS_COLUMNS that the CSV has, else to the one-hot columns of ISIC 2019;
    0/1 become benign/malignant. `binary` makes melanoma "malignant" and every other diagnosis "benign", as in the ISIC
    2020 challenge. `X_Metadata.csv` beside `X_GroundTruth.csv` adds its columns. Raises DataError naming the column
    or row at fault.
    """
    frame = _read_csv(file)
    id_column = next((name for name in ID_COLUMNS if name in frame.columns), None)
    if id_column is None:
        raise DataError(f"{file}: none of the columns {', '.join(ID_COLUMNS)} names the images")
    if class_column is not None and class_column not in frame.columns:
        raise DataError(f"{file}: no column {class_column}; name one of {', '.join(frame.columns)} with --class-column")
    repeated = frame[id_column][frame[id_column].duplicated()]
    if len(repeated):
        raise DataError(f"{file}: {repeated.iloc[0]} stands in more than one row")
    if not len(frame):
        raise DataError(f"{file}: no rows")
    column, classes = (_binary_classes if binary else _classes)(file, frame, class_column)
    frame = _with_companion(file, frame, id_column)
    rows = tuple(frame.to_dict("records"))
    return Table(file, id_column, column, tuple(frame[id_column]), tuple(classes), rows)


def find_table(folder: Path) -> Path | None:
    """metadata.csv in a folder, else the only CSV there that names images and classes; None if there is none."""
    if (folder / "metadata.csv").is_file():
        return folder / "metadata.csv"
    found = []
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.lower().endswith(TABLE_SUFFIXES):
            columns = set(_read_csv(file, rows=0).columns)
            if columns & set(ID_COLUMNS) and (columns & set(CLASS_COLUMNS) or _is_one_hot(columns)):
                found.append(file)
    if len(found) > 1:
        raise DataError(f"{folder}: both {found[0].name} and {found[1].name} have classes; choose one with --metadata")
    return found[0] if found else None


def value_of(row: Mapping[str, str], name: str) -> str:
    """A row's value under whichever of its METADATA_COLUMNS it has, or under its own name; '' if missing or unknown."""
    for column in METADATA_COLUMNS.get(name, (name,)):
        value = row.get(column, "").strip()
        if value.lower() not in _NO_VALUE:
            return value
    return ""


def is_melanoma(value: str) -> bool:
    """Does a class or diagnosis, in any of the tables' wordings, mean melanoma?"""
    return value.strip().lower() in ("1", "1.0", "malignant", "mel") or bool(_MELANOMA.search(value))


def _read_csv(file: Path, rows: int | None = None) -> pd.DataFrame:
    if not file.is_file():
        raise DataError(f"{file}: no such file; an ISIC folder has a CSV of its images, name it with --metadata")
    try:
        return pd.read_csv(file, dtype=str, keep_default_na=False, nrows=rows)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a readable CSV ({error})") from error


def _with_companion(file: Path, frame: pd.DataFrame, id_column: str) -> pd.DataFrame:
    companion = file.with_name(file.name.replace("GroundTruth", "Metadata"))
    if companion == file or not companion.is_file():
        return frame
    extra = _read_csv(companion)
    if id_column not in extra.columns or extra[id_column].duplicated().any():
        raise DataError(f"{companion}: must have one row for each {id_column} of {file.name}")
    extra = extra[[id_column, *(name for name in extra.columns if name not in frame.columns)]]
    return frame.merge(extra, on=id_column, how="left", sort=False).fillna("")


def _classes(file: Path, frame: pd.DataFrame, class_column: str | None) -> tuple[str, Sequence[str]]:
    column = class_column or next((name for name in CLASS_COLUMNS if name in frame.columns), None)
    if column is None:
        return ("MEL, NV, ...", _one_hot(file, frame)) if _is_one_hot(frame.columns) else ("", [""] * len(frame))
    classes = ["" if value.strip().lower() in _NO_CLASS else value for value in frame[column]]
    if set(classes) - {""} <= {"0", "1", "0.0", "1.0"}:
        classes = [value and ("malignant" if float(value) else "benign") for value in classes]
    return column, classes


def _binary_classes(file: Path, frame: pd.DataFrame, class_column: str | None) -> tuple[str, Sequence[str]]:
    if class_column is None and "target" not in frame.columns:
        if _is_one_hot(frame.columns):
            codes = _one_hot(file, frame)
            return "MEL", ["" if code in ("", "unk") else _binary(code) for code in codes]
        detailed = sorted(name for name in frame.columns if re.fullmatch(r"diagnosis_[1-9]", name))
        if "dx" not in frame.columns and len(detailed) > 1:
            return detailed[0], [_binary_of_path(path) for path in frame[detailed].itertuples(index=False)]
    candidates = ("target", "dx", "diagnosis", "class", "label")
    column = class_column or next((name for name in candidates if name in frame.columns), None)
    if column is None:
        raise DataError(f"{file}: no diagnosis to tell melanoma by; name its column with --class-column")
    return column, ["" if value.strip().lower() in _NO_VALUE else _binary(value) for value in frame[column]]


def _binary(value: str) -> str:
    return "malignant" if is_melanoma(value) else "benign"


def _binary_of_path(path: Sequence[str]) -> str:
    """The ISIC Archive's diagnosis_1..5, from general to special: malignant of no further kind may be anything."""
    values = [value for value in path if value.strip().lower() not in _NO_VALUE]
    if any(_MELANOMA.search(value) for value in values):
        return "malignant"
    return "" if not values or (len(values) == 1 and values[0].lower() == "malignant") else "benign"


def _is_one_hot(columns: Sequence[str] | set[str]) -> bool:
    return "MEL" in columns and "NV" in columns


def _one_hot(file: Path, frame: pd.DataFrame) -> list[str]:
    columns = [name for name in ONE_HOT_COLUMNS if name in frame.columns]
    try:
        hot = frame[columns].astype(float) > 0.5
    except ValueError as error:
        raise DataError(f"{file}: {', '.join(columns)} must be numbers, 0 or 1 ({error})") from error
    several = hot.index[hot.sum(axis=1) > 1]
    if len(several):
        raise DataError(f"{file}: row {several[0] + 2} has more than one of {', '.join(columns)}")
    return [next((name.lower() for name, on in zip(columns, row, strict=True) if on), "") for row in hot.to_numpy()]
