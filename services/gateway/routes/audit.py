"""/v1/admin/audit: read the audit trail."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from pydantic import AwareDatetime

from services.audit.trail import time_text
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import ContextDep, needs_access_control
from services.gateway.openapi import problems
from services.gateway.schemas.audit import AuditList, audit_list
from services.tenants import TENANT_PATTERN

router = APIRouter(prefix="/v1/admin/audit", tags=["admin"], dependencies=[Depends(needs_access_control)])

_MAX_NUMBER = 1 << 53
_TEXT = r"^[^\x00]*$"  # PostgreSQL has no text with a null character


@router.get("", summary="Read the audit trail", responses=problems("invalid-request", "no-access-control", "not-ready"))
async def read_audit(
    context: ContextDep,
    principal: Annotated[Principal, requires("admin")],
    limit: Annotated[int, Query(ge=1, le=1000, description="Maximum number of entries on the page.")] = 100,
    before: Annotated[
        int | None,
        Query(ge=1, le=_MAX_NUMBER, description="Only entries below this number: `next_before` of the last page."),
    ] = None,
    since: Annotated[
        AwareDatetime | None, Query(description="Only entries of this time or later ones, with a time zone.")
    ] = None,
    until: Annotated[
        AwareDatetime | None, Query(description="Only entries of earlier times, with a time zone.")
    ] = None,
    tenant: Annotated[
        str | None, Query(pattern=f"^{TENANT_PATTERN}$", description="Only entries of this tenant.")
    ] = None,
    subject: Annotated[
        str | None, Query(max_length=300, pattern=_TEXT, description="Only entries of this subject.")
    ] = None,
    action: Annotated[
        str | None, Query(max_length=64, pattern=_TEXT, description="Only entries of this action.")
    ] = None,
    object_id: Annotated[
        str | None,
        Query(alias="object", max_length=100, pattern=_TEXT, description="Only entries about the object with this id."),
    ] = None,
) -> AuditList:
    """Read the trail of all tenants, newest entry first. The request itself is recorded too."""
    table = context.audit.writer.table
    entries = await asyncio.to_thread(
        table.page,
        limit + 1,
        before=before,
        since=None if since is None else time_text(since),
        until=None if until is None else time_text(until),
        tenant=tenant,
        subject=subject,
        action=action,
        object_id=object_id,
    )
    page = entries[:limit]
    head = await asyncio.to_thread(table.head)
    return audit_list(page, page[-1].number if len(entries) > limit else None, head)
