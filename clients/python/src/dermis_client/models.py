"""What the service answers, as typed and frozen pydantic models; fields of a later service are kept, not refused."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from dermis_client._writing import write_whole
from dermis_client.errors import IntegrityError

DatasetState = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what fits in 64 bits: more would be too long for a file's name
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Answer(BaseModel):
    """Base of all: frozen, tolerant of fields that this version does not know (they stay readable as attributes)."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True, allow_inf_nan=False)


class FieldError(Answer):
    """One wrong value of a request. field: its dotted path, such as "classes.melanoma"."""

    field: str = ""
    message: str = ""


class Problem(Answer):
    """An RFC 9457 problem document."""

    type: str = "about:blank"
    title: str = ""
    status: Whole | None = None
    detail: str = ""
    instance: str | None = None
    request_id: str | None = None
    errors: list[FieldError] = []

    @property
    def kind(self) -> str:
        """The last part of `type`, such as "unknown-class"; "" if the service gave no type."""
        return "" if self.type == "about:blank" else self.type.rsplit(":", 1)[-1]


class ModelRef(Answer):
    """Which model made something. digest: SHA-256 of its bundle.json, the identity of the whole bundle."""

    name: str
    digest: str


class ModelClassifier(Answer):
    """The classifier of a model. thresholds: by name, on the calibrated probability. input_size in px."""

    digest: str
    architecture: str | None = None
    input_size: Count | None = None
    classes: list[str] = []
    positive_class: str | None = None
    temperature: float | None = None
    thresholds: dict[str, float] = {}
    metrics: dict[str, Any] = {}


class Model(ModelRef):
    """A generator that the service offers. card (markdown) comes only from `models.retrieve(name)`."""

    default: bool = False
    resolution: Count | None = None
    classes: list[str] = []
    z_dim: Count | None = None
    w_dim: Count | None = None
    num_ws: Count | None = None
    licence: str | None = None
    attribution: str | None = None
    kimg: float | None = None
    metrics: dict[str, Any] = {}
    classifier: ModelClassifier | None = None
    authenticity: dict[str, Any] | None = None  # the index of its training images, if it has one; "uploads": compared?
    directions: list[str] = []
    card: str | None = None


class ClassificationModel(ModelRef):
    """Which bundle classified images, and with which classifier (SHA-256 of its classifier.json)."""

    classifier: str


class Threshold(Answer):
    """What the calibrated probability was compared with; name is None if a number was given."""

    name: str | None = None
    value: float


class HeatMap(Answer):
    """What of an image speaks for the positive class and what against it, as a picture (PNG).

    scale: logits for each 1 % of the area that have full colour. Made by `create(..., heat_map="xrai")`.
    """

    method: str
    scale: float
    media_type: str = "image/png"
    sha256: str
    content: Base64Bytes = Field(alias="b64", repr=False)  # the file, as `save` writes it

    def check(self) -> None:
        """Raise IntegrityError unless the content has the SHA-256 that the service named."""
        actual = hashlib.sha256(self.content).hexdigest()
        if actual != self.sha256:
            raise IntegrityError(
                f"heat map: arrived with SHA-256 {actual[:12]}..., expected {self.sha256[:12]}...",
                name="heat map",
                expected=self.sha256,
                actual=actual,
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the PNG, there whole or not at all. Raises DownloadError."""
        target = Path(path)
        write_whole(target, self.content)
        return target


class Classification(Answer):
    """What the classifier says of one image.

    index: its place in the list that was given. name: its path, or files[index] where it has none. probability, calibrated:
    0..1, of the positive class. class_name: positive from the threshold on (by the calibrated one). heat_map: where it was
    asked for.
    """

    index: Count
    name: str = ""
    probability: float
    calibrated: float
    class_name: str = Field(alias="class")
    heat_map: HeatMap | None = None


class ClassificationsResult(Answer):
    """What `client.classifications.create(...)` returns: one Classification an image, in order. A sequence of them.

    notice: what these numbers are not for.
    """

    model: ClassificationModel
    positive_class: str
    threshold: Threshold
    data: list[Classification]
    notice: str = ""

    def __iter__(self) -> Iterator[Classification]:  # type: ignore[override]  # pydantic's own iterates over fields
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> Classification:
        return self.data[position]

    def save_heat_maps(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every heat map as FOLDER/<place>-<name of the image>.png; returns the paths. Raises DownloadError."""
        return [
            one.heat_map.save(Path(folder) / f"{one.index:04d}-{_stem(one.name)}.png")
            for one in self.data
            if one.heat_map is not None
        ]


class DatasetRequest(Answer):
    """The request as the service understood it, defaults filled in."""

    model: str
    classes: dict[str, Count]
    seed: Count = 0
    format: str = "imagefolder"
    image_format: str = "png"


class Progress(Answer):
    """How far a dataset is. images_per_second and eta_seconds are None until the service can tell."""

    samples_done: Count = 0
    samples_total: Count = 0
    shards_done: Count = 0
    shards_total: Count = 0
    images_per_second: float | None = None
    eta_seconds: float | None = None

    @property
    def fraction(self) -> float:
        """Done over total, 0..1."""
        return min(1.0, self.samples_done / self.samples_total) if self.samples_total else 0.0


class DatasetRecord(Answer):
    """A dataset as the service describes it at one moment; `Dataset` and `AsyncDataset` add the actions."""

    id: str
    state: DatasetState | str  # a later service may know more states
    request: DatasetRequest
    model: ModelRef | None = None
    progress: Progress = Progress()
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: Problem | None = None
    links: dict[str, str] = {}

    @property
    def finished(self) -> bool:
        """Whether the state will not change any more: succeeded, failed or cancelled."""
        return self.state in FINISHED


class DatasetFile(Answer):
    """One file of a finished dataset. sha256 in hex."""

    name: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    media_type: str = "application/octet-stream"
    url: str | None = None


class ManifestFile(Answer):
    """One entry of manifest.json. sha256 in hex."""

    name: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(Answer):
    """The part of manifest.json that this client checks; the rest (request, bundle, plan) stays readable as extras."""

    format_version: Whole
    files: list[ManifestFile]


def _stem(name: str) -> str:
    """The last part of a path without its suffix, of characters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem).strip("-.") or "image"
