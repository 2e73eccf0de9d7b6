"""Bodies that several routes use, and conversions of values."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dermis.bundle import Bundle


class ResponseBody(BaseModel):
    """Base of the response bodies. Setting a field that is not documented raises an error."""

    model_config = ConfigDict(extra="forbid")


CanonicalHash = Annotated[
    str | None,
    Field(
        pattern=r"^[0-9a-f]{64}$",
        exclude_if=lambda value: value is None,
        description="SHA-256 of the file without its signed manifest, which is the same for the same request. Only of signed "
        "images.",
    ),
]


class ModelRef(ResponseBody):
    """The bundle that made a result. Its digest identifies it; its name could be given to another bundle."""

    name: str
    digest: str = Field(description="SHA-256 of bundle.json, which contains the SHA-256 of every file of the bundle.")


class Health(ResponseBody):
    """Health of the service."""

    status: Literal["alive", "ready"]


def model_ref(bundle: Bundle) -> ModelRef:
    """The reference to a bundle."""
    return ModelRef(name=bundle.name, digest=bundle.digest)


def utc_time(seconds: float) -> datetime.datetime:
    """A time in seconds since 1970, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def utc_time_or_none(seconds: float | None) -> datetime.datetime | None:
    """`utc_time` of a time that may be missing."""
    return None if seconds is None else utc_time(seconds)
