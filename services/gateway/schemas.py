"""What the API takes and gives, as pydantic models. A dataset's request is `dermis.dataset.request.DatasetRequest`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermis.bundle import Bundle
from dermis.bundle.classifier import NOTICE, ClassifierDescription
from dermis.bundle.index import IndexDescription
from dermis.dataset.privacy import SHOWN
from dermis.dataset.request import MAX_EDITS, DatasetRequest, EditOption, classes_of, stored_request
from dermis.explain.attribution import Method
from dermis.imaging import ImageFormat
from dermis.latents import MAX_INDEX, MAX_SEED
from dermis.network_config import NoiseMode
from services.jobs.table import Job
from services.problems import Problem

State = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


class Answer(BaseModel):
    """Base of what the API gives: a field more or less than documented is an error of ours."""

    model_config = ConfigDict(extra="forbid")


class ModelRef(Answer):
    """Which bundle made the images: the name for people, the digest for certainty."""

    name: str
    digest: str = Field(description="SHA-256 of bundle.json, which holds the SHA-256 of every file of the bundle.")


class Progress(Answer):
    """How far a dataset is."""

    samples_done: int
    samples_total: int
    shards_done: int
    shards_total: int
    images_per_second: float | None = Field(description="Over the last seconds; of the whole run once it has ended.")
    eta_seconds: float | None


class DatasetLinks(Answer):
    """Paths of a dataset's resources."""

    self_: str = Field(alias="self", serialization_alias="self")
    events: str
    files: str

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Dataset(Answer):
    """A dataset job."""

    id: str = Field(pattern=r"^ds_[0-9a-f]{32}$")
    object: Literal["dataset"] = "dataset"
    state: State
    request: DatasetRequest
    model: ModelRef
    progress: Progress
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    error: Problem | None
    links: DatasetLinks


class DatasetList(Answer):
    """A page of datasets, newest first."""

    object: Literal["list"] = "list"
    data: list[Dataset]
    next_cursor: str | None = Field(description="Give it as `cursor` for the next page; null on the last.")


class DatasetFile(Answer):
    """One file of a finished dataset."""

    name: str
    bytes: int
    sha256: str
    media_type: str
    url: str


class DatasetFileList(Answer):
    """The files of a finished dataset."""

    object: Literal["list"] = "list"
    data: list[DatasetFile]


class ImagesRequest(BaseModel):
    """A few samples now. Sample i of the call has the latent of (seed, start_index + i); classes come in order."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str | None = Field(None, max_length=64, description="Name of a served bundle; null for the default one.")
    classes: dict[Annotated[str, Field(max_length=200)], Annotated[int, Field(ge=1, le=10**8)]] = Field(
        min_length=1,
        max_length=1000,
        description="How many samples of each class.",
        examples=[{"malignant": 2, "benign": 2}],
    )
    seed: int = Field(0, ge=0, le=MAX_SEED)
    start_index: int = Field(0, ge=0, le=MAX_INDEX, description="Index of the first sample in the seed's sequence.")
    truncation_psi: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    truncation_cutoff: int | None = Field(None, ge=0, le=1000)
    noise_mode: NoiseMode = Field(
        "random",
        description="Noise inside the network: random draws that of each sample from its seed and index, const gives all "
        "images the same, none gives none.",
    )
    edits: list[EditOption] | None = Field(
        None, min_length=1, max_length=MAX_EDITS, description="Moves of every latent along directions of the model."
    )
    image_format: ImageFormat = "png"
    image_quality: int = Field(95, ge=1, le=100, description="Of JPEG and WebP.")


class Sample(Answer):
    """One generated image."""

    class_: str = Field(alias="class", serialization_alias="class")
    seed: int
    index: int
    media_type: str
    sha256: str = Field(description="Of the decoded bytes.")
    b64: str = Field(description="The image file, base64.")

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class SampleList(Answer):
    """The images of one call."""

    object: Literal["list"] = "list"
    model: ModelRef
    data: list[Sample]


class ClassificationModel(ModelRef):
    """Which bundle classified the images, and with which classifier."""

    classifier: str = Field(description="SHA-256 of classifier.json, which holds the SHA-256 of the network.")


class ThresholdUsed(Answer):
    """What the calibrated probability was compared with."""

    name: str | None = Field(description="Null if the request gave a number.")
    value: float = Field(ge=0, le=1)


class ClassificationHeatMap(Answer):
    """What the parts of an image add to the classifier's logit of the positive class, as a picture."""

    method: Method
    scale: float = Field(ge=0, description="Logits for each 1 % of the area that have full colour: for or against.")
    media_type: Literal["image/png"] = "image/png"
    sha256: str = Field(description="Of the decoded bytes.")
    b64: str = Field(description="The picture, base64: the centred square of the image in grey under the colours.")


class Classification(Answer):
    """What the classifier says of one image."""

    index: int = Field(ge=0, description="Place of the image in the request, from 0.")
    probability: float = Field(ge=0, le=1, description="Of the positive class, as the network has it.")
    calibrated: float = Field(ge=0, le=1, description="The same, calibrated on validation data: what thresholds mean.")
    class_: str = Field(alias="class", serialization_alias="class", description="Positive from the threshold on.")
    heat_map: ClassificationHeatMap | None = Field(None, description="Null unless `heat_map` asked for it.")

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class ClassificationList(Answer):
    """What the classifier says of the images of one call, in their order."""

    object: Literal["list"] = "list"
    model: ClassificationModel
    positive_class: str = Field(description="What the probabilities are of.")
    threshold: ThresholdUsed
    data: list[Classification]
    notice: str = Field(description="What these numbers are not for.")

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "object": "list",
                    "model": {"name": "demo", "digest": "f7e4" * 16, "classifier": "09ab" * 16},
                    "positive_class": "malignant",
                    "threshold": {"name": "sensitivity_90", "value": 0.125},
                    "data": [
                        {
                            "index": 0,
                            "probability": 0.25,
                            "calibrated": 0.1875,
                            "class": "malignant",
                            "heat_map": None,
                        }
                    ],
                    "notice": NOTICE,
                }
            ]
        },
    )


