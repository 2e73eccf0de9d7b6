"""Every error this package raises on purpose. Each message is one readable line that says what to do.

DermisError
    InvalidRequestError         refused here, before anything was sent
    APIConnectionError          no answer: refused, cut, unknown host
        APITimeoutError         no answer in time
    APIResponseError            an answer this client does not understand
    APIStatusError              an answer with an error status; carries the problem document
        BadRequestError (400)  NotFoundError (404)  ConflictError (409)  RateLimitError (429)  ServerError (5xx)
        UnprocessableEntityError (422)
            TooLargeError       413, or more samples than the service allows
        UnsupportedMediaTypeError (415)
    DatasetFailed  DatasetCancelled  ProjectionFailed  WaitTimeoutError     from wait()
    DownloadError               files could not be fetched, kept or unpacked
    IntegrityError              what arrived, or lies on disk, is not what it should be
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dermis_client.latent import Projection
    from dermis_client.models import DatasetRecord, FieldError, Problem


class DermisError(Exception):
    """Base of every error of this package; `str(error)` is one line, fit to be shown to a user."""


class InvalidRequestError(DermisError, ValueError):
    """An argument that cannot be sent at all; nothing was sent."""


class APIConnectionError(DermisError):
    """The service did not answer: connection refused or cut, host unknown, TLS failure."""


class APITimeoutError(APIConnectionError):
    """The service did not answer in time."""


class APIResponseError(DermisError):
    """The answer is not one of a dermis service (often: another program listens at this address)."""


class APIStatusError(DermisError):
    """The service answered with an error status.

    problem: the RFC 9457 document, filled from the status line if the body held none. status_code: HTTP status.
    request_id: what to quote to the operator, if the service gave one. retry_after: seconds, if it asked to wait.
    """

    def __init__(
        self,
        message: str,
        *,
        problem: Problem,
        status_code: int,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.problem = problem
        self.status_code = status_code
        self.request_id = request_id
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """The stable short name of the problem, such as "unknown-class" or "dataset-not-ready"; "" if none."""
        return self.problem.kind

    @property
    def errors(self) -> list[FieldError]:
        """The offending fields, each with `field` (dotted path) and `message`; may be empty."""
        return self.problem.errors


class BadRequestError(APIStatusError):
    """400: the service could not read the request."""


class NotFoundError(APIStatusError):
    """404: no such dataset, file or model."""


class ConflictError(APIStatusError):
    """409: the dataset is not ready, or an idempotency key was used again with another request."""


class UnprocessableEntityError(APIStatusError):
    """422: a value is wrong; `errors` names the fields."""


class TooLargeError(UnprocessableEntityError):
    """More was asked or sent than the service allows (413, or 422 of kind "request-too-large")."""


class UnsupportedMediaTypeError(APIStatusError):
    """415: what was sent is of no kind that the service reads; for uploads, no PNG, JPEG or WebP image."""


class RateLimitError(APIStatusError):
    """429: too many requests; see `retry_after`."""


class ServerError(APIStatusError):
    """5xx: the service failed, is overloaded (503) or out of space (507)."""


class DatasetFailed(DermisError):  # noqa: N818  reads as the state it reports
    """wait() ended because the dataset failed. `dataset` is its last record, `problem` the reason if known."""

    def __init__(self, message: str, dataset: DatasetRecord) -> None:
        super().__init__(message)
        self.dataset = dataset

    @property
    def problem(self) -> Problem | None:
        return self.dataset.error


class DatasetCancelled(DermisError):  # noqa: N818  reads as the state it reports
    """wait() ended because the dataset was cancelled. `dataset` is its last record."""

    def __init__(self, message: str, dataset: DatasetRecord) -> None:
        super().__init__(message)
        self.dataset = dataset


class ProjectionFailed(DermisError):  # noqa: N818  reads as the state it reports
    """wait() ended because the projection failed. `projection` is its last record."""

    def __init__(self, message: str, projection: Projection) -> None:
        super().__init__(message)
        self.projection = projection


class WaitTimeoutError(DermisError, TimeoutError):
    """wait(timeout=...) ended before the dataset did; the dataset goes on. `dataset`: its last record, if any."""

    def __init__(self, message: str, dataset: DatasetRecord | None) -> None:
        super().__init__(message)
        self.dataset = dataset


class DownloadError(DermisError):
    """A file could not be fetched, written or unpacked. What has arrived is kept, and the next try goes on from it."""


class IntegrityError(DermisError):
    """Bytes that are not what the service or the manifest says they are, or a file name that is not safe to write.

    name: the file or sample concerned. expected, actual: SHA-256 in hex where the hashes differ, else None.
    """

    def __init__(self, message: str, *, name: str, expected: str | None = None, actual: str | None = None) -> None:
        super().__init__(message)
        self.name = name
        self.expected = expected
        self.actual = actual
