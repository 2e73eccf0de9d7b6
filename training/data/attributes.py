"""Attributes of images: the columns that tables have for them, and one way of writing their values."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from training.data.diagnoses import is_yes

ONE_HOT_COLUMNS = ("MEL", "NV", "BCC", "AK", "AKIEC", "BKL", "DF", "VASC", "SCC", "UNK")
TWO_OF_2017 = ("melanoma", "seborrheic_keratosis")  # neither is a nevus

# Columns with the same meaning under different names.
METADATA_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "diagnosis": (
        "diagnosis", "dx", "diagnosis_3", "diagnosis_2", "diagnosis_1", "diagnostic", "disease", "iddx_full", "iddx_3",
        "iddx_2", "iddx_1",
    ),
    "age_approx": ("age_approx", "age", "age_approximate"),
    "sex": ("sex", "gender"),
    "anatom_site": (
        "anatom_site", "anatom_site_general_challenge", "anatom_site_general", "anatom_site_1", "localization", "location",
        "region",
    ),
    "skin_type": (
        "skin_type", "fitzpatrick_skin_type", "fitzpatrick_scale", "fitzpatrick", "fitzpatrick_type", "fitspatrick",
        "skin_tone",
    ),
}  # fmt: skip
GROUP_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "patient_id": ("patient_id", "patient", "patientid", "patient_uid", "subject_id", "subject"),
    "lesion_id": ("lesion_id", "lesion", "lesionid", "lesion_uid", "case_num", "case_id", "group_id"),
}
ITA, ITA_CLASS = "ita", "ita_class"
"""Columns of the individual typology angle, in degrees, and of its class, which are estimated from the image."""
SYNONYMS: Mapping[str, tuple[str, ...]] = {**METADATA_COLUMNS, **GROUP_COLUMNS}

_NO_VALUE = frozenset({
    "", "na", "n/a", "n.a.", "nan", "<na>", "nat", "none", "null", "nil", "unknown", "unk", "undefined", "undetermined",
    "missing", "unspecified", "not specified", "not available", "not applicable", "not known", "not stated", "not reported",
    "-", "--", "?",
})  # fmt: skip
_SEXES = {"f": "female", "woman": "female", "m": "male", "man": "male"}
_AGE = re.compile(r"(\d+)\.0*")
# DDI has groups of two Fitzpatrick types. In Fitzpatrick17k -1 is no type.
_SKIN_TYPES = {
    **{str(number): name for number, name in enumerate(("I", "II", "III", "IV", "V", "VI"), 1)},
    "12": "I-II", "34": "III-IV", "56": "V-VI", "-1": "",
}  # fmt: skip


def is_one_hot(columns: Sequence[str]) -> bool:
    return "MEL" in columns and "NV" in columns


def value_of(row: Mapping[str, str], name: str) -> str:
    """Value of a row in a column with this name or another name of the same meaning; "" if missing or unknown.

    Values that tables spell differently are written in one way: sex as "female" or "male", sites in lower case, ages without
    ".0", and skin types as a Roman numeral, or as a range of two, in place of the numbers of most tables.
    """
    for column in SYNONYMS.get(name, (name,)):
        value = " ".join(row.get(column, "").split())
        if value.casefold() in _NO_VALUE:
            continue
        if name in _SPELLINGS:
            value = _SPELLINGS[name](value)
        if value:
            return value
    return _diagnosis_of_classes(row) if name == "diagnosis" else ""


def preferred_spellings(values: Iterable[str]) -> dict[str, str]:
    """The most frequent spelling of values that differ in case only, by the value in lower case."""
    counts: dict[str, Counter[str]] = {}
    for value in values:
        counts.setdefault(value.casefold(), Counter())[value] += 1
    return {folded: min(each, key=lambda value: (-each[value], value)) for folded, each in counts.items()}


def _diagnosis_of_classes(row: Mapping[str, str]) -> str:
    """The diagnosis in tables that have it in the columns of the classes: one-hot, and the labels of Fitzpatrick17k."""
    if "three_partition_label" in row:
        return row.get("label", "").strip()
    if is_one_hot(tuple(row)):
        hot = [name for name in ONE_HOT_COLUMNS if _is_hot(row.get(name, ""))]
        return hot[0].lower() if hot and hot[0] != "UNK" else ""
    if set(TWO_OF_2017) <= row.keys():
        return next((name.replace("_", " ") for name in TWO_OF_2017 if is_yes(row[name])), "nevus")
    return ""


def _is_hot(value: str) -> bool:
    try:
        return float(value.replace(",", ".") or 0) > 0.5
    except ValueError:
        return False


def _skin_type(value: str) -> str:
    """A Fitzpatrick type as "I" to "VI", or two as "I-II"; another text, such as a name of a skin tone, in lower case."""
    plain = re.sub(r"^(?:fitzpatrick|skin|fst|type|[\s_])+", "", value, flags=re.IGNORECASE)
    known = _SKIN_TYPES.get(plain.removesuffix(".0"))
    if known is not None:
        return known
    return plain.upper() if plain.upper() in _SKIN_TYPES.values() else value.casefold()


def _sex(value: str) -> str:
    return _SEXES.get(value.casefold(), value.casefold())


def _site(value: str) -> str:
    """A site as in the ISIC Archive: "upper extremity", "head/neck"."""
    return re.sub(r" ?/ ?", "/", " ".join(value.casefold().replace("_", " ").split()))


def _age(value: str) -> str:
    return _AGE.sub(r"\1", value) if _AGE.fullmatch(value) else value


_SPELLINGS: Mapping[str, Callable[[str], str]] = {
    "age_approx": _age,
    "sex": _sex,
    "anatom_site": _site,
    "skin_type": _skin_type,
}
