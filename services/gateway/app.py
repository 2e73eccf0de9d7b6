"""The gateway: a FastAPI application around an injected `Context`.

Routes stand in `routes/`; every error becomes a problem document; one middleware gives each request its id, its line in
the log and its place in the metrics.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dermis import __version__
from dermis.bundle.classifier import NOTICE
from dermis.dataset.request import DatasetRequest
from services import metrics
from services.gateway import origins, problems
from services.gateway.dependencies import Context
from services.gateway.latent_schemas import EditsRequest
from services.gateway.problems import problem_response
from services.gateway.routes import (
    authenticity,
    classifications,
    datasets,
    docs,
    edits,
    files,
    health,
    images,
    models,
    projections,
)
from services.gateway.routes.answers import PROBLEM_CONTENT
from services.gateway.schemas import Dataset, ImagesRequest
from services.problems import KINDS
from services.settings import Settings

logger = logging.getLogger("dermis.http")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_EXPOSED = ["Location", "ETag", "Accept-Ranges", "Content-Range", "Retry-After", "X-Request-Id", "X-Dermis-Model"]
_DESCRIPTION = f"""Synthetic dermoscopy: ask for images of lesions that no patient had.

`POST /v1/datasets` makes a dataset in the background; `POST /v1/images` a few images at once; `POST /v1/classifications`
says what a classifier makes of images that you send; `POST /v1/authenticity` how near they are to the training images;
`POST /v1/projections` finds their latents; `POST /v1/edits` moves images along directions; `GET /v1/models` tells what there
is to ask for. Every error is a problem document (RFC 9457).

**{NOTICE}**"""


def create_app(settings: Settings, running: Callable[[], AbstractAsyncContextManager[Context]]) -> FastAPI:
    """The application. `running` brackets its life: it gives what the routes need, once all of that has started."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running() as context:
            app.state.context = context
            yield

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
    problems.install(app)
    for routes in (datasets, files, images, edits, projections, classifications, authenticity, models, health, docs):
        app.include_router(routes.router)
    app.openapi = lambda: _openapi(app, settings)  # type: ignore[method-assign]
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(origins.OriginMiddleware, settings=settings)
    app.add_middleware(RequestMiddleware)  # the last is the outermost
    return app


class RequestMiddleware:
    """Request id in and out, one log line, one observation, and a problem document for what nobody else caught."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        scope["request_id"] = request_id = _request_id(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode("ascii"))]
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
            # The route's template, not the path: in the metrics ids would make a series each, and in the log the id of a
            # projection is all that its owner has to keep secret.
            route = getattr(scope.get("route"), "path", None) or "unknown"
            metrics.request_seconds.labels(scope["method"], route, str(status)).observe(seconds)
            # Probes come every few seconds; a change of readiness is logged once, where it is found.
            level = logging.DEBUG if route in health.PATHS else logging.INFO
            fields = {"method": scope["method"], "route": route, "status": status, "ms": seconds * 1000}
            logger.log(
                level, "request", extra={**fields, "id": request_id, "client": (scope.get("client") or [None])[0]}
            )


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return uuid.uuid4().hex


def _openapi(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that routes read by themselves (strictly) added to the components."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        template = "#/components/schemas/{model}"
        bodies = models_json_schema(
            [
                (DatasetRequest, "validation"),
                (ImagesRequest, "validation"),
                (EditsRequest, "validation"),
                (Dataset, "serialization"),
            ],
            ref_template=template,
        )[1]
        schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
        added: Mapping[str, Any] = bodies.get("$defs", {})
        for name, schema in added.items():
            schemas.setdefault(name, schema)
        _add_refusals(document)
        _add_limits(document, settings)
        app.openapi_schema = document
    return app.openapi_schema


def _add_refusals(document: dict[str, Any]) -> None:
    """Document what every route may answer before it is reached (`OriginMiddleware`)."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            kinds = [] if path in origins.PROBES else ["bad-request", "untrusted-host"]
            if method.upper() not in origins.SAFE_METHODS:
                kinds.append("cross-origin")
            for kind in kinds:
                status, title = KINDS[kind]
                entry = operation["responses"].setdefault(str(status), {"description": "", "content": PROBLEM_CONTENT})
                text = f"{title} (`{kind}`)"
                if text not in entry["description"]:
                    entry["description"] = "; ".join(filter(None, (entry["description"], text)))


def _add_limits(document: dict[str, Any], settings: Settings) -> None:
    """Describe how many images an upload may have in this service."""
    of_path = {"/v1/projections": settings.max_projection_images}
    for path, operations in document["paths"].items():
        form = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("multipart/form-data")
        if form is not None:
            most = min(settings.max_upload_images, of_path.get(path, settings.max_upload_images))
            for images in form["schema"]["properties"].values():
                images["maxItems"] = max(1, most)
