"""Errors that a user can act on. Programs print their message as it is, without a stack trace."""


class DermisError(Exception):
    """Something the user can mend; the message names the field or file and says what to do."""


class BundleError(DermisError):
    """A bundle or an official checkpoint is unreadable, incomplete, tampered with or unsafe."""


class RequestError(DermisError):
    """A request that cannot be served as asked. `field` is the dotted path of the offending value."""

    def __init__(self, field: str, message: str, kind: str = "invalid-request") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.kind = kind


class StorageError(DermisError):
    """Reading or writing files failed.

    `kind` is "storage-full", "storage-unavailable" (the storage cannot be reached at the moment: the same call may succeed
    later), or "storage" (permission, a missing or damaged file).
    """

    def __init__(self, message: str, kind: str = "storage") -> None:
        super().__init__(message)
        self.kind = kind


class DataError(DermisError):
    """A folder of training images or its metadata cannot be used."""


class TrainingError(DermisError):
    """Training cannot start, resume or go on."""
