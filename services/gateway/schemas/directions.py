"""Bodies of `/v1/directions`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from services.gateway.schemas.common import ModelRef, ResponseBody


class ModelDirection(ResponseBody):
    """A direction of a model's latent space."""

    name: str
    method: str
    layers: list[int] = Field(
        description="First and last + 1 of the style vectors that an edit changes unless it names other layers."
    )
    scale: float = Field(
        description="Standard deviation of w along the direction: the length of an edit of strength 1."
    )
    facts: dict[str, Any] = Field(description="Values that were measured when the direction was computed.")


class DirectionList(ResponseBody):
    """The directions of a model, in the order of its file."""

    object: Literal["list"] = "list"
    model: ModelRef
    data: list[ModelDirection]
