"""Health probes and metrics."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter
from starlette.responses import Response

from services import metrics
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import ContextDep
from services.gateway.openapi import problems
from services.gateway.schemas.common import Health
from services.problems import ProblemError

PATHS = ("/livez", "/readyz", "/healthz", "/metrics")

router = APIRouter(tags=["health"])

_Reader = Annotated[Principal, requires("metrics:read", opened_by="open_metrics")]


@router.get("/livez", summary="Whether the process is alive", responses=problems("not-ready"))
async def livez(context: ContextDep) -> Health:
    """200 unless only a restart can repair the service."""
    reason = await context.not_alive()
    if reason is not None:
        raise ProblemError("not-ready", reason, headers={"Retry-After": "5"})
    return Health(status="alive")


@router.get("/healthz", include_in_schema=False)
async def healthz(context: ContextDep) -> Health:
    """The same as /livez, under the name that BentoML uses."""
    return await livez(context)


@router.get("/readyz", summary="Whether the service can process requests", responses=problems("not-ready"))
async def readyz(context: ContextDep) -> Health:
    """200 if the inference services answer, a bundle is intact and the jobs database can be read."""
    reason = await context.not_ready()
    if reason is not None:
        raise ProblemError("not-ready", reason, headers={"Retry-After": "5"})
    return Health(status="ready")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems(),
    },
)
async def get_metrics(context: ContextDep, principal: _Reader) -> Response:
    """Counters, latencies, the queue and the served models, in the text format of Prometheus."""
    jobs, states = context.jobs, context.models.states
    text = await asyncio.to_thread(lambda: metrics.render(jobs.statistics, jobs.free_bytes, states()))
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})
