"""Convert error responses to exceptions. Pure functions."""

from __future__ import annotations

import httpx

from dermis_client import errors
from dermis_client._retry import parse_retry_after
from dermis_client._untrusted import load_json, one_line, without_query
from dermis_client.models import Problem

_BY_STATUS: dict[int, type[errors.APIStatusError]] = {
    400: errors.BadRequestError,
    401: errors.AuthenticationError,
    403: errors.PermissionDeniedError,
    404: errors.NotFoundError,
    409: errors.ConflictError,
    413: errors.TooLargeError,
    415: errors.UnsupportedMediaTypeError,
    422: errors.UnprocessableEntityError,
    429: errors.RateLimitError,
}
MAX_FIELDS = 10  # invalid fields that a message names


def problem_from(response: httpx.Response) -> Problem:
    """Return the problem document of a response; if the body has none (as a proxy's page), one from the status line."""
    try:
        body = load_json(response.content)
        if isinstance(body, dict):
            return Problem.model_validate(body)
    except ValueError:
        pass
    return Problem(title=response.reason_phrase or "error", status=response.status_code)


def describe(problem: Problem) -> str:
    """Describe a problem in one line: its detail, then each field's message that the detail does not contain."""
    parts = [one_line(problem.detail or problem.title or "the service stated no reason")]
    summary = problem.detail or problem.title
    fields = [error for error in problem.errors if error.message and error.message not in summary]
    for error in fields[:MAX_FIELDS]:
        parts.append(one_line(f"{error.field}: {error.message}" if error.field else error.message, 200))
    if len(fields) > MAX_FIELDS:
        parts.append(f"and {len(fields) - MAX_FIELDS} more")
    if len(parts) > 1 and not problem.detail:
        parts = parts[1:]
    return "; ".join([*(part.rstrip(".") for part in parts[:-1]), parts[-1]])


def error_from(response: httpx.Response) -> errors.APIStatusError:
    """Return the exception for an error response whose body has been read."""
    problem, status = problem_from(response), response.status_code
    request_id = problem.request_id or response.headers.get("x-request-id")
    kind = errors.ServerError if status >= 500 else _BY_STATUS.get(status, errors.APIStatusError)
    if problem.kind == "request-too-large":
        kind = errors.TooLargeError
    label = one_line(f"{status} {problem.kind}", 100)
    if request_id:
        label += f", request {one_line(request_id, 100)}"
    where = "" if problem.detail or problem.errors else f" from {response.request.method} {without_query(response.url)}"
    if response.has_redirect_location:
        where += f", redirected to {without_query(response.headers['location'])}: give that as base_url"
    return kind(
        f"{describe(problem)}{where} ({label})",
        problem=problem,
        status_code=status,
        request_id=request_id,
        retry_after=parse_retry_after(response.headers.get("retry-after")),
        headers=response.headers,
    )
