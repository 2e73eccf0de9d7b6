"""What `/v1/models` says of where a bundle comes from. Bundles of other programs may state less, or in another form."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from services.gateway.schemas.common import ResponseBody

_MAX_TEXT = 300
_MAX_ITEMS = 100
_SHA256 = re.compile(r"[0-9a-f]{64}")
Option = str | float | bool | None


class ModelTrainingSet(ResponseBody):
    """The images that a generator was trained with."""

    name: str | None = Field(description="Name of the training set.")
    images: int | None
    classes: dict[str, int] = Field(description="Number of images of each class; empty if it is not stated.")
    sha256: str | None = Field(
        description="SHA-256 of the ids, classes and files of the images; null if it is not stated, for instance because they "
        "are those of a federation."
    )


class ModelChange(ResponseBody):
    """Options that were changed during a training."""

    kimg: float = Field(description="Thousands of images that had been shown when the options were changed.")
    before: dict[str, Option] = Field(description="The values before, by name.")
    after: dict[str, Option] = Field(description="The values from then on.")


class ModelTraining(ResponseBody):
    """How a generator was trained. The model card has all options."""

    hardware: str | None
    hours: float | None = Field(description="Hours that the training took.")
    seed: int | None
    batch: int | None = Field(description="Images of one step.")
    changes: list[ModelChange] = Field(description="Options that were changed during the training.")


class ModelPrivacy(ResponseBody):
    """The differential privacy of the training."""

    epsilon: float | None = Field(description="Null if nothing is guaranteed.")
    delta: float | None
    unit: str | None = Field(description="Whose images two neighbouring training sets differ by, such as patient.")


class ModelProvenance(ResponseBody):
    """Where a bundle comes from, as it states it."""

    code_version: str | None = Field(description="Version of dermis that wrote the bundle.")
    dataset: ModelTrainingSet | None = Field(description="Null if the bundle does not state it.")
    training: ModelTraining | None = Field(description="Null if the bundle does not state it.")
    privacy: ModelPrivacy | None = Field(description="Null if the training was not differentially private.")


def provenance_of(provenance: Mapping[str, Any]) -> ModelProvenance:
    """The body that describes the provenance of a bundle. What has another form is left out."""
    dataset, training = _section(provenance, "dataset"), _section(provenance, "training")
    privacy = _section(provenance, "privacy")
    return ModelProvenance(
        code_version=_text(provenance.get("code_version")),
        dataset=None if dataset is None else _training_set(dataset),
        training=None if training is None else _training(training),
        privacy=None
        if privacy is None
        else ModelPrivacy(
            epsilon=_number(privacy.get("epsilon")),
            delta=_number(privacy.get("delta")),
            unit=_text(privacy.get("unit")),
        ),
    )


def _training_set(dataset: Mapping[str, Any]) -> ModelTrainingSet:
    counts = _section(dataset, "classes") or {}
    digest = _text(dataset.get("sha256"))
    return ModelTrainingSet(
        name=_text(dataset.get("name")),
        images=_whole(dataset.get("images")),
        classes={name[:_MAX_TEXT]: count for name, value in counts.items() if (count := _whole(value)) is not None},
        sha256=digest if digest is not None and _SHA256.fullmatch(digest) else None,
    )


def _training(training: Mapping[str, Any]) -> ModelTraining:
    options = _section(training, "configuration") or {}
    changes = training.get("changes")
    return ModelTraining(
        hardware=_text(training.get("hardware")),
        hours=_number(training.get("hours")),
        seed=_whole(options.get("seed")),
        batch=_whole(options.get("batch")),
        changes=[
            ModelChange(kimg=kimg, before=_options(change.get("before")), after=_options(change.get("after")))
            for change in (changes if isinstance(changes, list) else [])[:_MAX_ITEMS]
            if isinstance(change, Mapping) and (kimg := _number(change.get("kimg"))) is not None
        ],
    )


def _options(values: Any) -> dict[str, Option]:
    if not isinstance(values, Mapping):
        return {}
    result: dict[str, Option] = {}
    for name, value in list(values.items())[:_MAX_ITEMS]:
        if value is None or isinstance(value, bool):
            result[str(name)[:_MAX_TEXT]] = value
        else:
            result[str(name)[:_MAX_TEXT]] = number if (number := _number(value)) is not None else str(value)[:_MAX_TEXT]
    return result


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    section = values.get(name)
    return section if isinstance(section, Mapping) else None


def _text(value: Any) -> str | None:
    return value[:_MAX_TEXT] if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    fits = (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)
    )
    return float(value) if fits else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63 else None
