"""The folder of a classifier, which classifier.json describes.

    classifier.json      architecture, input, classes, temperature, thresholds, provenance, metrics, SHA-256 of the others
    classifier.onnx      takes uint8 images, returns logits and features; the graph contains the normalisation
    CLASSIFIER_CARD.md   the classifier's card, and the pictures that it shows

A classifier gives one number for each image: the logit of the positive class (label 1). probability = sigmoid(logit),
calibrated = sigmoid(logit / temperature). Thresholds apply to the calibrated probability. The folder stands alone, or in a
bundle as `classifier/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dermis.bundle.folder import (
    DescriptorModel,
    FileRecord,
    PartFormat,
    check_listed,
    open_folder,
    parse_descriptor,
    read_part,
    write_part,
)
from dermis.errors import BundleError, RequestError

CLASSIFIER_FORMAT = 1
DESCRIPTOR = "classifier.json"
MODEL = "classifier.onnx"
CLASSIFIER_CARD = "CLASSIFIER_CARD.md"
DEFAULT_THRESHOLD = "default"
THRESHOLD_PATTERN = r"[a-z][a-z0-9_]{0,63}"
INTERPOLATION, CROP = "lanczos", "centre-square"  # the only preprocessing: `dermis.classifier.preprocess`

NOTICE = (
    "Not a medical device: for research only. These numbers are no diagnosis and must not guide the care of any person."
)


@dataclass(frozen=True)
class InputSpec:
    """The images that the network takes.

    Attributes:
        size: Side of the square images, px.
        mean: Mean of R, G and B (values 0..1), which the graph subtracts.
        std: Standard deviation of R, G and B (values 0..1), by which the graph divides.
        interpolation: How images are resized.
        crop: Which part of an image is used.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = INTERPOLATION
    crop: str = CROP


