"""/v1/admin/keys: create, list, rotate and revoke the API keys of all tenants."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from services.gateway.audit import describe
from services.gateway.auth.authentication import requires
from services.gateway.auth.keys import (
    DEFAULT_OVERLAP_SECONDS,
    MAX_LIFETIME_SECONDS,
    KeyEndedError,
    KeyRefusedError,
    UnknownKeyError,
)
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import ContextDep, needs_access_control, read_model
from services.gateway.openapi import JSON_PROBLEMS, headers, json_body, problems
from services.gateway.schemas.keys import (
    KeyList,
    KeyRecord,
    KeyRequest,
    NewKey,
    key_record,
    new_key_record,
)
from services.problems import FieldError, ProblemError, invalid_request

router = APIRouter(prefix="/v1/admin/keys", tags=["admin"], dependencies=[Depends(needs_access_control)])

_Admin = Annotated[Principal, requires("admin")]


@router.post(
    "",
    status_code=201,
    summary="Create an API key",
    response_model=NewKey,
    openapi_extra=json_body("KeyRequest"),
    responses={
        201: {"description": "The key. It is not shown again.", "headers": headers("Location")},
        **problems(*JSON_PROBLEMS, "no-access-control", "not-ready"),
    },
)
async def create_key(request: Request, response: Response, context: ContextDep, principal: _Admin) -> NewKey:
    """Create a key for a tenant. The service stores only its hash."""
    body = await read_model(request, KeyRequest)
    try:
        key, text = await asyncio.to_thread(
            context.auth.keys.create,
            tenant=body.tenant,
            name=body.name,
            scopes=body.scopes,
            created_by=principal.subject,
            lifetime_seconds=body.expires_in_seconds,
        )
    except KeyRefusedError as error:
        raise invalid_request([FieldError(field=error.field, message=error.message)]) from None
    describe(request, key.allows)
    response.headers["Cache-Control"] = "no-store"
    response.headers["Location"] = f"/v1/admin/keys/{key.id}"
    return new_key_record(key, text)


@router.get("", summary="List the API keys", responses=problems("invalid-request", "no-access-control", "not-ready"))
async def list_keys(
    context: ContextDep,
    principal: _Admin,
    tenant: Annotated[str | None, Query(max_length=63, description="Only keys of this tenant.")] = None,
) -> KeyList:
    """List the keys of all tenants, newest first, also those that have ended."""
    keys = await asyncio.to_thread(context.auth.keys.all, tenant)
    return KeyList(data=[key_record(key) for key in keys])


@router.get("/{key_id}", summary="Show an API key", responses=problems("not-found", "no-access-control", "not-ready"))
async def get_key(key_id: str, context: ContextDep, principal: _Admin) -> KeyRecord:
    """Show a key without its secret."""
    with _unknown_is_404():
        return key_record(await asyncio.to_thread(context.auth.keys.get, key_id))


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    summary="Rotate an API key",
    response_model=NewKey,
    responses={
        201: {"description": "The new key. It is not shown again.", "headers": headers("Location")},
        **problems("invalid-request", "no-access-control", "not-found", "key-ended", "not-ready"),
    },
)
async def rotate_key(
    key_id: str,
    response: Response,
    context: ContextDep,
    principal: _Admin,
    overlap_seconds: Annotated[
        float,
        Query(
            ge=0, le=MAX_LIFETIME_SECONDS, allow_inf_nan=False, description="Time for which the old key still works."
        ),
    ] = DEFAULT_OVERLAP_SECONDS,
) -> NewKey:
    """Create a key with the tenant, name, scopes and lifetime of an old one, and let the old one expire."""
    with _unknown_is_404():
        key, text = await asyncio.to_thread(
            context.auth.keys.rotate, key_id, created_by=principal.subject, overlap_seconds=overlap_seconds
        )
    context.auth.cache.invalidate()
    response.headers["Cache-Control"] = "no-store"
    response.headers["Location"] = f"/v1/admin/keys/{key.id}"
    return new_key_record(key, text)


@router.delete(
    "/{key_id}", summary="Revoke an API key", responses=problems("not-found", "no-access-control", "not-ready")
)
async def revoke_key(key_id: str, context: ContextDep, principal: _Admin) -> KeyRecord:
    """Revoke a key. Every replica refuses requests with it within seconds. The record is kept."""
    with _unknown_is_404():
        key = await asyncio.to_thread(context.auth.keys.revoke, key_id)
    context.auth.cache.invalidate()
    return key_record(key)


@contextmanager
def _unknown_is_404() -> Iterator[None]:
    try:
        yield
    except UnknownKeyError as error:
        raise ProblemError("not-found", str(error)) from None
    except KeyEndedError as error:
        raise ProblemError("key-ended", str(error)) from None
