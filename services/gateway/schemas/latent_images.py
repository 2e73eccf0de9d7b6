"""Bodies of `/v1/edits/interpolations` and `/v1/edits/neighbours`. Their answers are those of `/v1/edits`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from dermis.dataset.request import ProvenanceOptions
from dermis.imaging import ImageFormat
from dermis.latent_neighbours import MAX_DISTANCE
from dermis.network_config import NoiseMode
from services.gateway.schemas.edits import EditedSample


class _LatentImagesRequest(BaseModel):
    """Options of both requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str | None = Field(None, max_length=64, description="Name of a served bundle; null for the default one.")
    truncation_psi: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    truncation_cutoff: int | None = Field(None, ge=0, le=1000)
    noise_mode: NoiseMode = Field(
        "random", description="random: all images have the noise of the first sample, so that they differ by w alone."
    )
    image_format: ImageFormat = "png"
    image_quality: int = Field(95, ge=1, le=100, description="Quality of JPEG and WebP.")
    provenance: ProvenanceOptions | None = Field(
        None, description="What the image files say of their origin. Null: the defaults. GIF is never signed."
    )
    frame_ms: int = Field(100, ge=20, le=5000, description="Milliseconds for which a GIF shows each image.")


class InterpolationRequest(_LatentImagesRequest):
    """Images on the straight line in w between two samples, which are the first and the last of them."""

    start: EditedSample
    end: EditedSample
    images: int = Field(8, ge=2, le=1024)


class NeighboursRequest(_LatentImagesRequest):
    """Images in the neighbourhood of a sample in w, each towards another latent of its class."""

    sample: EditedSample
    count: int = Field(8, ge=1, le=1024)
    distance: float = Field(
        0.3,
        gt=0.0,
        le=MAX_DISTANCE["w"],
        allow_inf_nan=False,
        description="Distance in w, as a share of the distance of the sample from the mean of all w.",
    )