class ModelClassifier(Answer):
    """The classifier of a served bundle."""

    digest: str = Field(description="SHA-256 of classifier.json: the identity of the classifier.")
    architecture: str
    input_size: int = Field(description="Side in px of the centred square that the network sees.")
    classes: list[str]
    positive_class: str
    temperature: float
    thresholds: dict[str, float] = Field(description="By name, on the calibrated probability.")
    metrics: dict[str, Any]


class ModelAuthenticity(Answer):
    """The index of a served bundle's training images."""

    digest: str = Field(description="SHA-256 of authenticity.json: the identity of the index.")
    extractor: str = Field(description="Feature space.")
    metric: str
    vectors: int = Field(description="Training images.")
    held_out: int = Field(description="Real images that the generator never saw, for the membership attack.")
    uploads: bool = Field(
        description="Whether the service compares uploaded images too (`DERMIS_AUTHENTICITY_UPLOADS`)."
    )
    baseline: dict[str, float] = Field(
        description="Percentiles of the training images' distances to their nearest other one."
    )


class Model(Answer):
    """A served bundle."""

    object: Literal["model"] = "model"
    name: str
    digest: str
    default: bool
    resolution: int
    classes: list[str]
    z_dim: int
    w_dim: int
    num_ws: int
    licence: str | None
    attribution: str | None
    kimg: float | None
    metrics: dict[str, Any]
    classifier: ModelClassifier | None = Field(description="Null if the bundle has none.")
    authenticity: ModelAuthenticity | None = Field(description="Null if the bundle has no index.")
    directions: list[str] = Field(description="Names of its directions; /v1/directions tells more.")


class ModelWithCard(Model):
    """A served bundle and its model card."""

    card: str = Field(description="The model card, Markdown.")


class ModelList(Answer):
    """Every served bundle, the default first."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(Answer):
    """Health in one word."""

    status: Literal["alive", "ready"]


def _time(seconds: float | None) -> datetime.datetime | None:
    return None if seconds is None else datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def dataset_of(job: Job) -> Dataset:
    """A job as the API shows it."""
    path = f"/v1/datasets/{job.id}"
    created = _time(job.created_at)
    assert created is not None
    return Dataset(
        id=job.id,
        state=job.state,  # type: ignore[arg-type]
        request=stored_request(job.request),
        model=ModelRef(name=job.model_name, digest=job.model_digest),
        progress=Progress(
            samples_done=job.samples_done,
            samples_total=job.samples_total,
            shards_done=job.shards_done,
            shards_total=job.shards_total,
            images_per_second=_rounded(job.images_per_second),
            eta_seconds=_rounded(job.eta_seconds),
        ),
        created_at=created,
        started_at=_time(job.started_at),
        finished_at=_time(job.finished_at),
        error=None if job.error is None else Problem.model_validate(job.error),
        links=DatasetLinks(**{"self": path, "events": f"{path}/events", "files": f"{path}/files"}),
    )


def model_of(bundle: Bundle, default: bool, uploads: bool) -> Model:
    """A bundle as the API lists it. uploads: whether the service compares uploaded images with the training images."""
    return Model(**_model_fields(bundle, default, uploads))


def model_with_card_of(bundle: Bundle, default: bool, uploads: bool) -> ModelWithCard:
    """A bundle as the API shows it alone."""
    return ModelWithCard(**_model_fields(bundle, default, uploads), card=bundle.model_card)


def _model_fields(bundle: Bundle, default: bool, uploads: bool) -> dict[str, Any]:
    config = bundle.generator
    return {
        "name": bundle.name,
        "digest": bundle.digest,
        "default": default,
        "resolution": config.img_resolution,
        "classes": list(classes_of(bundle)),
        "z_dim": config.z_dim,
        "w_dim": config.w_dim,
        "num_ws": config.num_ws,
        "licence": _text(bundle.provenance, "licence"),
        "attribution": _text(bundle.provenance, "attribution"),
        "kimg": _number(bundle.provenance, "kimg"),
        "metrics": dict(bundle.metrics),
        "classifier": None if bundle.classifier is None else _classifier_of(bundle.classifier),
        "authenticity": None if bundle.authenticity is None else _authenticity_of(bundle.authenticity, uploads),
        "directions": [direction.name for direction in bundle.directions],
    }


def _authenticity_of(described: IndexDescription, uploads: bool) -> ModelAuthenticity:
    return ModelAuthenticity(
        digest=described.digest,
        extractor=described.extractor,
        metric=described.metric,
        vectors=described.vectors,
        held_out=described.held_out,
        uploads=uploads,
        baseline={str(percentile): round(described.radii[percentile], 4) for percentile in SHOWN},
    )


def _classifier_of(described: ClassifierDescription) -> ModelClassifier:
    return ModelClassifier(
        digest=described.digest,
        architecture=described.architecture,
        input_size=described.input.size,
        classes=list(described.class_names),
        positive_class=described.positive_class,
        temperature=described.temperature,
        thresholds=dict(described.thresholds),
        metrics=dict(described.metrics),
    )


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return None if value is None else str(value)


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
