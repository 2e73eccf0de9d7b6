"""RFC 9457 problem documents, their kinds, and the conversion of errors to problems."""

from __future__ import annotations

import datetime
import errno
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError, DermisError, RequestError, SignatureError, StorageError
from services.errors import BundleAwayError, DatabaseUnavailableError, InferenceUnavailableError, NotInstalledError
from services.quotas import QuotaExceededError

PROBLEM_MEDIA_TYPE = "application/problem+json"
_MAX_ERRORS = 20
_MAX_NAME = 100

# kind -> (status, title). The kind is the stable part: `type` is "urn:dermis:problem:<kind>".
KINDS: Mapping[str, tuple[int, str]] = {
    "malformed-json": (400, "The body is not valid JSON"),
    "bad-request": (400, "The request cannot be understood"),
    "unauthenticated": (401, "Credentials are missing or not valid"),
    "missing-scope": (403, "The credentials do not allow this"),
    "no-access-control": (403, "The admin API needs access control"),
    "cross-origin": (403, "Other origins cannot change anything"),
    "webhooks-disabled": (403, "Webhooks are disabled"),
    "studies-disabled": (403, "Reader studies are disabled"),
    "uploads-disabled": (403, "Uploads are disabled"),
    "not-found": (404, "Not found"),
    "unknown-model": (404, "Unknown model"),
    "method-not-allowed": (405, "Method not allowed"),
    "not-acceptable": (406, "No acceptable representation"),
    "upload-timeout": (408, "The upload took too long"),
    "key-ended": (409, "The API key has ended"),
    "dataset-not-ready": (409, "The dataset is not ready"),
    "projection-not-ready": (409, "The projection is not ready"),
    "study-state": (409, "The study is in another state"),
    "answer-order": (409, "An earlier image has no answer"),
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
    "request-too-large": (422, "The request exceeds a limit"),
    "quota-exceeded": (429, "A quota of the tenant is used up"),
    "too-many-requests": (429, "A limit of the service is reached"),
    "internal": (500, "Internal error"),
    "not-installed": (501, "The service lacks a package"),
    "model-unavailable": (503, "The model cannot be served"),
    "not-ready": (503, "The service is not ready"),
    "upload-interrupted": (503, "The upload was interrupted"),
    "overloaded": (503, "The service is busy"),
    "storage-full": (507, "The storage is full"),
}


class FieldError(BaseModel):
    """One error in one field."""

    field: str = Field(description="Dotted path of the field, or the name of the parameter or header.")
    message: str = Field(description="The error in this field.")


class ExceededQuota(BaseModel):
    """The quota that a request exceeds."""

    name: str = Field(description="Name of the quota, as in /v1/usage.")
    unit: str = Field(description="Unit of the numbers.")
    limit: float = Field(description="What the tenant may use.")
    used: float = Field(description="What it uses.")
    requested: float = Field(description="What the request needs.")
    resets_at: datetime.datetime | None = Field(
        None, description="Time at which the use starts again at 0, if it does so regularly."
    )


class Problem(BaseModel):
    """A problem document (RFC 9457): what is wrong, and what to do."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field(description="urn:dermis:problem:<kind>; stable.", examples=["urn:dermis:problem:unknown-class"])
    title: str = Field(description="Short description of the kind.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong with this request, and what to do.")
    instance: str = Field(description="Path of the request, or of the dataset or projection that failed.")
    request_id: str | None = Field(None, description="Id of the request, also in the X-Request-Id header and the log.")
    errors: list[FieldError] = Field(default_factory=list, description="The invalid fields, if any.")
    quota: ExceededQuota | None = Field(None, description="The quota that the request exceeds, if it exceeds one.")


class ProblemError(DermisError):
    """An error that the gateway answers with a problem document.

    Attributes:
        kind: A key of `KINDS`.
        detail: What is wrong and what to do.
        errors: The invalid fields.
        headers: Further headers of the response.
        quota: The quota that the request exceeds.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        quota: ExceededQuota | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind = kind
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})
        self.quota = quota


def problem(
    kind: str,
    detail: str,
    instance: str,
    request_id: str | None = None,
    errors: Iterable[FieldError] = (),
    quota: ExceededQuota | None = None,
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
        quota=quota,
    )


def field_errors(details: Iterable[Mapping[str, Any]], drop_first: bool = False) -> list[FieldError]:
    """Convert the errors of pydantic to dotted paths and messages, without the invalid values.

    Args:
        details: The errors of pydantic.
        drop_first: Whether the first part of each location is left out, such as "query".
    """
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
    """The problem of a body or parameter that is not valid; its detail repeats the first error."""
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ProblemError("invalid-request", f"{first.field}: {first.message}{more}", errors=errors)


def problem_of(error: Exception) -> ProblemError:
    """The problem that describes an error to a caller.

    Args:
        error: An error of the library or of a called service. Its text is left out if it may contain a path of the service.
    """
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, RequestError):
        kind = error.kind if error.kind in KINDS else "invalid-request"
        return ProblemError(kind, str(error), errors=[FieldError(field=error.field, message=error.message)])
    if isinstance(error, ValidationError):
        return invalid_request(field_errors(cast("list[Mapping[str, Any]]", error.errors(include_url=False))))
    if isinstance(error, QuotaExceededError):
        return _exceeded_quota(error)
    if isinstance(error, BundleError):
        headers = {"Retry-After": "5"} if isinstance(error, BundleAwayError) else {}
        return ProblemError("model-unavailable", str(error), headers=headers)
    if isinstance(error, InferenceUnavailableError | DatabaseUnavailableError):
        return ProblemError("not-ready", str(error), headers={"Retry-After": "5"})
    if isinstance(error, SignatureError):
        return ProblemError("internal", f"{error}; ask the operator of this service to renew its certificate")
    if isinstance(error, NotInstalledError):
        return ProblemError("not-installed", f"{error}; ask the operator of this service to install it")
    if isinstance(error, StorageError):
        # Its text contains paths, or is the message of a driver: both are for the log only.
        if error.kind == "storage-full":
            return ProblemError("storage-full", "the storage of the service is full; free some space and try again")
        if error.kind == "storage-unavailable":
            detail = "the storage of the service cannot be reached at the moment; try again"
            return ProblemError("not-ready", detail, headers={"Retry-After": "5"})
        return ProblemError("internal", "the service cannot read or write its storage; see its log")
    if is_disk_full(error):
        return ProblemError("storage-full", "the storage of the service is full; free some space and try again")
    return ProblemError("internal", "the service failed; its log has the details under this request id")


def _exceeded_quota(error: QuotaExceededError) -> ProblemError:
    """The problem of an exceeded quota. Repeating a request that exceeds it by itself does not help, so that is not a 429."""
    use, unit = error.use, error.use.kind
    quota = ExceededQuota(
        name=use.name,
        unit=unit.unit,
        limit=(use.limit or 0) / unit.scale,
        used=(use.used or 0) / unit.scale,
        requested=error.requested / unit.scale,
        resets_at=None if use.resets_at is None else datetime.datetime.fromtimestamp(use.resets_at, datetime.UTC),
    )
    if error.retry_after is None:
        return ProblemError("request-too-large", str(error), quota=quota)
    return ProblemError("quota-exceeded", str(error), headers={"Retry-After": str(error.retry_after)}, quota=quota)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error or one of its causes says that no space is left."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # The message of SQLite, whose errors have no errno.
        if "database or disk is full" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
