"""RFC 9457 problem documents, their kinds, and which problem an error is."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError, DermisError, RequestError, StorageError
from services.errors import DatabaseUnavailableError, InferenceUnavailableError, NotInstalledError

PROBLEM_MEDIA_TYPE = "application/problem+json"
_MAX_ERRORS = 20
_MAX_NAME = 100

# kind -> (status, title). The kind is the stable part: `type` is "urn:dermis:problem:<kind>".
KINDS: Mapping[str, tuple[int, str]] = {
    "malformed-json": (400, "The body is not valid JSON"),
    "bad-request": (400, "The request cannot be understood"),
    "cross-origin": (403, "Another origin may not do this"),
    "uploads-disabled": (403, "Uploads are switched off here"),
    "not-found": (404, "There is nothing here"),
    "unknown-model": (404, "Unknown model"),
    "method-not-allowed": (405, "Method not allowed"),
    "not-acceptable": (406, "No acceptable representation"),
    "upload-timeout": (408, "The upload took too long"),
    "dataset-not-ready": (409, "The dataset is not ready"),
    "projection-not-ready": (409, "The projection is not ready"),
    "idempotency-conflict": (409, "The idempotency key was used for another request"),
    "too-large": (413, "The body is too large"),
    "image-too-large": (413, "An image has too many pixels"),
    "unsupported-media-type": (415, "Unsupported media type"),
    "range-not-satisfiable": (416, "The range lies outside the file"),
    "untrusted-host": (421, "The service does not answer under this host name"),
    "headers-too-large": (431, "The headers are too large"),
    "invalid-request": (422, "The request is not valid"),
    "unknown-class": (422, "Unknown class"),
    "unusable-image": (422, "An image cannot be used"),
    "no-classifier": (422, "The model has no classifier"),
    "no-index": (422, "The model has no index of its training images"),
    "request-too-large": (422, "The request asks for too much"),
    "too-many-requests": (429, "The limit of what may be at work is reached"),
    "internal": (500, "Internal error"),
    "not-installed": (501, "The service lacks what this needs"),
    "model-unavailable": (503, "The model cannot be served"),
    "not-ready": (503, "The service is not ready"),
    "upload-interrupted": (503, "The upload was interrupted"),
    "overloaded": (503, "The service is busy"),
    "storage-full": (507, "The storage is full"),
}


class FieldError(BaseModel):
    """One thing that is wrong with one field."""

    field: str = Field(description="Dotted path of the field, or the name of the parameter or header.")
    message: str = Field(description="What is wrong with it.")


class Problem(BaseModel):
    """What went wrong and what to do (RFC 9457)."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field(description="urn:dermis:problem:<kind>; stable.", examples=["urn:dermis:problem:unknown-class"])
    title: str = Field(description="The kind in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong here and what to do about it.")
    instance: str = Field(description="Path of the request, or of the dataset or projection that failed.")
    request_id: str | None = Field(None, description="Id of the request, also in the X-Request-Id header and the log.")
    errors: list[FieldError] = Field(default_factory=list, description="The fields at fault, if fields are.")


class ProblemError(DermisError):
    """Raised anywhere below a route to answer with a problem document."""

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})


def problem(
    kind: str, detail: str, instance: str, request_id: str | None = None, errors: Iterable[FieldError] = ()
) -> Problem:
    """A problem document of a known kind."""
    status, title = KINDS[kind]
    return Problem(
        type=f"urn:dermis:problem:{kind}",
        title=title,
        status=status,
        detail=detail,
        instance=instance,
        request_id=request_id,
        errors=list(errors),
    )


def field_errors(details: Iterable[Mapping[str, Any]], drop_first: bool = False) -> list[FieldError]:
    """pydantic's error list as ours: dotted path and message, never the offending value itself."""
    errors: list[FieldError] = []
    for item in details:
        location = list(item.get("loc", ()))
        if drop_first:
            location = location[1:]
        # pydantic marks an error about a dictionary's key (not its value) with a trailing "[key]".
        parts = [str(part)[:_MAX_NAME] for part in location if part != "[key]"]
        message = str(item.get("msg", "is not valid")).removeprefix("Value error, ")
        if item.get("type") == "extra_forbidden":
            message = "unknown field; remove it or correct its name"
        errors.append(FieldError(field=".".join(parts) or "body", message=message))
        if len(errors) == _MAX_ERRORS:
            break
    return errors


def invalid_request(errors: Sequence[FieldError]) -> ProblemError:
    """The problem of a body or parameter that fails validation; the detail repeats the first error."""
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ProblemError("invalid-request", f"{first.field}: {first.message}{more}", errors=errors)


def problem_of(error: Exception) -> ProblemError:
    """The problem that describes an error to a caller.

    Args:
        error: An error of the library or of a called service. Its text is left out where it may name a place of the service.
    """
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, RequestError):
        kind = error.kind if error.kind in KINDS else "invalid-request"
        return ProblemError(kind, str(error), errors=[FieldError(field=error.field, message=error.message)])
    if isinstance(error, ValidationError):
        return invalid_request(field_errors(cast("list[Mapping[str, Any]]", error.errors(include_url=False))))
    if isinstance(error, BundleError):
        return ProblemError("model-unavailable", str(error))
    if isinstance(error, InferenceUnavailableError | DatabaseUnavailableError):
        return ProblemError("not-ready", str(error), headers={"Retry-After": "5"})
    if isinstance(error, NotInstalledError):
        return ProblemError("not-installed", f"{error}; tell the operator of this service")
    if isinstance(error, StorageError):
        # Its text names places, and may be a driver's: both are for the log.
        if error.kind == "storage-full":
            return ProblemError("storage-full", "the storage of the service is full; free some space and try again")
        if error.kind == "storage-unavailable":
            detail = "the storage of the service cannot be reached at the moment; try again"
            return ProblemError("not-ready", detail, headers={"Retry-After": "5"})
        return ProblemError("internal", "the service cannot read or write its storage; the log has more")
    if is_disk_full(error):
        return ProblemError("storage-full", "the storage of the service is full; free some space and try again")
    return ProblemError("internal", "the service failed to answer; the log has more under this request id")


def is_disk_full(error: BaseException) -> bool:
    """Whether an error or one of its causes says that no space is left."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # What SQLite says; the driver's error carries no errno.
        if "database or disk is full" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
