"""What calls to the inference services, to the jobs database and to the storage may end with."""

from __future__ import annotations

from dermis.errors import DermisError, StorageError


class InferenceUnavailableError(DermisError):
    """A called service cannot do what it was asked for now; it may do so later."""


class InferenceUnreachableError(InferenceUnavailableError):
    """A called service did not answer at all: it is starting, restarting or overloaded."""


class InferenceFailedError(DermisError):
    """A called service answered with an error of its own."""


class NotInstalledError(DermisError):
    """A called service lacks a package that this needs; the operator has to install it."""


class DatabaseUnavailableError(DermisError):
    """The jobs database cannot be reached at the moment, or is locked; nothing was lost."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later without anybody changing the request: never the outcome of a job."""
    if isinstance(error, StorageError):
        return error.kind == "storage-unavailable"
    return isinstance(error, DatabaseUnavailableError | InferenceUnreachableError)
