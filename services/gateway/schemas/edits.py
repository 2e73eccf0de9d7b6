"""Bodies of `/v1/edits`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dermis.bundle.directions import NAME_PATTERN
from dermis.dataset.request import MAX_EDITS, EditOption, ProvenanceOptions
from dermis.directions.edit import MAX_STRENGTH
from dermis.imaging import ImageFormat
from dermis.latents import MAX_INDEX, MAX_SEED
from dermis.network_config import NoiseMode
from services.gateway.schemas.common import CanonicalHash, ModelRef, ResponseBody


class EditedProjection(BaseModel):
    """An image of a finished projection, to edit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str = Field(pattern=r"^pr_[0-9a-f]{32}$")
    image: int = Field(0, ge=0, le=1023, description="Position of the image in the projection's request, from 0.")


class EditedSample(BaseModel):
    """A sample to edit: the class and the latent of (seed, index)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    class_: str = Field(alias="class", min_length=1, max_length=200)
    seed: int = Field(0, ge=0, le=MAX_SEED)
    index: int = Field(0, ge=0, le=MAX_INDEX)


class Sweep(BaseModel):
    """One direction with several strengths."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    direction: str = Field(pattern=f"^{NAME_PATTERN}$", description="Name of one of the model's directions.")
    strengths: list[Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)]] = Field(
        min_length=1, max_length=256, description="Strengths in standard deviations of w along the direction."
    )
    layers: list[Annotated[int, Field(ge=0, le=64)]] | None = Field(None, min_length=2, max_length=2)


class EditsRequest(BaseModel):
    """Samples to edit along directions; with a sweep, each sample at every strength."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str | None = Field(None, max_length=64, description="Name of a served bundle; null for the default one.")
    samples: list[EditedSample] | None = Field(
        None, min_length=1, max_length=1024, examples=[[{"class": "malignant", "seed": 0, "index": 7}]]
    )
    projections: list[EditedProjection] | None = Field(
        None, min_length=1, max_length=1024, description="Projected images instead of samples. They are not truncated."
    )
    edits: list[EditOption] | None = Field(
        None, min_length=1, max_length=MAX_EDITS - 1, description="Edits of every sample, with or without a sweep."
    )
    sweep: Sweep | None = Field(None, description="Null for one image of each sample.")
    truncation_psi: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    truncation_cutoff: int | None = Field(None, ge=0, le=1000)
    noise_mode: NoiseMode | None = Field(
        None,
        description="Noise inside the network. Null means random for samples (all images of one sample have the noise of "
        "that sample), and const for projections, whose latents have no noise of their own.",
    )
    image_format: ImageFormat = "png"
    image_quality: int = Field(95, ge=1, le=100, description="Quality of JPEG and WebP.")
    provenance: ProvenanceOptions | None = Field(
        None, description="What the image files say of their origin. Null: the defaults. GIF is never signed."
    )
    frame_ms: int = Field(100, ge=20, le=5000, description="Milliseconds for which a GIF shows each strength.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.samples is None) == (self.projections is None):
            raise ValueError("give either samples or projections")
        if self.projections is not None and self.noise_mode == "random":
            raise ValueError("projections have no noise of their own; give noise_mode const or none")
        return self

    @property
    def noise(self) -> NoiseMode:
        """The noise mode of the images."""
        return self.noise_mode or ("random" if self.projections is None else "const")

    @property
    def sources(self) -> int:
        """Number of samples or projections."""
        return len(self.samples or self.projections or ())


class EditedImage(ResponseBody):
    """One image after its edits."""

    sample: int = Field(ge=0, description="Position of the sample or projection in the request, from 0.")
    strength: float | None = Field(description="Strength of the sweep; null without a sweep.")
    media_type: str
    sha256: str = Field(description="SHA-256 of the decoded bytes.")
    canonical_sha256: CanonicalHash = None
    b64: str = Field(description="The image file in base64.")


class EditedList(ResponseBody):
    """The images of one call, by sample and then by strength."""

    object: Literal["list"] = "list"
    model: ModelRef
    data: list[EditedImage]
