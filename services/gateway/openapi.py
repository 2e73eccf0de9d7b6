"""The OpenAPI document, and its parts that are written by the routes: every status that a route can return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic.json_schema import models_json_schema

from dermis.dataset.request import DatasetRequest
from dermis.image_reading import FORMATS
from services.gateway import origins
from services.gateway.auth.authentication import access_of
from services.gateway.auth.principal import SCOPES
from services.gateway.schemas.datasets import Dataset
from services.gateway.schemas.edits import EditsRequest
from services.gateway.schemas.embeddings import EmbeddingsRequest, ProjectedEmbeddingsRequest
from services.gateway.schemas.images import ImagesRequest, SamplesRequest
from services.gateway.schemas.keys import KeyRequest
from services.gateway.schemas.latent_images import InterpolationRequest, NeighboursRequest
from services.gateway.schemas.studies import AnswerRequest, InvitationRequest, StudyRequest
from services.gateway.schemas.webhooks import WebhookRequest
from services.problems import KINDS, PROBLEM_MEDIA_TYPE
from services.settings import Settings

Responses = dict[int | str, dict[str, Any]]

_PROBLEM_CONTENT = {PROBLEM_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
_HEADERS = {
    "Location": "Path of the dataset, projection, webhook, study, invitation or API key, or URL of the file.",
    "Retry-After": "Seconds after which to try again.",
    "RateLimit-Policy": "Quotas with a window that the request counts against (draft-ietf-httpapi-ratelimit-headers).",
    "RateLimit": "What remains of these quotas, and seconds until the window ends.",
    "ETag": "Hash of the file, in quotes.",
    "Accept-Ranges": "bytes",
    "Content-Range": "Range of the bytes, and the size of the file.",
    "Content-Disposition": "Name of the file.",
    "X-Dermis-Model": "Name and digest of the model, as name@digest.",
    "X-Dermis-Classification": "Class, calibrated probability and threshold of the image that the heat map explains.",
    "X-Dermis-Notice": "Purposes that the results must not be used for.",
}


# Kinds of problems of routes that read uploaded images, and of routes that read a JSON body.
UPLOAD_PROBLEMS = (
    "bad-request",
    "upload-timeout",
    "too-large",
    "image-too-large",
    "unsupported-media-type",
    "invalid-request",
    "request-too-large",
    "unusable-image",
    "overloaded",
)
JSON_PROBLEMS = ("malformed-json", "too-large", "unsupported-media-type", "invalid-request")
GENERATION_PROBLEMS = (
    *JSON_PROBLEMS,
    "unknown-model",
    "not-acceptable",
    "unknown-class",
    "request-too-large",
    "quota-exceeded",
    "overloaded",
    "not-ready",
    "model-unavailable",
)
"""The problems of a call with a JSON body that generates images."""


def problems(*kinds: str) -> Responses:
    """Documentation of the problems that a route can return. `internal` is always among them."""
    responses: Responses = {}
    for kind in dict.fromkeys((*kinds, "internal")):
        status, title = KINDS[kind]
        known = responses.setdefault(status, {"description": "", "content": _PROBLEM_CONTENT})
        known["description"] = "; ".join(filter(None, (known["description"], f"{title} (`{kind}`)")))
        if status in (429, 503):
            known.setdefault("headers", {}).update(headers("Retry-After"))
        if kind == "quota-exceeded":
            known["headers"].update(headers("RateLimit-Policy", "RateLimit"))
    return responses


def headers(*names: str) -> dict[str, Any]:
    """Documentation of response headers."""
    return {name: {"description": _HEADERS[name], "schema": {"type": "string"}} for name in names}


def content(*media_types: str) -> dict[str, Any]:
    """Documentation of a response that is a file of one of these types."""
    binary = {"type": "string", "format": "binary"}
    return {kind: {"schema": {} if kind == "application/json" else binary} for kind in media_types}


def json_body(model: str) -> dict[str, Any]:
    """Documentation of a body that the route parses itself, as the component `model`."""
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def image_body(field: str) -> dict[str, Any]:
    """Documentation of a body of uploaded images: multipart parts named `field`, or one image as the body."""
    image = {"type": "string", "format": "binary"}
    form = {
        "type": "object",
        "properties": {field: {"type": "array", "items": image, "minItems": 1, "description": "PNG, JPEG or WebP."}},
        "required": [field],
        "additionalProperties": False,
    }
    # A route recognises images by their content; these are the types that it accepts.
    encoding = {field: {"contentType": ", ".join(FORMATS.values())}}
    kinds = {
        "multipart/form-data": {"schema": form, "encoding": encoding},
        **{kind: {"schema": image} for kind in FORMATS.values()},
    }
    return {"requestBody": {"required": True, "content": kinds}}


def image_or_json_body(field: str, model: str) -> dict[str, Any]:
    """Documentation of a body that is either uploaded images or the component `model`."""
    body = image_body(field)
    body["requestBody"]["content"].update(json_body(model)["requestBody"]["content"])
    return body


def openapi_document(app: FastAPI, settings: Settings) -> dict[str, Any]:
    """The OpenAPI document, including the bodies that routes parse themselves, which FastAPI does not know."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        template = "#/components/schemas/{model}"
        bodies = models_json_schema(
            [
                (DatasetRequest, "validation"),
                (ImagesRequest, "validation"),
                (SamplesRequest, "validation"),
                (EditsRequest, "validation"),
                (InterpolationRequest, "validation"),
                (NeighboursRequest, "validation"),
                (EmbeddingsRequest, "validation"),
                (ProjectedEmbeddingsRequest, "validation"),
                (KeyRequest, "validation"),
                (WebhookRequest, "validation"),
                (StudyRequest, "validation"),
                (InvitationRequest, "validation"),
                (AnswerRequest, "validation"),
                (Dataset, "serialization"),
            ],
            ref_template=template,
        )[1]
        schemas: dict[str, Any] = document.setdefault("components", {}).setdefault("schemas", {})
        added: Mapping[str, Any] = bodies.get("$defs", {})
        for name, schema in added.items():
            schemas.setdefault(name, schema)
        _add_refusals(document)
        _add_access(document, app, settings)
        _add_limits(document, settings)
        app.openapi_schema = document
    return app.openapi_schema


