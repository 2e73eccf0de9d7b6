"""What a classifier is: classifier.json, and the folder that it describes.

    classifier.json      architecture, input, classes, temperature, thresholds, provenance, metrics, SHA-256 of the others
    classifier.onnx      uint8 images in, logit and features out; normalisation is inside
    CLASSIFIER_CARD.md   and the pictures that it shows

A classifier gives one number an image, the logit of the positive class (label 1). probability = sigmoid(logit),
calibrated = sigmoid(logit / temperature); thresholds are on the calibrated probability. The folder stands alone or in a
bundle as `classifier/`. `docs/bundles.md` documents it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dermis.errors import BundleError, RequestError
from dermis.folders import DescriptorModel, FileRecord, Folder, open_folder, parse_descriptor, write_folder

CLASSIFIER_FORMAT = 1
DESCRIPTOR = "classifier.json"
MODEL = "classifier.onnx"
CARD = "CLASSIFIER_CARD.md"
DEFAULT_THRESHOLD = "default"
THRESHOLD_PATTERN = r"[a-z][a-z0-9_]{0,63}"
INTERPOLATION, CROP = "lanczos", "centre-square"  # what `dermis.classifier.preprocess` does

NOTICE = (
    "Not a medical device: for research only. These numbers are no diagnosis and must not guide the care of any person."
)


@dataclass(frozen=True)
class InputSpec:
    """What the network sees: squares of `size` px; `mean` and `std` (of values 0..1, RGB) are applied in the graph."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = INTERPOLATION
    crop: str = CROP


@dataclass(frozen=True)
class Description:
    """A classifier without its weights. `files` and `digest` are known once it is written."""

    architecture: str
    """timm's name of it."""
    input: InputSpec
    class_names: tuple[str, str]
    """Of labels 0 and 1."""
    positive_class: str
    """class_names[1]: what the probabilities are of."""
    temperature: float
    thresholds: Mapping[str, float]
    """By name, on the calibrated probability; at least "default"."""
    weights_dtype: str
    """How weights are stored: "fp16", "fp32", or "int8" for the large ones; they are computed with in float32."""
    feature_dim: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    digest: str = ""
    """SHA-256 (hex) of classifier.json: the identity of the whole classifier."""

    def threshold(self, wanted: str | float = DEFAULT_THRESHOLD) -> float:
        """The value of a named threshold, or of a number 0..1 itself. RequestError if it is neither."""
        if isinstance(wanted, str):
            if wanted not in self.thresholds:
                known = ", ".join(sorted(self.thresholds))
                raise RequestError("threshold", f"unknown; this classifier has {known}, or give a number from 0 to 1")
            return self.thresholds[wanted]
        if not 0.0 <= wanted <= 1.0:
            raise RequestError("threshold", "must be from 0 to 1")
        return float(wanted)

    def class_at(self, calibrated: float, threshold: float) -> str:
        """The class of an image: the positive one from the threshold on."""
        return self.class_names[1 if calibrated >= threshold else 0]


class _Input(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    size: int = Field(ge=8, le=4096)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)
    interpolation: str
    crop: str


class _Descriptor(DescriptorModel):
    """classifier.json."""

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


def open_classifier(location: str | Path) -> Description:
    """Read a classifier's folder (or fsspec URL) and verify every file of it. Raises BundleError."""
    return _open(location)[1]


def read_classifier_files(location: str | Path) -> tuple[Description, dict[str, bytes]]:
    """A verified classifier and all its files by name, classifier.json among them. Raises BundleError."""
    folder, described, text = _open(location)
    files = {name: folder.read(name, record) for name, record in described.files.items()}
    return described, {DESCRIPTOR: text, **files}


def read_model(location: str | Path, described: Description) -> bytes:
    """The bytes of classifier.onnx in the folder at `location`, hashed again. Raises BundleError."""
    return open_folder(location, "classifier", DESCRIPTOR).read(MODEL, described.files[MODEL])


def write_classifier(
    out: str | Path,
    described: Description,
    model: bytes,
    card: str,
    *,
    pictures: Mapping[str, bytes] | None = None,
    replace: bool = False,
) -> Description:
    """Write a classifier's folder and open it again. The folder appears whole or not at all.

    `model` is the ONNX file, `pictures` what the card shows, by name; `described.files` and `.digest` are found anew.
    Refuses an existing `out` unless `replace`. Raises BundleError.
    """
    fields = asdict(described)
    del fields["files"], fields["digest"]
    _check(described, DESCRIPTOR)
    files = {MODEL: model, CARD: card.encode(), **(pictures or {})}
    write_folder(
        Path(out), "classifier", DESCRIPTOR, {"format_version": CLASSIFIER_FORMAT, **fields}, files, replace=replace
    )
    return open_classifier(out)


