"""Bodies of `/v1/admin/keys`."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.gateway.auth.keys import MAX_LIFETIME_SECONDS, ApiKey
from services.gateway.auth.principal import DEFAULT_SCOPES, SCOPES
from services.gateway.schemas.common import ResponseBody, utc_time, utc_time_or_none
from services.tenants import DEFAULT_TENANT, TENANT_PATTERN

_Scope = Annotated[str, Field(json_schema_extra={"enum": list(SCOPES)})]


class KeyRequest(BaseModel):
    """A new API key."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tenant: str = Field(DEFAULT_TENANT, pattern=f"^{TENANT_PATTERN}$", description="Tenant whose data the key can use.")
    name: str = Field(
        min_length=1, max_length=200, description="Name for people, such as that of the program that uses the key."
    )
    scopes: list[_Scope] = Field(
        default=list(DEFAULT_SCOPES), min_length=1, max_length=50, description="What the key allows."
    )
    expires_in_seconds: float | None = Field(
        None,
        gt=0,
        le=MAX_LIFETIME_SECONDS,
        allow_inf_nan=False,
        description="Time until the key expires; null for a key that does not.",
    )


class KeyRecord(ResponseBody):
    """An API key, without the key itself."""

    id: str = Field(description="Also part of the key.")
    object: Literal["api_key"] = "api_key"
    prefix: str = Field(description="The beginning of the key, which is not secret.")
    tenant: str
    name: str
    state: Literal["active", "expired", "revoked"]
    scopes: list[str]
    created_at: datetime.datetime
    created_by: str = Field(description="Subject of the creator.")
    expires_at: datetime.datetime | None
    revoked_at: datetime.datetime | None
    last_used_at: datetime.datetime | None = Field(description="Updated about once a minute.")
    replaces: str | None = Field(description="Id of the key that a rotation replaced with this one.")


class NewKey(KeyRecord):
    """A new API key."""

    key: str = Field(description="The key. It is not stored and cannot be shown again.")


class KeyList(ResponseBody):
    """API keys, newest first."""

    data: list[KeyRecord]


def key_record(key: ApiKey) -> KeyRecord:
    """The body that describes a key."""
    return KeyRecord(
        id=key.id,
        prefix=key.prefix,
        tenant=key.tenant,
        name=key.name,
        state=key.state(),
        scopes=list(key.scopes),
        created_at=utc_time(key.created_at),
        created_by=key.created_by,
        expires_at=utc_time_or_none(key.expires_at),
        revoked_at=utc_time_or_none(key.revoked_at),
        last_used_at=utc_time_or_none(key.last_used_at),
        replaces=key.replaces,
    )


def new_key_record(key: ApiKey, text: str) -> NewKey:
    """The body that shows a new key once."""
    return NewKey(**key_record(key).model_dump(), key=text)
