"""Answer every error of a route with a problem document."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from typing import cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from dermis.errors import DermisError
from services import metrics, problems
from services.gateway.quotas import SCOPE_KEY
from services.jobs.table import IdempotencyConflictError, TooManyActiveError
from services.logs import without_secrets
from services.problems import (
    KINDS,
    PROBLEM_MEDIA_TYPE,
    ExceededQuota,
    FieldError,
    ProblemError,
    field_errors,
    invalid_request,
    problem,
)
from services.quotas import QuotaExceededError
from services.studies.table import AnswerOrderError, StudyStateError, TooManyStudiesError

logger = logging.getLogger("dermis.http")


def problem_response(
    request: Request,
    kind: str,
    detail: str,
    *,
    errors: Iterable[FieldError] = (),
    headers: Mapping[str, str] | None = None,
    quota: ExceededQuota | None = None,
) -> Response:
    """The response to `request` with a problem document."""
    metrics.rejected_requests.labels(kind).inc()
    document = problem(kind, detail, request.url.path, request.scope.get("request_id"), errors, quota)
    # ASCII escapes: a name from the request can contain a lone surrogate, which UTF-8 cannot encode.
    text = json.dumps(document.model_dump(mode="json", exclude_none=True), ensure_ascii=True)
    body = without_secrets(text).encode("ascii")  # a caller may have put a key into the path, and may log the answer
    return Response(body, status_code=document.status, media_type=PROBLEM_MEDIA_TYPE, headers=dict(headers or {}))


def problem_of(error: Exception) -> ProblemError:
    """The problem that describes an error of a route, those of jobs included."""
    if isinstance(error, IdempotencyConflictError):
        detail = "this Idempotency-Key was used for another request; use a new one"
        return ProblemError("idempotency-conflict", detail)
    if isinstance(error, TooManyActiveError):
        return ProblemError("too-many-requests", str(error), headers={"Retry-After": "30"})
    if isinstance(error, StudyStateError):
        return ProblemError("study-state", str(error))
    if isinstance(error, AnswerOrderError):
        return ProblemError("answer-order", str(error))
    if isinstance(error, TooManyStudiesError):
        return ProblemError("too-many-requests", str(error), headers={"Retry-After": "3600"})
    return problems.problem_of(error)


def allowed_methods(request: Request) -> list[str]:
    """The methods of all routes of this path. Starlette's own Allow header lists those of one route only."""
    methods: set[str] = set()
    for route in (context.original_route for context in iter_route_contexts(request.app.routes)):
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted(methods)


async def _on_error(request: Request, error: Exception) -> Response:
    cause = problem_of(error)
    if not isinstance(error, ProblemError) and KINDS[cause.kind][0] >= 500:
        # The text of the error has details that the response does not: paths, and messages of a driver.
        fields = {"id": request.scope.get("request_id"), "kind": cause.kind, "error": str(error)}
        logger.warning("request failed", extra=fields)
    if isinstance(error, QuotaExceededError):
        request.scope[SCOPE_KEY] = [error.use]
    return problem_response(
        request, cause.kind, cause.detail, errors=cause.errors, headers=cause.headers, quota=cause.quota
    )


async def _on_parameters(request: Request, error: Exception) -> Response:
    cause = invalid_request(field_errors(cast(RequestValidationError, error).errors(), drop_first=True))
    return problem_response(request, cause.kind, cause.detail, errors=cause.errors)


async def _on_http(request: Request, error: Exception) -> Response:
    http = cast(HTTPException, error)
    if http.status_code == 405:
        allowed = ", ".join(allowed_methods(request))
        return problem_response(
            request,
            "method-not-allowed",
            f"{request.method} is not possible here; try {allowed}",
            headers={"Allow": allowed},
        )
    kind = next((kind for kind, (status, _) in KINDS.items() if status == http.status_code), "bad-request")
    detail = "no such path; /docs lists those that exist" if http.status_code == 404 else str(http.detail)
    return problem_response(request, kind, detail, headers=http.headers)


def install(app: FastAPI) -> None:
    """Answer every error that `app` raises with a problem document."""
    app.add_exception_handler(DermisError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_parameters)
    app.add_exception_handler(HTTPException, _on_http)