@dataclass(frozen=True)
class ClassifierDescription:
    """A classifier without its weights. `files` and `digest` are empty until it is written."""

    architecture: str
    """Name of the network in timm."""
    input: InputSpec
    class_names: tuple[str, str]
    """Names of labels 0 and 1."""
    positive_class: str
    """class_names[1], the class whose probability the classifier gives."""
    temperature: float
    thresholds: Mapping[str, float]
    """Thresholds of the calibrated probability by name. "default" is always among them."""
    weights_dtype: str
    """How weights are stored: "fp16", "fp32", or "int8" for the large ones. Computations use float32."""
    feature_dim: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of classifier.json. It identifies the whole classifier."""

    def threshold(self, name_or_value: str | float = DEFAULT_THRESHOLD) -> float:
        """Look up a threshold.

        Args:
            name_or_value: Name of a threshold, or a number from 0 to 1, which is returned itself.

        Raises:
            RequestError: There is no threshold of this name, or the number is out of range.
        """
        if isinstance(name_or_value, str):
            if name_or_value not in self.thresholds:
                known = ", ".join(sorted(self.thresholds))
                raise RequestError("threshold", f"unknown; this classifier has {known}, or give a number from 0 to 1")
            return self.thresholds[name_or_value]
        if not 0.0 <= name_or_value <= 1.0:
            raise RequestError("threshold", "must be from 0 to 1")
        return float(name_or_value)

    def class_at(self, calibrated: float, threshold: float) -> str:
        """Return the class of an image: the positive class if its calibrated probability reaches the threshold."""
        return self.class_names[1 if calibrated >= threshold else 0]


class _Input(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    size: int = Field(ge=8, le=4096)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    interpolation: str
    crop: str


class _ClassifierDescriptor(DescriptorModel):
    """The fields of classifier.json."""

    architecture: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")
    input: _Input
    class_names: list[str] = Field(min_length=2, max_length=2)
    positive_class: str
    temperature: float = Field(gt=0)
    thresholds: dict[str, float]
    weights_dtype: str
    feature_dim: int = Field(ge=1)
    provenance: dict[str, Any]
    metrics: dict[str, Any]


def open_classifier(location: str | Path) -> ClassifierDescription:
    """Open a classifier in a folder or at an fsspec URL and verify every file of it.

    Raises:
        BundleError: A file is missing, changed or not listed, or classifier.json is malformed.
    """
    return read_classifier_files(location)[0]


def read_classifier_files(location: str | Path) -> tuple[ClassifierDescription, dict[str, bytes]]:
    """Read and verify a classifier's folder.

    Returns:
        The description, and the content of all files by name with classifier.json among them.

    Raises:
        BundleError: As `open_classifier`.
    """
    return read_part(location, "classifier", DESCRIPTOR, parse)


def read_model(location: str | Path, description: ClassifierDescription) -> bytes:
    """Read classifier.onnx from the folder at `location` and compare it with its record.

    Raises:
        BundleError: The file is missing or was changed.
    """
    return open_folder(location, "classifier", DESCRIPTOR).read(MODEL, description.files[MODEL])


def write_classifier(
    out: str | Path,
    description: ClassifierDescription,
    model: bytes,
    card: str,
    *,
    pictures: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> ClassifierDescription:
    """Write a classifier's folder and open it. The folder appears completely or not at all.

    Args:
        out: Path of the folder.
        description: The classifier. Its `files` and `digest` are ignored.
        model: Content of the ONNX file.
        card: The classifier's card in Markdown.
        pictures: Files that the card shows, by name.
        replace: Whether an existing classifier at `out` is replaced.

    Returns:
        The description with `files` and `digest` of the folder.

    Raises:
        BundleError: `out` exists and may not be replaced, the description is not valid, or the folder cannot be written.
    """
    _check(description, DESCRIPTOR)
    files = {MODEL: model, CLASSIFIER_CARD: card.encode(), **(pictures or {})}
    write_part(out, "classifier", DESCRIPTOR, CLASSIFIER_FORMAT, description, files, replace=replace)
    return open_classifier(out)


def parse(text: bytes, where: str) -> ClassifierDescription:
    """Parse classifier.json.

    Args:
        text: The bytes of the file.
        where: Name of the file for errors.

    Raises:
        BundleError: The text is not a valid classifier.json. The message names the field.
    """
    fields = parse_descriptor(text, where, CLASSIFIER_FORMAT, _ClassifierDescriptor)
    description = ClassifierDescription(
        architecture=fields.architecture,
        input=InputSpec(
            size=fields.input.size,
            mean=(fields.input.mean[0], fields.input.mean[1], fields.input.mean[2]),
            std=(fields.input.std[0], fields.input.std[1], fields.input.std[2]),
            interpolation=fields.input.interpolation,
            crop=fields.input.crop,
        ),
        class_names=(fields.class_names[0], fields.class_names[1]),
        positive_class=fields.positive_class,
        temperature=fields.temperature,
        thresholds=fields.thresholds,
        weights_dtype=fields.weights_dtype,
        feature_dim=fields.feature_dim,
        provenance=fields.provenance,
        metrics=fields.metrics,
        files=fields.records,
        digest=hashlib.sha256(text).hexdigest(),
    )
    _check(description, where)
    check_listed(description.files, (MODEL, CLASSIFIER_CARD), where, "classifier")
    return description


def _check(description: ClassifierDescription, where: str) -> None:
    """Raise BundleError if fields contradict each other or need a newer dermis."""

    def refuse(what: str) -> None:
        raise BundleError(f"{where}: {what}")

    names = description.class_names
    if len({name.casefold() for name in names}) != 2 or not all(re.fullmatch(r"[\w .-]{1,64}", name) for name in names):
        refuse("class_names must be two different names of letters, digits, space, dot, dash or underscore")
    if description.positive_class != names[1]:
        refuse(f"positive_class must be the name of label 1, {names[1]!r}")
    if (description.input.interpolation, description.input.crop) != (INTERPOLATION, CROP):
        refuse(f"input: only interpolation {INTERPOLATION!r} with crop {CROP!r} is supported; install a newer dermis")
    if any(value <= 0 for value in description.input.std):
        refuse("input.std must be above 0")
    if not (description.temperature > 0 and math.isfinite(description.temperature)):
        refuse("temperature must be above 0")
    if DEFAULT_THRESHOLD not in description.thresholds:
        refuse(f"thresholds must have {DEFAULT_THRESHOLD!r}")
    for name, value in description.thresholds.items():
        if not re.fullmatch(THRESHOLD_PATTERN, name) or not 0 <= value <= 1:
            refuse(f"thresholds.{name}: names are {THRESHOLD_PATTERN}, values from 0 to 1")


CLASSIFIER_PART = PartFormat("classifier", DESCRIPTOR, parse, read_classifier_files)
