"""Connect the parts of the gateway process: inference clients, jobs and routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from services.gateway.auth.authentication import Authenticator
from services.gateway.dependencies import Context
from services.gateway.heat_maps import HeatMaps
from services.gateway.limits import GatewayLimits
from services.gateway.quotas import TenantQuotas
from services.gateway.uploads import Uploads
from services.inference.client import InferenceClients
from services.jobs.context import JobContext
from services.jobs.service import JobService
from services.jobs.table import JobTable
from services.models import ServedModels
from services.settings import Settings

logger = logging.getLogger("dermis.service")


@dataclass(frozen=True)
class Composition:
    """The parts of the gateway process."""

    context: Context
    jobs: JobService
    job_context: JobContext

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Context]:
        """Start the jobs, provide the context for the routes, and stop everything at the end."""
        await asyncio.to_thread(self.jobs.start)
        try:
            async with self.context.auth.running():
                yield self.context
        finally:
            self.context.uploads.close()
            await asyncio.to_thread(self.jobs.stop)


def compose(settings: Settings, models: ServedModels, inference: InferenceClients) -> Composition:
    """Create and connect the parts of the gateway process, without starting them. Call it on the event loop that runs them.

    Args:
        settings: The settings of the service.
        models: The served models.
        inference: The clients of the inference services.
    """
    job_context = JobContext(
        table=JobTable(settings.jobs_url),
        models=models,
        inference=inference,
        loop=asyncio.get_running_loop(),
        storage=settings.storage,
        min_free_bytes=settings.min_free_bytes,
    )
    jobs = JobService(settings, job_context)
    context = Context(
        settings=settings,
        auth=Authenticator(settings),
        models=models,
        jobs=jobs.datasets,
        projections=jobs.projections,
        inference=inference,
        limits=GatewayLimits.of(settings),
        quotas=TenantQuotas(settings, job_context.table),
        uploads=Uploads(settings),
        heat_maps=HeatMaps(settings, inference.explainer),
        not_ready=_readiness(job_context, jobs),
        not_alive=inference.not_alive,
        stopping=job_context.stopping,
    )
    return Composition(context, jobs, job_context)


def _readiness(ctx: JobContext, jobs: JobService) -> Callable[[], Awaitable[str | None]]:
    """A function that returns why the service is not ready, or None, and logs each change of that."""
    last_reason: str | None = ""

    async def not_ready() -> str | None:
        """The reason, with names of bundles."""
        if ctx.stopping.is_set():
            return "the service is stopping"
        problems = await asyncio.to_thread(ctx.models.check)
        if problems:
            return "; ".join(problems.values())
        return await asyncio.to_thread(jobs.not_ready) or await ctx.inference.not_ready()

    async def readiness() -> str | None:
        nonlocal last_reason
        reason = await not_ready()
        if reason != last_reason:
            logger.log(logging.WARNING if reason else logging.INFO, "readiness", extra={"missing": reason or "nothing"})
            last_reason = reason
        # Everyone can read /readyz, and not everyone may know which bundles there are.
        return "the service is starting, or its log has the reason" if reason and ctx.models.limited else reason

    return readiness