def _add_refusals(document: dict[str, Any]) -> None:
    """Document the responses of `OriginMiddleware`, which every operation can have."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            kinds = [] if path in origins.PROBES else ["bad-request", "untrusted-host"]
            if method.upper() not in origins.SAFE_METHODS:
                kinds.append("cross-origin")
            _add_problems(operation, *kinds)


def _add_problems(operation: dict[str, Any], *kinds: str) -> None:
    for kind in kinds:
        status, title = KINDS[kind]
        entry = operation["responses"].setdefault(str(status), {"description": "", "content": _PROBLEM_CONTENT})
        text = f"{title} (`{kind}`)"
        if text not in entry["description"]:
            entry["description"] = "; ".join(filter(None, (entry["description"], text)))
        if status == 503:
            entry.setdefault("headers", headers("Retry-After"))


def _add_access(document: dict[str, Any], app: FastAPI, settings: Settings) -> None:
    """Name the scopes of each operation, and document its refusals."""
    document["components"]["securitySchemes"] = {
        "apiKey": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "dermis_sk_...",
            "description": "An API key of the service.",
        },
        "accessToken": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "An access token of the OpenID Connect provider of the service, if it has one.",
        },
        "invitation": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "dermis_rd_...",
            "description": "The invitation of one reader of a study.",
        },
    }
    document["x-dermis-scopes"] = dict(SCOPES)
    schemes = {"none": (), "keys": ("apiKey",), "oidc": ("apiKey", "accessToken")}[settings.auth]
    for route in (context.original_route for context in iter_route_contexts(app.routes)):
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        access = access_of(route)
        for method in route.methods or ():
            operation = document["paths"][route.path_format][method.lower()]
            if access is None:
                operation["security"] = []
                continue
            if access.invitation:
                operation["security"] = [{"invitation": []}]
                _add_problems(operation, "unauthenticated", "not-ready")
                continue
            is_open = settings.auth == "none" or (access.opened_by and getattr(settings, access.opened_by))
            scopes = [[scope] for scope in access.any_of] or [[]]
            operation["x-dermis-scopes"] = list(access.any_of)
            operation["security"] = [{scheme: names} for names in scopes for scheme in schemes]
            if is_open:
                operation["security"].append({})
            _add_problems(operation, "unauthenticated", "missing-scope", "not-ready")


def _add_limits(document: dict[str, Any], settings: Settings) -> None:
    """Document the maximum number of images of an upload in this service."""
    limits = {"/v1/projections": settings.max_projection_images}
    for path, operations in document["paths"].items():
        form = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("multipart/form-data")
        if form is not None:
            limit = min(settings.max_upload_images, limits.get(path, settings.max_upload_images))
            for images in form["schema"]["properties"].values():
                images["maxItems"] = max(1, limit)
