"""The gateway: a FastAPI application around an injected `Context`.

The routes are in `routes/`. Every error becomes a problem document. A middleware gives each request an id and observes it in
the log and the metrics.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dermis import __version__
from dermis.bundle.classifier import NOTICE
from services import logs, metrics, tracing
from services.gateway import origins, problems
from services.gateway.audit import AuditMiddleware
from services.gateway.auth.authentication import check_routes
from services.gateway.auth.principal import ANONYMOUS, Principal
from services.gateway.dependencies import Context
from services.gateway.openapi import openapi_document
from services.gateway.problems import problem_response
from services.gateway.proxies import ProxyMiddleware
from services.gateway.quotas import SCOPE_KEY, rate_limit_headers
from services.gateway.routes import (
    audit,
    authenticity,
    classifications,
    datasets,
    docs,
    edits,
    embeddings,
    files,
    health,
    images,
    index,
    keys,
    latent_images,
    models,
    projections,
    reading,
    reports,
    studies,
    usage,
    webhooks,
)
from services.gateway.studio import Studio, StudioMiddleware
from services.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger("dermis.http")

_ROUTES = (
    datasets,
    files,
    reports,
    images,
    edits,
    latent_images,
    projections,
    classifications,
    authenticity,
    embeddings,
    models,
    webhooks,
    studies,
    reading,
    usage,
    keys,
    audit,
    health,
    docs,
    index,
)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_EXPOSED = [
    "Location",
    "ETag",
    "Accept-Ranges",
    "Content-Range",
    "Retry-After",
    "RateLimit",
    "RateLimit-Policy",
    "X-Request-Id",
    "X-Dermis-Model",
]
_DESCRIPTION = f"""Synthetic dermoscopy: generated images of skin lesions, none of which is a photograph of a patient.

- `POST /v1/datasets` generates a dataset in the background.
- `POST /v1/images` generates a few images.
- `POST /v1/classifications` classifies uploaded images.
- `POST /v1/authenticity` compares images with the training images.
- `POST /v1/embeddings` places images on a map of the training images.
- `POST /v1/projections` finds the latents of uploaded images.
- `POST /v1/edits` edits images along directions of the latent space.
- `POST /v1/edits/interpolations` and `/v1/edits/neighbours` generate images between two samples and around one.
- `GET /v1/models` lists the models.
- `GET /v1/usage` shows the quotas of the tenant and their use.

Every error is a problem document (RFC 9457).

**{NOTICE}**"""


def create_app(settings: Settings, running: Callable[[], AbstractAsyncContextManager[Context]]) -> FastAPI:
    """Make the application.

    Args:
        settings: The settings of the service.
        running: Context manager of the time in which the application runs: it starts what the routes need, provides the
            context, and stops everything at the end.
    """

    studio = Studio(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running() as context:
            app.state.context = context
            try:
                yield
            finally:
                await studio.stop()

    app = FastAPI(
        title="dermis",
        version=__version__,
        description=_DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.studio = studio
    problems.install(app)
    for routes in (health,) if settings.role == "worker" else _ROUTES:
        app.include_router(routes.router)
    check_routes(app)
    app.openapi = lambda: openapi_document(app, settings)  # type: ignore[method-assign]
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(StudioMiddleware, studio=studio)
    app.add_middleware(origins.OriginMiddleware, settings=settings)
    app.add_middleware(AuditMiddleware)
    app.add_middleware(RequestMiddleware)
    if settings.trusted_proxies:
        app.add_middleware(ProxyMiddleware, trusted=settings.trusted_proxies)  # the last is the outermost
    return app


class RequestMiddleware:
    """ASGI middleware: request ids, one log line and one observation per request, and problem documents for other errors."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] in health.PATHS:
            await self._answer(scope, receive, send, None)
        else:
            with tracing.request_span(scope, scope["method"]) as span:
                await self._answer(scope, receive, send, span)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, span: Span | None) -> None:
        started = time.perf_counter()
        scope["request_id"] = request_id = _request_id(scope)
        token = logs.request_id.set(request_id)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *rate_limit_headers(scope.get(SCOPE_KEY, ())),
                    (b"x-request-id", request_id.encode("ascii")),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            cause = problems.problem_of(error)
            if cause.kind == "internal":
                logger.exception("request failed", extra={"id": request_id})
            if status == 0:
                response = problem_response(Request(scope), cause.kind, cause.detail, headers=cause.headers)
                await response(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - started
            # The template of the route, not the path: each id would be a series of the metrics, and the id of a projection is
            # secret, so it must not be in the log.
            route = getattr(scope.get("route"), "path", None) or "unknown"
            metrics.request_seconds.labels(scope["method"], route, str(status)).observe(seconds)
            if span is not None:
                span.update_name(f"{scope['method']} {route}")
                span.set_attribute("http.request.method", scope["method"])
                span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    tracing.fail(span, str(status))
            # Probes are sent every few seconds. Changes of readiness are logged by `services.composition`.
            level = logging.DEBUG if route in health.PATHS else logging.INFO
            fields = {"method": scope["method"], "route": route, "status": status, "ms": seconds * 1000}
            principal: Principal = scope.get("dermis.principal", ANONYMOUS)
            if principal is not ANONYMOUS:
                fields |= {"tenant": principal.tenant, "subject": principal.subject}
            logger.log(
                level, "request", extra={**fields, "id": request_id, "client": (scope.get("client") or [None])[0]}
            )
            logs.request_id.reset(token)


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex
