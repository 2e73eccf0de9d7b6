"""The studio at /studio: the web pages of the package dermis-studio, a client of the API like any other.

The package is optional, and importing it takes seconds. It is therefore imported in a thread, once the service is ready or
when a page is first asked for. Its pages call the API over HTTP with the credentials of their visitors, and have none of
their own.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from dermis.html_page import CONTENT_SECURITY_POLICY, html_page
from services.gateway.audit import leave_out
from services.gateway.problems import problem_response
from services.settings import Settings

if TYPE_CHECKING:
    from dermis_studio.site import StudioSite

logger = logging.getLogger("dermis.studio")

PREFIX = "/studio"
_PAUSE_SECONDS = 1.0
_POLL_SECONDS = 0.5
_STREAM = "/gradio_api/queue/data"
_INSTALL = "pip install 'dermis[studio]'"


@dataclass(frozen=True)
class _Route:
    """What the log and the metrics call requests to the studio: the addresses of pages contain ids."""

    path: str


def studio_installed(settings: Settings) -> bool:
    """Whether the service has the studio: the settings allow it, and its package and Gradio are installed."""
    enabled = settings.studio and settings.role != "worker"
    return enabled and all(importlib.util.find_spec(name) is not None for name in ("dermis_studio", "gradio"))


class Studio:
    """The studio of a gateway, which is built once.

    Attributes:
        enabled: Whether the settings allow it.
        settings: The settings of the service.
    """

    def __init__(self, settings: Settings) -> None:
        self.enabled = settings.studio and settings.role != "worker"
        self.settings = settings
        self._building: asyncio.Task[StudioSite] | None = None
        self._preparing: asyncio.Task[None] | None = None

    def prepare(self, not_ready: Callable[[], Awaitable[str | None]]) -> None:
        """Build the studio once the service is ready, so that nobody waits for it.

        Args:
            not_ready: Returns None if the service is ready.
        """
        if studio_installed(self.settings):
            self._preparing = asyncio.create_task(self._build_when_ready(not_ready))

    async def _build_when_ready(self, not_ready: Callable[[], Awaitable[str | None]]) -> None:
        while await not_ready() is not None:
            await asyncio.sleep(_PAUSE_SECONDS)
        with suppress(Exception):  # the log has it, and a request tries again
            await self.site()

    async def site(self) -> StudioSite:
        """The studio; the first call builds it."""
        if self._building is None or (self._building.done() and self._building.exception() is not None):
            self._building = asyncio.create_task(self._build())
        return await asyncio.shield(self._building)

    async def _build(self) -> StudioSite:
        started = time.perf_counter()
        try:
            site = await asyncio.to_thread(_create, self.settings)
            await site.start()
        except Exception:
            logger.exception("the studio cannot be built")
            raise
        logger.info("studio", extra={"path": PREFIX, "seconds": time.perf_counter() - started})
        return site

    async def stop(self) -> None:
        """Stop the studio, if it was built."""
        for task in (self._preparing, self._building):
            if task is not None and not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
        if self._building is not None and self._building.done() and not self._building.cancelled():
            with suppress(Exception):
                await self._building.result().stop()


def _create(settings: Settings) -> StudioSite:
    from dermis_studio.app import create_site
    from dermis_studio.service import Service

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104
    scheme = "http" if settings.tls_certificate is None else "https"
    address = f"[{host}]" if ":" in host else host
    # This process listens at this address itself. Its certificate is for the name that others use.
    service = Service(f"{scheme}://{address}:{settings.port}", verify=False, own_host=True)
    return create_site(service, PREFIX, needs_key=settings.auth != "none")


class StudioMiddleware:
    """ASGI middleware that answers requests below /studio."""

    def __init__(self, app: ASGIApp, studio: Studio) -> None:
        self._app = app
        self._studio = studio

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path != PREFIX and not path.startswith(f"{PREFIX}/"):
            await self._app(scope, receive, send)
            return
        # Streams of events last as long as a page is open, so they have a series of their own.
        scope["route"] = _Route(f"{PREFIX}/events" if path.endswith(_STREAM) else PREFIX)
        # The pages change nothing themselves: the trail has their calls of the API. Signing out needs no key.
        leave_out(Request(scope))
        if not self._studio.enabled:
            await self._app(scope, receive, send)
            return
        if not studio_installed(self._studio.settings):
            await _missing(Request(scope))(scope, receive, send)
            return
        try:
            site = await self._studio.site()
        except Exception:
            detail = "the studio cannot be started; the log of the service has the reason"
            await problem_response(Request(scope), "internal", detail)(scope, receive, send)
            return
        if not path.endswith(_STREAM):
            await site(scope, receive, send)
            return
        context = getattr(scope["app"].state, "context", None)
        task = asyncio.create_task(site(scope, receive, send))
        try:
            while not (await asyncio.wait({task}, timeout=_POLL_SECONDS))[0]:
                if context is not None and context.stopping.is_set():
                    break  # Gradio's streams would delay the end of the process until its time limit
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def _missing(request: Request) -> Response:
    """The answer of a service without the package."""
    detail = f"the service has no studio, because the package dermis-studio is not installed: {_INSTALL}"
    if "text/html" not in request.headers.get("accept", ""):
        return problem_response(request, "not-installed", detail)
    text = f"""<p>The web pages of this service are in an optional package. Its operator installs it into the environment of
the service and restarts the service:</p><pre><code>{escape(_INSTALL)}</code></pre>
<p>In a checkout, <code>make serve</code> installs it. The API works without it: <a href="/docs">documentation</a>.</p>"""
    page = html_page("The studio is not installed", [], introduction=text, interactive=False)
    return HTMLResponse(page, 501, {"Content-Security-Policy": f"{CONTENT_SECURITY_POLICY}; frame-ancestors 'none'"})
