"""/v1/usage: the quotas of the sender's tenant and their use."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter

from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import ContextDep
from services.gateway.openapi import problems
from services.gateway.schemas.usage import Usage, usage_of

router = APIRouter(prefix="/v1/usage", tags=["usage"])

_Anyone = Annotated[Principal, requires()]


@router.get("", summary="Show quotas and their use", responses=problems("not-ready"))
async def get_usage(context: ContextDep, principal: _Anyone) -> Usage:
    """Show the quotas of the sender's tenant. It needs no scope."""
    uses = await context.quotas.usage(principal)
    return usage_of(principal, uses, context.settings.quota_of(principal.tenant).retention_days)
