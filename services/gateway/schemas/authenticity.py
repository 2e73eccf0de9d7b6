"""Bodies of `/v1/authenticity`. A request is the body of `/v1/images`, or uploaded images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.gateway.schemas.common import ModelRef, ResponseBody


class AuthenticityModel(ModelRef):
    """The bundle with whose training images the images were compared, and its index."""

    index: str = Field(description="SHA-256 of authenticity.json, which contains the SHA-256 of the index's files.")


class AuthenticityVerdict(ResponseBody):
    """The comparison of one image with its nearest training image."""

    index: int = Field(ge=0, description="Position of the image in the request, from 0.")
    authentic: bool = Field(
        description="Whether the image is farther from its nearest training image than that training image is from its own "
        "nearest neighbour among the training images."
    )
    distance: float = Field(
        ge=0,
        description="Distance to the nearest training image, rounded to two decimals; for uploads to multiples of "
        "`DERMIS_AUTHENTICITY_DISTANCE_STEP`.",
    )
    percentile: int = Field(
        ge=0, le=100, description="Percentage of training images whose own nearest neighbour is nearer than `distance`."
    )
    # Absent rather than null, so that responses of models without a detector stay as they were.
    copy_detected: bool | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="Whether the model's copy detector takes the image for a changed copy of a training image (mirrored, "
        "cropped, recoloured, joined, ...). It is there for generated images only: for uploads it would show whose images "
        "are in the training set.",
    )
    repeated: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="True if the upload resembles an image that was compared before, so that this is the answer on that image. "
        "Absent otherwise.",
    )


class AuthenticityList(ResponseBody):
    """Verdicts on the images of one call, in their order."""

    object: Literal["list"] = "list"
    model: AuthenticityModel
    data: list[AuthenticityVerdict]
