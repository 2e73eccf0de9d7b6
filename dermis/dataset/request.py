"""What a user asks for: how many images of each class, how they are drawn, and in which files they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermis.errors import RequestError
from dermis.latents import MAX_SEED

if TYPE_CHECKING:
    from dermis.bundle import Bundle

DatasetFormat = Literal["imagefolder", "webdataset", "parquet"]
ImageFormat = Literal["png", "jpeg", "webp"]
NoiseMode = Literal["const", "random", "none"]

UNCONDITIONAL_CLASS = "image"
# Bounds of the format itself; what a service allows is for `check_against`, what a disk holds for the store.
MAX_COUNT = 10**8
MAX_CLASSES = 1000

ClassName = Annotated[str, Field(min_length=1, max_length=200)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


class DatasetRequest(BaseModel):
    """A dataset, as asked for. Together with a bundle it determines every file, byte for byte, on one kind of machine.

    Types are strict: neither true nor "3" nor 3.0 is a count. Raises pydantic.ValidationError.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field("demo", min_length=1, max_length=64, description="Name of the model (bundle) that draws them.")
    classes: dict[ClassName, Count] = Field(
        min_length=1,
        max_length=MAX_CLASSES,
        description='Images of each class. The class of an unconditional model is "image".',
        examples=[{"malignant": 500, "benign": 500}],
    )
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Sample i has its latent from (seed, i).")
    truncation_psi: float = Field(
        1.0, ge=0, le=2, allow_inf_nan=False, description="1 keeps the full variety, 0 gives the mean image."
    )
    truncation_cutoff: int | None = Field(
        None, ge=0, le=64, description="Number of style layers that are truncated, from the coarsest; null for all."
    )
    noise_mode: NoiseMode = Field("const", description="Noise inside the network: fixed, of each sample, or none.")
    format: DatasetFormat = Field("imagefolder", description="Files: one zip, tar shards, or Parquet shards.")
    image_format: ImageFormat = Field("png", description="Encoding of each image. PNG is lossless.")
    image_quality: int = Field(95, ge=1, le=100, description="Quality of JPEG and WebP; PNG takes no notice of it.")
    shard_size: int = Field(250, ge=1, le=10_000, description="Images in a shard: the unit of work and of recovery.")

    @property
    def samples(self) -> int:
        """Number of images."""
        return sum(self.classes.values())


def classes_of(bundle: Bundle) -> tuple[str, ...]:
    """Class names that a request may use, in the order of the labels."""
    return bundle.class_names or (UNCONDITIONAL_CLASS,)


def check_against(request: DatasetRequest, bundle: Bundle, max_samples: int) -> None:
    """RequestError, naming the field, if this bundle or this limit cannot serve the request."""
    known = classes_of(bundle)
    for name in request.classes:
        if name not in known:
            message = f"unknown class; this model has {', '.join(known)}"
            raise RequestError(f"classes.{name}", message, kind="unknown-class")
    if request.samples > max_samples:
        message = f"{request.samples:,} images asked for; at most {max_samples:,} are allowed in one dataset"
        raise RequestError("classes", message, kind="request-too-large")
    num_ws = bundle.generator.num_ws
    if request.truncation_cutoff is not None and request.truncation_cutoff > num_ws:
        raise RequestError("truncation_cutoff", f"this model has {num_ws} style layers; give 0 to {num_ws}")
