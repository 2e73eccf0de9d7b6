"""Connect the parts of the gateway process: inference clients, jobs and routes."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from dermis.report.appearance import MeasureImages, appearances
from services.audit.trail import AuditTable, Event, now
from services.audit.writer import AuditWriter
from services.gateway.audit import AuditTrail
from services.gateway.auth.authentication import Authenticator
from services.gateway.compared import ComparedImages
from services.gateway.dependencies import Context
from services.gateway.heat_maps import HeatMaps
from services.gateway.limits import GatewayLimits
from services.gateway.quotas import TenantQuotas
from services.gateway.threads import allow_blocked_calls, image_threads, storage_threads
from services.gateway.uploads import Uploads
from services.image_signing import image_signer_of
from services.inference.client import InferenceClients
from services.jobs.context import JobContext
from services.jobs.service import JobService
from services.jobs.table import JobTable
from services.jobs.turns import Turns
from services.models import ServedModels
from services.settings import Settings, SettingsError
from services.studies.preparer import StudyPreparer
from services.studies.service import StudyService
from services.studies.table import StudyTable
from services.webhooks.deliverer import Deliverer
from services.webhooks.outbox import WebhookTable
from services.webhooks.sending import Allowed, Sender

logger = logging.getLogger("dermis.service")


@dataclass(frozen=True)
class Composition:
    """The parts of the gateway process."""

    context: Context
    jobs: JobService
    job_context: JobContext
    deliverer: Deliverer
    preparer: StudyPreparer

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Context]:
        """Start the jobs, provide the context for the routes, and stop everything at the end."""
        context = self.context
        allow_blocked_calls(context.settings)
        await asyncio.to_thread(self.jobs.start)
        async with AsyncExitStack() as stack:  # in reverse order, and all of them even if one fails
            stack.push_async_callback(asyncio.to_thread, self.jobs.stop)
            stack.callback(context.image_threads.close)
            stack.callback(context.storage_threads.close)
            stack.callback(context.studies.close)
            stack.callback(context.compared.close)
            stack.callback(context.uploads.close)
            stack.push_async_callback(context.audit.close)
            stack.push_async_callback(self.preparer.stop)
            stack.push_async_callback(self.deliverer.stop)
            await self._warn_of_unsigned_entries()
            context.audit.writer.start()
            if context.settings.role != "worker":
                if context.settings.max_webhooks:
                    self.deliverer.start()
                else:  # jobs that end still add messages for the webhooks that exist
                    await asyncio.to_thread(self.deliverer.table.remove_old)
            if context.settings.inference:  # also without new studies: those that exist still expire
                self.preparer.start()
            async with context.auth.running():
                await self._record_bootstrap_key()
                yield context

    async def _warn_of_unsigned_entries(self) -> None:
        # Only a warning: of several replicas, the first one that is restarted has the key.
        try:
            await asyncio.to_thread(self.context.audit.writer.table.check_key)
        except SettingsError as error:
            logger.warning("audit entries of this process do not match the earlier ones", extra={"problem": str(error)})

    async def _record_bootstrap_key(self) -> None:
        key_id = self.context.auth.stored_bootstrap_key
        if key_id is not None:
            event = Event(
                time=now(),
                action="key.bootstrap",
                outcome=201,
                subject="service",
                object=key_id,
                detail="tenant default: admin",
            )
            await self.context.audit.writer.write(event)


def compose(
    settings: Settings, models: ServedModels, inference: InferenceClients, measure_images: MeasureImages = appearances
) -> Composition:
    """Create and connect the parts of the gateway process, without starting them. Call it on the event loop that runs them.

    Args:
        settings: The settings of the service.
        models: The served models.
        inference: The clients of the inference services.
        measure_images: Measures the images of reports.
    """
    signer = image_signer_of(settings)
    limits = GatewayLimits.of(settings)
    must_yield = limits.image_waits.is_busy
    job_context = JobContext(
        table=JobTable(settings.jobs_url),
        models=models,
        inference=inference,
        loop=asyncio.get_running_loop(),
        storage=settings.storage,
        turns=Turns(settings.shard_concurrency, must_yield=must_yield),
        finish_turns=Turns(settings.shard_concurrency, must_yield=must_yield),
        projection_turns=Turns(1, must_yield=must_yield),
        min_free_bytes=settings.min_free_bytes,
        sign=None if signer is None else signer.sign,
        measure_images=measure_images,
    )
    jobs = JobService(settings, job_context)
    webhooks = WebhookTable(settings.jobs_url)
    studies = StudyTable(settings.jobs_url)
    context = Context(
        settings=settings,
        auth=Authenticator(settings),
        audit=AuditTrail(AuditWriter(AuditTable.of(settings), sys.stdout if settings.audit_log else None)),
        models=models,
        jobs=jobs.datasets,
        projections=jobs.projections,
        inference=inference,
        limits=limits,
        compared=ComparedImages.of(settings),
        quotas=TenantQuotas(settings, job_context.table),
        uploads=Uploads(settings),
        heat_maps=HeatMaps(settings, inference.explainer),
        webhooks=webhooks,
        studies=StudyService(settings, studies),
        storage_threads=storage_threads(settings),
        image_threads=image_threads(),
        sign=job_context.sign,
        not_ready=_readiness(job_context, jobs),
        not_alive=inference.not_alive,
        stopping=job_context.stopping,
    )
    deliverer = Deliverer(webhooks, Sender(Allowed.of(settings.webhook_hosts)))
    preparer = StudyPreparer(studies, settings, models, inference)
    return Composition(context, jobs, job_context, deliverer, preparer)


def _readiness(ctx: JobContext, jobs: JobService) -> Callable[[], Awaitable[str | None]]:
    """A function that returns why the service is not ready, or None, and logs each change of that."""
    last_reason: str | None = ""

    async def not_ready() -> str | None:
        """The reason, with names of bundles."""
        if ctx.stopping.is_set():
            return "the service is stopping"
        problems = await asyncio.to_thread(ctx.models.check)
        # Other replicas often have the same bundles: without one of several, all of them would receive no requests at all.
        if problems and all(bundle.name in problems for bundle in ctx.models.bundles):
            return "; ".join(problems.values())
        return await asyncio.to_thread(jobs.not_ready) or await ctx.inference.not_ready(problems)

    async def readiness() -> str | None:
        nonlocal last_reason
        reason = await not_ready()
        if reason != last_reason:
            logger.log(logging.WARNING if reason else logging.INFO, "readiness", extra={"missing": reason or "nothing"})
            last_reason = reason
        # Everyone can read /readyz, and not everyone may know which bundles there are.
        return "the service is starting, or its log has the reason" if reason and ctx.models.limited else reason

    return readiness
