"""Errors of calls to the inference services and to the jobs database."""

from __future__ import annotations

from dermis.dataset.store import storage_error
from dermis.errors import BundleError, DermisError, StorageError


class InferenceUnavailableError(DermisError):
    """A called service cannot process the call now; it may be able to later."""


class InferenceUnreachableError(InferenceUnavailableError):
    """A called service did not respond: it is starting, restarting or overloaded."""


class InferenceMemoryError(InferenceUnavailableError):
    """A called service has too little memory for the call, at the moment or for every call of this size."""


class InferenceFailedError(DermisError):
    """A called service failed."""


class TakenOverError(DermisError):
    """Another worker has taken over a job. The call is repeated until that worker has ended the job."""


class NotInstalledError(DermisError):
    """A called service lacks a package that the call needs; the operator has to install it."""


class LoadPostponedError(DermisError):
    """A model cannot be loaded now, because something lacks memory or threads; a later start may be able to."""


class BundleAwayError(BundleError):
    """The files of a bundle cannot be read at the moment, as its storage cannot be reached."""


class DatabaseUnavailableError(DermisError):
    """The jobs database cannot be reached at the moment, or is locked. No data is lost."""


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later. A transient error is never the outcome of a job."""
    if isinstance(error, StorageError):
        return error.kind == "storage-unavailable"
    # Of a file of a shared folder, in a library that writes or reads it. A time-out without a number is not of a file.
    if isinstance(error, OSError) and error.errno is not None:
        problem = storage_error(error, "", remote=False)
        return problem is not None and problem.kind == "storage-unavailable"
    return isinstance(error, DatabaseUnavailableError | InferenceUnreachableError | BundleAwayError | TakenOverError)
