"""What the API takes and gives of the latent space: projections, edits, directions, verdicts of authenticity."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dermis.bundle.directions import NAME_PATTERN
from dermis.dataset.request import MAX_EDITS, EditOption
from dermis.directions.edit import MAX_STRENGTH
from dermis.imaging import ImageFormat
from dermis.latents import MAX_INDEX, MAX_SEED
from dermis.network_config import NoiseMode
from services.gateway.schemas import Answer, ModelRef
from services.problems import Problem


class EditedProjection(BaseModel):
    """An image of a finished projection, to edit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(pattern=r"^pr_[0-9a-f]{32}$")
    image: int = Field(0, ge=0, le=1023, description="Place of the image in the projection's request, from 0.")


class EditedSample(BaseModel):
    """A sample to edit: the class and the latent of (seed, index)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    class_: str = Field(alias="class", min_length=1, max_length=200)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    index: int = Field(0, ge=0, le=MAX_INDEX)


class Sweep(BaseModel):
    """One direction at several strengths."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    direction: str = Field(pattern=f"^{NAME_PATTERN}$", description="Name of one of the model's directions.")
    strengths: list[Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)]] = Field(
        min_length=1, max_length=256, description="In standard deviations of w along the direction."
    )
    layers: list[Annotated[int, Field(ge=0, le=64)]] | None = Field(None, min_length=2, max_length=2)


class EditsRequest(BaseModel):
    """Samples moved along directions; with a sweep each of them at every strength."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str | None = Field(None, max_length=64, description="Name of a served bundle; null for the default one.")
    samples: list[EditedSample] | None = Field(
        None, min_length=1, max_length=1024, examples=[[{"class": "malignant", "seed": 0, "index": 7}]]
    )
    projections: list[EditedProjection] | None = Field(
        None, min_length=1, max_length=1024, description="Instead of samples: projected images. They are not truncated."
    )
    edits: list[EditOption] | None = Field(
        None, min_length=1, max_length=MAX_EDITS - 1, description="Moves of every sample, with or without a sweep."
    )
    sweep: Sweep | None = Field(None, description="Null: one image of each sample.")
    truncation_psi: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    truncation_cutoff: int | None = Field(None, ge=0, le=1000)
    noise_mode: NoiseMode | None = Field(
        None,
        description="Noise inside the network. Null: random for samples, which gives all images of a sample its own noise; "
        "const for projections, since their latents carry no noise.",
    )
    image_format: ImageFormat = "png"
    image_quality: int = Field(95, ge=1, le=100, description="Of JPEG and WebP.")
    frame_ms: int = Field(100, ge=20, le=5000, description="Of GIF: how long each strength is shown.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.samples is None) == (self.projections is None):
            raise ValueError("give either samples or projections")
        if self.projections is not None and self.noise_mode == "random":
            raise ValueError("projections have no noise of their own; give noise_mode const or none")
        return self

    @property
    def noise(self) -> NoiseMode:
        """The noise mode that the images are drawn with."""
        return self.noise_mode or ("random" if self.projections is None else "const")

    @property
    def sources(self) -> int:
        """Number of samples or projections."""
        return len(self.samples or self.projections or ())


class ProjectionProgress(Answer):
    """How far a projection is."""

    images_done: int
    images_total: int
    steps_done: int = Field(description="Of all images together.")
    steps_total: int
    eta_seconds: float | None


class ProjectedImage(Answer):
    """One image's projection."""

    index: int = Field(ge=0, description="Place of the image in the request, from 0.")
    distance: float = Field(
        description="Of the generator's image from the one that was sent, in the space of its name."
    )
    distance_name: str
    pixel_error: float = Field(description="Root mean squared difference of pixels, in 0..255.")
    steps: int
    start: str
    space: str
    files: dict[str, str] = Field(
        description="Paths: `latents` (safetensors: ws and image), `image` (PNG of the generator's image), `video` (GIF)."
    )


class ProjectionJob(Answer):
    """A projection job."""

    id: str = Field(pattern=r"^pr_[0-9a-f]{32}$")
    object: Literal["projection"] = "projection"
    state: Literal["queued", "running", "succeeded", "failed"]
    schedule: str
    steps: int
    space: str
    start: str
    model: ModelRef
    progress: ProjectionProgress
    created_at: datetime.datetime
    started_at: datetime.datetime | None
    finished_at: datetime.datetime | None
    expires_at: datetime.datetime | None = Field(
        description="When it is deleted with its files; null before it has ended."
    )
    error: Problem | None
    data: list[ProjectedImage] | None = Field(description="One entry for each image; null before it has succeeded.")


class EditedImage(Answer):
    """One image after its edits."""

    sample: int = Field(ge=0, description="Place of the sample or projection in the request, from 0.")
    strength: float | None = Field(description="Of the sweep; null without one.")
    media_type: str
    sha256: str = Field(description="Of the decoded bytes.")
    b64: str = Field(description="The image file, base64.")


class EditedList(Answer):
    """The images of one call, sample after sample, strength after strength."""

    object: Literal["list"] = "list"
    model: ModelRef
    data: list[EditedImage]


class ModelDirection(Answer):
    """A direction of a model's latent space."""

    name: str
    method: str
    layers: list[int] = Field(
        description="First and last + 1 of the style vectors that it moves unless told otherwise."
    )
    scale: float = Field(description="Standard deviation of w along it: what a strength of 1 moves by.")
    facts: dict[str, Any] = Field(description="What was measured when it was found.")


class DirectionList(Answer):
    """The directions of a model, in the order of its file."""

    object: Literal["list"] = "list"
    model: ModelRef
    data: list[ModelDirection]


class AuthenticityModel(ModelRef):
    """Which bundle's training images the images were compared with, and by which index."""

    index: str = Field(description="SHA-256 of authenticity.json, which holds the SHA-256 of the index's files.")


class AuthenticityVerdict(Answer):
    """How near one image is to the nearest training image."""

    index: int = Field(ge=0, description="Place of the image in the request, from 0.")
    authentic: bool = Field(
        description="Whether it is farther from its nearest training image than that one is from its own nearest other one."
    )
    distance: float = Field(ge=0, description="To the nearest training image, to two decimals.")
    percentile: int = Field(
        ge=0, le=100, description="Share of training images whose own nearest other one is nearer than that."
    )


class AuthenticityList(Answer):
    """Verdicts on the images of one call, in their order."""

    object: Literal["list"] = "list"
    model: AuthenticityModel
    data: list[AuthenticityVerdict]
