"""Bodies of `/v1/images`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermis.dataset.request import MAX_EDITS, EditOption, GateOptions, ProvenanceOptions
from dermis.imaging import ImageFormat
from dermis.latents import MAX_INDEX, MAX_SEED
from dermis.network_config import NoiseMode
from services.gateway.schemas.common import CanonicalHash, ModelRef, ResponseBody


class SamplesRequest(BaseModel):
    """A few samples, class by class. Sample i of the call has the latent of (seed, start_index + i)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str | None = Field(None, max_length=64, description="Name of a served bundle; null for the default one.")
    classes: dict[Annotated[str, Field(max_length=200)], Annotated[int, Field(ge=1, le=10**8)]] = Field(
        min_length=1,
        max_length=1000,
        description="Number of samples of each class.",
        examples=[{"malignant": 2, "benign": 2}],
    )
    seed: int = Field(0, ge=0, le=MAX_SEED)
    start_index: int = Field(0, ge=0, le=MAX_INDEX, description="Index of the first sample in the seed's sequence.")
    truncation_psi: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    truncation_cutoff: int | None = Field(None, ge=0, le=1000)
    noise_mode: NoiseMode = Field(
        "random",
        description="Noise inside the network. random: each sample has its own, from its seed and index; const: all samples "
        "have the same; none: no noise.",
    )
    edits: list[EditOption] | None = Field(
        None, min_length=1, max_length=MAX_EDITS, description="Edits of every latent along directions of the model."
    )
    image_format: ImageFormat = "png"
    image_quality: int = Field(95, ge=1, le=100, description="Quality of JPEG and WebP.")
    provenance: ProvenanceOptions | None = Field(
        None, description="What the image files say of their origin. Null: the defaults."
    )


class ImagesRequest(SamplesRequest):
    """A few samples that are sent, class by class. Sample i of the call has the latent of (seed, start_index + i)."""

    privacy: GateOptions | None = Field(
        None,
        description="A gate: each image is compared with the training images, and `passed` in the response is the result. "
        "All images are sent. Null: no image is compared.",
    )


Passed = Annotated[
    bool | None,
    Field(
        exclude_if=lambda value: value is None,
        description="Whether the image meets the condition of `privacy`. It is absent if the request has none.",
    ),
]


class Sample(ResponseBody):
    """One generated image."""

    class_: str = Field(alias="class", serialization_alias="class")
    seed: int
    index: int
    media_type: str
    sha256: str = Field(description="SHA-256 of the decoded bytes.")
    canonical_sha256: CanonicalHash = None
    passed: Passed = None
    b64: str = Field(description="The image file in base64.")

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class PixelSample(ResponseBody):
    """One generated image of an archive of pixels."""

    class_: str = Field(alias="class", serialization_alias="class")
    seed: int
    index: int
    passed: Passed = None

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class PixelMetadata(ResponseBody):
    """`metadata.json` of an archive of pixels. Entry i of `data` describes image i and its label."""

    object: Literal["list"] = "list"
    model: ModelRef
    class_names: list[str] = Field(description="The classes of the model, by label.")
    digital_source_type: str = Field(description="IPTC's term for how the images were made.")
    description: str = Field(description="The same in words.")
    data: list[PixelSample]


class SampleList(ResponseBody):
    """The images of one call."""

    object: Literal["list"] = "list"
    model: ModelRef
    data: list[Sample]
