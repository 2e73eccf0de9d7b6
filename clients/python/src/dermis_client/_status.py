"""Turn an error answer into the exception that fits it. Pure functions."""

from __future__ import annotations

import httpx

from dermis_client import errors
from dermis_client._retry import parse_retry_after
from dermis_client.models import Problem

_BY_STATUS: dict[int, type[errors.APIStatusError]] = {
    400: errors.BadRequestError,
    404: errors.NotFoundError,
    409: errors.ConflictError,
    413: errors.TooLargeError,
    415: errors.UnsupportedMediaTypeError,
    422: errors.UnprocessableEntityError,
    429: errors.RateLimitError,
}


def one_line(text: str, limit: int = 500) -> str:
    """Text of any origin as one printable line: line breaks and terminal control characters become spaces."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."


def problem_from(response: httpx.Response) -> Problem:
    """The problem document of an answer; one made from the status line if the body holds none (a proxy's page, say)."""
    try:
        body = response.json()
        if isinstance(body, dict):
            return Problem.model_validate(body)
    except ValueError:
        pass
    return Problem(title=response.reason_phrase or "error", status=response.status_code)


def describe(problem: Problem) -> str:
    """What is wrong, in one line: the detail, then each field's message that the detail does not already tell."""
    parts = [problem.detail or problem.title or "the service gave no reason"]
    for error in problem.errors:
        if error.message and error.message not in parts[0]:
            parts.append(f"{error.field}: {error.message}" if error.field else error.message)
    if len(parts) > 1 and not problem.detail:
        parts = parts[1:]
    return one_line("; ".join(parts), limit=2000)


def error_from(response: httpx.Response) -> errors.APIStatusError:
    """The exception for an answer that is no success. The body must have been read."""
    problem, status = problem_from(response), response.status_code
    request_id = problem.request_id or response.headers.get("x-request-id")
    kind = errors.ServerError if status >= 500 else _BY_STATUS.get(status, errors.APIStatusError)
    if problem.kind == "request-too-large":
        kind = errors.TooLargeError
    label = f"{status} {problem.kind}".rstrip()
    if request_id:
        label += f", request {one_line(request_id, 100)}"
    where = "" if problem.detail or problem.errors else f" from {response.request.method} {response.url}"
    if response.is_redirect:
        where += f", sent on to {one_line(response.headers.get('location', '?'))}: give that as base_url"
    return kind(
        f"{describe(problem)}{where} ({label})",
        problem=problem,
        status_code=status,
        request_id=request_id,
        retry_after=parse_retry_after(response.headers.get("retry-after")),
    )
