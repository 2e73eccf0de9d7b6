"""Types of the columns of a dataset, for Arrow and as YAML, JSON and Python of Hugging Face.

A type is the name of an Arrow type, `IMAGE`, `LABEL` (a number that stands for a class name), or a mapping of fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dermis.dataset.plan import DatasetPlan
from dermis.imaging import SUFFIXES

# The columns of the ISIC Archive's metadata first, so that synthetic and real sets can be combined. Columns that
# have no meaning for a synthetic image stay empty.
COLUMNS = (
    "isic_id",
    "patient_id",
    "diagnosis",
    "target",
    "age_approx",
    "sex",
    "anatom_site",
    "source",
    "file_name",
    "label",
    "seed",
    "index",
    "sha256",
)
PROBABILITY = "probability"  # a further column if the images are scored
# Further columns if the images are compared with the training images
PRIVACY = ("nearest_distance", "distance_percentile", "authentic", "gate")

IMAGE, LABEL = "image", "label"
Kind = str | Mapping[str, str]

# Columns that are empty for synthetic images have the type that they have in the ISIC Archive's metadata.
_KINDS: dict[str, str] = {
    **dict.fromkeys(COLUMNS, "string"),
    "age_approx": "float64",
    "label": LABEL,
    "seed": "int64",
    "index": "int64",
    PROBABILITY: "float64",
    **dict(zip(PRIVACY, ("float64", "int64", "int64", "string"), strict=True)),
}
_EMPTY = ("patient_id", "diagnosis", "age_approx", "sex", "anatom_site")


def columns(plan: DatasetPlan) -> tuple[str, ...]:
    """Return the columns of metadata.csv."""
    return (*COLUMNS, *([PROBABILITY] if plan.scored else []), *(PRIVACY if plan.gated else []))


def table_kinds(plan: DatasetPlan) -> dict[str, str]:
    """Return the type of every column of metadata.csv."""
    return {name: _KINDS[name] for name in columns(plan)}


def feature_kinds(plan: DatasetPlan) -> dict[str, Kind]:
    """Return the type of every column as the Hugging Face `datasets` library reads the plan's format."""
    table = table_kinds(plan)
    if plan.request.format == "imagefolder":
        return {"image": IMAGE, "label": LABEL, **_without(table, "file_name", "label")}
    if plan.request.format == "parquet":
        return {"image": IMAGE, "label": LABEL, **_without(table, "file_name", "label", *_EMPTY)}
    image = SUFFIXES[plan.request.image_format].removeprefix(".")
    row = _without(table, *_EMPTY)
    return {image: IMAGE, "cls": LABEL, "json": row, "__key__": "string", "__url__": "string"}


def _without(kinds: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: kind for name, kind in kinds.items() if name not in names}


def features_json(kinds: Mapping[str, str], class_names: Sequence[str]) -> dict[str, Any]:
    """Return the value of `info.features` in the `huggingface` metadata of an Arrow schema."""
    special = {IMAGE: {"_type": "Image"}, LABEL: {"names": list(class_names), "_type": "ClassLabel"}}
    return {name: special.get(kind, {"dtype": kind, "_type": "Value"}) for name, kind in kinds.items()}


def features_yaml(kinds: Mapping[str, Kind], class_names: Sequence[str], indent: str = "") -> list[str]:
    """Return the lines of the list `features` in the front matter of a dataset card."""
    lines = []
    for name, kind in kinds.items():
        lines.append(f"{indent}- name: {json.dumps(name)}")
        if not isinstance(kind, str):
            lines += [f"{indent}  struct:", *features_yaml(kind, class_names, indent + "  ")]
        elif kind == LABEL:
            lines += [f"{indent}  dtype:", f"{indent}    class_label:", f"{indent}      names:"]
            lines += [f"{indent}        '{label}': {json.dumps(each)}" for label, each in enumerate(class_names)]
        else:
            lines.append(f"{indent}  dtype: {kind}")
    return lines


def features_code(kinds: Mapping[str, Kind], class_names: Sequence[str]) -> str:
    """Return a Python expression of the `Features` object. It uses names of `datasets` without a prefix."""
    return f"Features({_code(kinds, class_names, '')})"


def _code(kinds: Mapping[str, Kind], class_names: Sequence[str], indent: str) -> str:
    lines = ["{"]
    for name, kind in kinds.items():
        if not isinstance(kind, str):
            value = _code(kind, class_names, indent + "    ")
        elif kind == LABEL:
            value = f"ClassLabel(names={json.dumps(list(class_names))})"
        else:
            value = "Image()" if kind == IMAGE else f'Value("{kind}")'
        lines.append(f'{indent}    "{name}": {value},')
    return "\n".join([*lines, indent + "}"])
