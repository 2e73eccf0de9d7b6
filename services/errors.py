"""Errors of calls to the inference services and to the jobs database."""

from __future__ import annotations

from dermis.errors import DermisError, StorageError


class InferenceUnavailableError(DermisError):
    """A called service cannot process the call now; it may be able to later."""


class InferenceUnreachableError(InferenceUnavailableError):
    """A called service did not respond: it is starting, restarting or overloaded."""


class InferenceFailedError(DermisError):
    """A called service failed."""


class NotInstalledError(DermisError):
    """A called service lacks a package that the call needs; the operator has to install it."""


class LoadPostponedError(DermisError):
    """A model cannot be loaded now, because something lacks memory or threads; a later start may be able to."""


class DatabaseUnavailableError(DermisError):
    """The jobs database cannot be reached at the moment, or is locked. No data is lost."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later. A transient error is never the outcome of a job."""
    if isinstance(error, StorageError):
        return error.kind == "storage-unavailable"
    return isinstance(error, DatabaseUnavailableError | InferenceUnreachableError)
