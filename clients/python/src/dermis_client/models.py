"""Responses of the service as typed, frozen pydantic models. Fields of a newer service are kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from dermis_client._files import check_sha256, write_atomically

DatasetFormat = Literal["imagefolder", "webdataset", "parquet"]
ImageFormat = Literal["png", "jpeg", "webp"]
NoiseMode = Literal["random", "const", "none"]
HeatMapMethod = Literal["xrai", "integrated-gradients"]
DatasetState = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]
FINISHED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # 64 bits: a larger number would be too long for a file name
Count = Annotated[int, Field(ge=0, lt=2**63)]


class ResponseRecord(BaseModel):
    """Base of the records in responses: frozen. Fields that this version does not know are readable as attributes."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True, allow_inf_nan=False)


class FieldError(ResponseRecord):
    """One invalid value of a request. field: its dotted path, such as "classes.melanoma"."""

    field: str = ""
    message: str = ""


class ExceededQuota(ResponseRecord):
    """The quota that a request exceeds.

    Attributes:
        name: Name of the quota, such as "images_per_day".
        unit: Unit of the numbers, such as "images" or "bytes".
        limit: What the tenant may use.
        used: What it uses.
        requested: What the request needs.
        resets_at: When the use starts again at 0, if it does so regularly.
    """

    name: str
    unit: str = ""
    limit: float
    used: float
    requested: float
    resets_at: datetime | None = None


class Problem(ResponseRecord):
    """An RFC 9457 problem document. quota: the quota that the request exceeds, if it exceeds one."""

    type: str = "about:blank"
    title: str = ""
    status: Whole | None = None
    detail: str = ""
    instance: str | None = None
    request_id: str | None = None
    errors: list[FieldError] = []
    quota: ExceededQuota | None = None

    @property
    def kind(self) -> str:
        """The last part of `type`, such as "unknown-class"; "" if the service sent no type."""
        return "" if self.type == "about:blank" else self.type.rsplit(":", 1)[-1]


class ModelRef(ResponseRecord):
    """The model that made a result. digest: SHA-256 of its bundle.json, which identifies the bundle."""

    name: str
    digest: str


class ModelClassifier(ResponseRecord):
    """The classifier of a model. thresholds: calibrated probabilities by name; input_size: in pixels."""

    digest: str
    architecture: str | None = None
    input_size: Count | None = None
    classes: list[str] = []
    positive_class: str | None = None
    temperature: float | None = None
    thresholds: dict[str, float] = {}
    metrics: dict[str, Any] = {}


class ModelTrainingSet(ResponseRecord):
    """The images that a generator was trained with.

    Attributes:
        name: Name of the training set.
        images: Number of images.
        classes: Number of images of each class.
        sha256: SHA-256 of the ids, classes and files of the images; None if it is not stated.
    """

    name: str | None = None
    images: Count | None = None
    classes: dict[str, Count] = {}
    sha256: str | None = None


class ModelChange(ResponseRecord):
    """Options that were changed during a training. kimg: thousands of images that had been shown before."""

    kimg: float
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}


class ModelTraining(ResponseRecord):
    """How a generator was trained. hours: its time; batch: images of one step; changes: options that were changed meanwhile."""

    hardware: str | None = None
    hours: float | None = None
    seed: Count | None = None
    batch: Count | None = None
    changes: list[ModelChange] = []


class ModelPrivacy(ResponseRecord):
    """The differential privacy of a training. epsilon: None if nothing is guaranteed; unit: such as "patient"."""

    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None


class ModelProvenance(ResponseRecord):
    """Where a model comes from. code_version: the dermis that wrote the bundle; None: the bundle does not state it."""

    code_version: str | None = None
    dataset: ModelTrainingSet | None = None
    training: ModelTraining | None = None
    privacy: ModelPrivacy | None = None


class Model(ModelRef):
    """A generator that the service offers. card: Markdown, only from `models.retrieve(name)`."""

    default: bool = False
    resolution: Count | None = None
    classes: list[str] = []
    z_dim: Count | None = None
    w_dim: Count | None = None
    num_ws: Count | None = None
    licence: str | None = None
    attribution: str | None = None
    kimg: float | None = None
    provenance: ModelProvenance | None = None  # None from an older service
    metrics: dict[str, Any] = {}
    classifier: ModelClassifier | None = None
    authenticity: dict[str, Any] | None = None  # its index of training images; "uploads": whether uploads are compared
    directions: list[str] = []
    card: str | None = None


class ClassificationModel(ModelRef):
    """The bundle that classified images. classifier: SHA-256 of its classifier.json."""

    classifier: str


class Threshold(ResponseRecord):
    """The threshold of the calibrated probability. name: None if the request contained a number."""

    name: str | None = None
    value: float