def parse(text: bytes, where: str) -> Description:
    """classifier.json as a description. BundleError, naming `where` and the field, if it is none."""
    found = parse_descriptor(text, where, CLASSIFIER_FORMAT, _Descriptor)
    described = Description(
        architecture=found.architecture,
        input=InputSpec(
            size=found.input.size,
            mean=(found.input.mean[0], found.input.mean[1], found.input.mean[2]),
            std=(found.input.std[0], found.input.std[1], found.input.std[2]),
            interpolation=found.input.interpolation,
            crop=found.input.crop,
        ),
        class_names=(found.class_names[0], found.class_names[1]),
        positive_class=found.positive_class,
        temperature=found.temperature,
        thresholds=found.thresholds,
        weights_dtype=found.weights_dtype,
        feature_dim=found.feature_dim,
        provenance=found.provenance,
        metrics=found.metrics,
        files=found.records,
        digest=hashlib.sha256(text).hexdigest(),
    )
    _check(described, where)
    for name in (MODEL, CARD):
        if name not in described.files:
            raise BundleError(f"{where}: files does not list {name}; get the classifier again")
    return described


_BEGIN, _END = "<!-- classifier: written by dermis -->", "<!-- end of classifier -->"


def with_card_section(card: str, described: Description | None) -> str:
    """A bundle's card with a section on its classifier, in place of the one that it may have; without, if it has none."""
    before, begin, rest = card.partition(_BEGIN)
    after = rest.partition(_END)[2].lstrip("\n") if begin else ""
    if described is None:
        return before.rstrip("\n") + "\n" + ("\n" + after if after else "") if begin else card
    thresholds = ", ".join(f"{name} {value:.4g}" for name, value in sorted(described.thresholds.items()))
    section = f"""{_BEGIN}
## Classifier

**{NOTICE}**

`classifier/` tells {described.positive_class} from {described.class_names[0]}: {described.architecture} on
{described.input.size} px, temperature {described.temperature:.4g}, thresholds on the calibrated probability: {thresholds}.
[Its card](classifier/{CARD}) says what it was trained on and what was measured.
{_END}
"""
    return before.rstrip("\n") + "\n\n" + section + ("\n" + after if after else "")


def _open(location: str | Path) -> tuple[Folder, Description, bytes]:
    folder = open_folder(location, "classifier", DESCRIPTOR)
    text = folder.read_descriptor()
    described = parse(text, f"{folder.where}/{DESCRIPTOR}")
    folder.check_listing(described.files)
    for name, record in described.files.items():
        folder.read(name, record)
    return folder, described, text


def _check(described: Description, where: str) -> None:
    """BundleError if the fields contradict one another, or ask for what this dermis does not do."""

    def refuse(what: str) -> None:
        raise BundleError(f"{where}: {what}")

    names = described.class_names
    if len({name.casefold() for name in names}) != 2 or not all(re.fullmatch(r"[\w .-]{1,64}", name) for name in names):
        refuse("class_names must be two different names of letters, digits, space, dot, dash or underscore")
    if described.positive_class != names[1]:
        refuse(f"positive_class must be the name of label 1, {names[1]!r}")
    if (described.input.interpolation, described.input.crop) != (INTERPOLATION, CROP):
        refuse(f"input: only interpolation {INTERPOLATION!r} with crop {CROP!r} is supported; install a newer dermis")
    if any(value <= 0 for value in described.input.std):
        refuse("input.std must be above 0")
    if not (described.temperature > 0 and math.isfinite(described.temperature)):
        refuse("temperature must be above 0")
    if DEFAULT_THRESHOLD not in described.thresholds:
        refuse(f"thresholds must have {DEFAULT_THRESHOLD!r}")
    for name, value in described.thresholds.items():
        if not re.fullmatch(THRESHOLD_PATTERN, name) or not 0 <= value <= 1:
            refuse(f"thresholds.{name}: names are {THRESHOLD_PATTERN}, values from 0 to 1")
