"""The errors that this package raises. Each message is one line that says what to do.

DermisError
    InvalidRequestError         refused before anything was sent
    APIConnectionError          no response: connection refused or broken, unknown host
        APITimeoutError         no response in time
    APIResponseError            a response that is not one of a dermis service
    APIStatusError              a response with an error status; has the problem document
        AuthenticationError (401)  PermissionDeniedError (403)
        BadRequestError (400)  NotFoundError (404)  ConflictError (409)  RateLimitError (429)  ServerError (5xx)
        UnprocessableEntityError (422)
            TooLargeError       413, or more samples than the service allows
        UnsupportedMediaTypeError (415)
    DatasetFailed  DatasetCancelled  ProjectionFailed  StudyNotReady  WaitTimeoutError     from wait()
    DownloadError               a file could not be fetched, written or unpacked
    IntegrityError              received or stored bytes are not the expected ones

Errors can be pickled and copied, so they pass from one process to another with their attributes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from dermis_client.latent import Projection
    from dermis_client.models import DatasetRecord, FieldError, Problem
    from dermis_client.studies import Study


class DermisError(Exception):
    """Base class of all errors of this package; `str(error)` is one line that can be shown to a user."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[DermisError], args: tuple[Any, ...]) -> DermisError:
    """Make an error of pickle or copy, which set its attributes afterwards: constructors take more than the message."""
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class InvalidRequestError(DermisError, ValueError):
    """An argument cannot be sent; nothing was sent."""


class APIConnectionError(DermisError):
    """The service did not respond: connection refused or broken, unknown host, TLS failure."""


class APITimeoutError(APIConnectionError):
    """The service did not respond in time."""


class APIResponseError(DermisError):
    """The response is not one of a dermis service; often another program listens at this address."""


class APIStatusError(DermisError):
    """The service responded with an error status.

    Attributes:
        problem: The RFC 9457 problem document; made from the status line if the body has none.
        status_code: HTTP status. It is 0, and the problem is empty, in an error that was made from its message alone, as
            PyTorch makes those of the workers of a DataLoader again.
        request_id: Id of the request in the service's log, if the service sent one.
        retry_after: Seconds that the service asked to wait, if it did.
        headers: Headers of the response. Upper and lower case are the same in their names.
    """

    def __init__(
        self,
        message: str,
        *,
        problem: Problem | None = None,
        status_code: int = 0,
        request_id: str | None = None,
        retry_after: float | None = None,
        headers: httpx.Headers | None = None,
    ) -> None:
        super().__init__(message)
        if problem is None:
            from dermis_client import models  # which imports this module

            problem = models.Problem()
        self.problem: Problem = problem
        self.status_code = status_code
        self.request_id = request_id
        self.retry_after = retry_after
        self.headers = httpx.Headers() if headers is None else headers

    @property
    def kind(self) -> str:
        """Stable short name of the problem, such as "unknown-class" or "dataset-not-ready"; "" if there is none."""
        return self.problem.kind

    @property
    def errors(self) -> list[FieldError]:
        """The invalid fields, each with `field` (dotted path) and `message`; may be empty."""
        return self.problem.errors


class BadRequestError(APIStatusError):
    """400: the service could not read the request."""


class AuthenticationError(APIStatusError):
    """401: the API key or access token is missing, unknown, expired or revoked."""


class PermissionDeniedError(APIStatusError):
    """403: the credentials lack a scope, which the message names, or the service has disabled the operation."""


class NotFoundError(APIStatusError):
    """404: the service has no such dataset, projection, file or model."""


class ConflictError(APIStatusError):
    """409: the dataset or projection is not ready, or an idempotency key was used with another request."""


class UnprocessableEntityError(APIStatusError):
    """422: a value is not valid; `errors` names the fields."""


class TooLargeError(UnprocessableEntityError):
    """413, or 422 of kind "request-too-large": the request exceeds a limit of the service."""


class UnsupportedMediaTypeError(APIStatusError):
    """415: the service does not accept this type of content; an upload is not a PNG, JPEG or WebP image."""


class RateLimitError(APIStatusError):
    """429: too many requests; see `retry_after`."""


class ServerError(APIStatusError):
    """5xx: the service failed, is overloaded (503) or out of space (507)."""


class DatasetFailed(DermisError):  # noqa: N818  named after the state
    """wait() ended because the dataset failed. dataset: its last record."""

    def __init__(self, message: str, dataset: DatasetRecord) -> None:
        super().__init__(message)
        self.dataset = dataset

    @property
    def problem(self) -> Problem | None:
        """The reason, if the service sent one."""
        return self.dataset.error


class DatasetCancelled(DermisError):  # noqa: N818  named after the state
    """wait() ended because the dataset was cancelled. dataset: its last record."""

    def __init__(self, message: str, dataset: DatasetRecord) -> None:
        super().__init__(message)
        self.dataset = dataset


class ProjectionFailed(DermisError):  # noqa: N818  named after the state
    """wait() ended because the projection failed. projection: its last record."""

    def __init__(self, message: str, projection: Projection) -> None:
        super().__init__(message)
        self.projection = projection


class StudyNotReady(DermisError):  # noqa: N818  named after the state
    """wait() ended because the preparation of the study failed or was not started. study: its last record."""

    def __init__(self, message: str, study: Study) -> None:
        super().__init__(message)
        self.study = study


class WaitTimeoutError(DermisError, TimeoutError):
    """The timeout of wait() expired; the dataset or projection continues. dataset: its last record, if known."""

    def __init__(self, message: str, dataset: DatasetRecord | None) -> None:
        super().__init__(message)
        self.dataset = dataset


class DownloadError(DermisError):
    """A file could not be fetched, written or unpacked. Received bytes are kept, and the next attempt resumes there."""


class IntegrityError(DermisError):
    """Bytes differ from the hash of the service or the manifest, or a file name is not safe to write.

    Attributes:
        name: The file or sample; "" if it is not known.
        expected: Expected SHA-256 in hex, if the hashes differ.
        actual: Actual SHA-256 in hex, if the hashes differ.
    """

    def __init__(self, message: str, *, name: str = "", expected: str | None = None, actual: str | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.expected = expected
        self.actual = actual