class HeatMap(ResponseRecord):
    """A picture of the areas that raise and lower the probability of the positive class, from `create(heat_map="xrai")`.

    Attributes:
        method: "xrai" or "integrated-gradients".
        scale: Logits for each 1 % of the area at which the colour is saturated.
        media_type: Media type of the content.
        sha256: SHA-256 of the content, in hex.
        content: The PNG file.
    """

    method: str
    scale: float
    media_type: str = "image/png"
    sha256: str
    content: Base64Bytes = Field(alias="b64", repr=False)

    def check(self) -> None:
        """Compare the content with the SHA-256 that the service sent.

        Raises:
            IntegrityError: They differ.
        """
        check_sha256(self.content, self.sha256, "heat map", "heat map")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the PNG.

        Args:
            path: The path of the file. Its folder is created.

        Returns:
            The path.

        Raises:
            DownloadError: It cannot be written; no incomplete file is left.
        """
        target = Path(path)
        write_atomically(target, self.content)
        return target


class Classification(ResponseRecord):
    """The classification of one image.

    Attributes:
        index: Position of the image in the caller's list.
        name: Path of the image, or files[index].
        probability: Probability of the positive class, 0 to 1.
        calibrated: Calibrated probability of the positive class, 0 to 1.
        class_name: The positive class if `calibrated` is at least the threshold.
        heat_map: The heat map, if requested.
    """

    index: Count
    name: str = ""
    probability: float
    calibrated: float
    class_name: str = Field(alias="class")
    heat_map: HeatMap | None = None


class ClassificationsResult(ResponseRecord):
    """The classification of each image, in order: a sequence of Classification.

    Attributes:
        model: The bundle and its classifier.
        positive_class: The class that the probabilities refer to.
        threshold: The threshold of the calibrated probability.
        data: The classifications.
        notice: The purposes that the results must not be used for.
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
        """Write every heat map as FOLDER/<index>-<name of the image>.png.

        Args:
            folder: The folder, which is created.

        Returns:
            The paths.

        Raises:
            DownloadError: A file cannot be written.
        """
        return [
            item.heat_map.save(Path(folder) / f"{item.index:04d}-{_stem(item.name)}.png")
            for item in self.data
            if item.heat_map is not None
        ]


class DatasetRequest(ResponseRecord):
    """The request of a dataset, with the service's defaults."""

    model: str
    classes: dict[str, Count]
    seed: Count = 0
    format: str = "imagefolder"
    image_format: str = "png"


class Progress(ResponseRecord):
    """Progress of a dataset. images_per_second and eta_seconds are None until the service can estimate them."""

    samples_done: Count = 0
    samples_total: Count = 0
    shards_done: Count = 0
    shards_total: Count = 0
    images_per_second: float | None = None
    eta_seconds: float | None = None

    @property
    def fraction(self) -> float:
        """The share of samples done, 0 to 1."""
        return min(1.0, self.samples_done / self.samples_total) if self.samples_total else 0.0


class DatasetRecord(ResponseRecord):
    """A dataset at one moment. `Dataset` and `AsyncDataset` add methods."""

    id: str
    state: DatasetState | str  # a newer service may have further states
    request: DatasetRequest
    model: ModelRef | None = None
    progress: Progress = Progress()
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: datetime | None = None  # when the service deletes it; None if it is kept, and before it has ended
    error: Problem | None = None
    links: dict[str, str] = {}

    @property
    def finished(self) -> bool:
        """Whether the state is final: succeeded, failed or cancelled."""
        return self.state in FINISHED


class DatasetFile(ResponseRecord):
    """One file of a finished dataset. sha256: in hex."""

    name: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    media_type: str = "application/octet-stream"
    url: str | None = None


class QuotaUsage(ResponseRecord):
    """One quota of a tenant and its use.

    Attributes:
        name: Name of the quota, such as "images_per_day".
        unit: Unit of the numbers, such as "images" or "bytes".
        limit: What the tenant may use; None if there is no limit.
        used: What it uses; None if that is not counted, because there is no limit.
        remaining: What is left; None if there is no limit.
        window_seconds: Length of the window that is counted; None for what exists at one time.
        resets_at: End of the window, at which the use starts again at 0.
    """

    name: str
    unit: str = ""
    limit: float | None = None
    used: float | None = None
    remaining: float | None = None
    window_seconds: Count | None = None
    resets_at: datetime | None = None


class Usage(ResponseRecord):
    """The quotas of the caller's tenant and their use.

    Attributes:
        tenant: The tenant.
        scopes: What the credentials allow; None from a service that does not state it.
        quotas: Every quota.
        retention_days: Days after which datasets are deleted; None if they are kept.
    """

    tenant: str
    scopes: list[str] | None = None
    quotas: list[QuotaUsage] = []
    retention_days: float | None = None


class Webhook(ResponseRecord):
    """A URL that gets a message when jobs of the tenant end.

    Attributes:
        id: Its id.
        url: Where the messages are sent.
        events: Which messages are sent, such as "dataset.succeeded".
        created_at: When it was created.
        disabled_at: When the receiver answered 410 (Gone), after which nothing is sent.
    """

    id: str
    url: str
    events: list[str] = []
    created_at: datetime
    disabled_at: datetime | None = None


class NewWebhook(Webhook):
    """A webhook that was just created. secret: signs its messages (Standard Webhooks); not part of the repr."""

    secret: str = Field(repr=False)


class WebhookMessage(ResponseRecord):
    """A message of a webhook and its delivery.

    Attributes:
        id: The header `webhook-id` of every attempt.
        event: What it is about, such as "dataset.succeeded".
        state: "waiting", "delivered", or "dead" if it is not tried again.
        attempts: Number of attempts.
        next_attempt_at: When it is tried again, if it waits.
        outcome: Outcome of the last attempt.
        created_at: When it was created.
        ended_at: When it was delivered or became dead.
    """

    id: str
    event: str = ""
    state: str
    attempts: Count = 0
    next_attempt_at: datetime | None = None
    outcome: str | None = None
    created_at: datetime
    ended_at: datetime | None = None


class ManifestFile(ResponseRecord):
    """One entry of manifest.json. sha256: in hex."""

    name: str
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(ResponseRecord):
    """The fields of manifest.json that this client checks; others are readable as attributes."""

    format_version: Whole
    files: list[ManifestFile]


def _stem(name: str) -> str:
    """Return the file name of a path without its suffix, in characters that every file system accepts."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(name).stem).strip("-.") or "image"
