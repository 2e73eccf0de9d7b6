"""Bodies of `/v1/embeddings`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.schemas.authenticity import AuthenticityModel, AuthenticityVerdict
from services.gateway.schemas.common import ResponseBody
from services.gateway.schemas.edits import EditedProjection
from services.gateway.schemas.images import Sample, SamplesRequest


class EmbeddingsRequest(SamplesRequest):
    """The samples whose positions are wanted, as for `/v1/images`."""

    images: bool = Field(
        False, description="Whether the response contains the images too. This needs the scope `images`."
    )


class ProjectedEmbeddingsRequest(BaseModel):
    """Images of finished projections whose positions are wanted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    projections: list[EditedProjection] = Field(
        min_length=1, max_length=64, description="The projections, all of one model."
    )
    model: str | None = Field(None, max_length=64, description="Name of a served bundle; null for the default one.")


class Embedding(ResponseBody):
    """Where one image is on the map."""

    index: int = Field(ge=0, description="Position of the image in the request, from 0.")
    position: list[float] = Field(
        description="The principal components of the image's embedding, rounded, those of the largest variance first. The "
        "first three are the place on the map."
    )
    verdict: AuthenticityVerdict | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="The comparison with the training images, as `/v1/authenticity` makes it. Of samples only.",
    )
    image: Sample | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="The sample itself, if `images` of the request is true.",
    )


class EmbeddingList(ResponseBody):
    """The positions of the images of one call, in their order."""

    object: Literal["list"] = "list"
    model: AuthenticityModel
    data: list[Embedding]


class Cube(ResponseBody):
    """A cube of the map in which several training images are."""

    centre: list[float] = Field(min_length=3, max_length=3)
    images: int = Field(description="Number of training images in it, rounded to tens.")


class TrainingImages(ResponseBody):
    """The training images on the map. Nothing is shown of a single image, unless the operator has switched positions on."""

    counted: int = Field(description="Number of training images that were counted; at most 20,000.")
    side: float = Field(description="Length of the sides of the cubes.")
    smallest: int = Field(description="Cubes with fewer training images are left out.")
    cubes: list[Cube] = Field(description="Empty if the operator has set DERMIS_TRAINING_MAP=none.")
    positions: list[list[float]] | None = Field(
        description="Positions of at most 5,000 training images, sorted by their values. Null unless the operator has set "
        "DERMIS_TRAINING_MAP=positions and the credentials have the scope `authenticity:uploads`."
    )


class EmbeddingMap(ResponseBody):
    """The map of a model: in which directions the embeddings of its training images vary, and where these images are."""

    object: Literal["embedding_map"] = "embedding_map"
    model: AuthenticityModel
    extractor: str = Field(description="The feature space of the model's index.")
    metric: str = Field(description="cosine (embeddings have length 1) or l2.")
    explained: list[float] = Field(
        description="Share of the variance of the training images' embeddings in each component of a position."
    )
    uploads: bool = Field(description="Whether uploaded images can be placed on the map; see `/v1/authenticity`.")
    training: TrainingImages
