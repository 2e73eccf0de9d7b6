"""Errors that a user can act on. Programs print their message as it is, without a stack trace.

Text that comes from a file or a request goes into a message through `quote` or `escape`: a name can hold terminal
escape sequences, or be as long as the file.
"""

from __future__ import annotations

import importlib.metadata
import reprlib
from collections.abc import Sequence

QUOTED_CHARACTERS = 200  # largest number of characters of foreign text in a message


class DermisError(Exception):
    """An error that the user can correct. The message names the field or file and says what to do."""


class BundleError(DermisError):
    """A bundle or an official checkpoint cannot be read, or is incomplete, changed or unsafe."""


class RequestError(DermisError):
    """A request that cannot be served. `field` is the path of the wrong value, with dots."""

    def __init__(self, field: str, message: str, kind: str = "invalid-request") -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message
        self.kind = kind


class StorageError(DermisError):
    """Reading or writing files failed.

    `kind` is "storage-full", "storage-unavailable" (the storage cannot be reached at the moment; the same call can succeed
    later), or "storage" (permission, a missing or damaged file).
    """

    def __init__(self, message: str, kind: str = "storage") -> None:
        super().__init__(message)
        self.kind = kind


class MissingShardsError(StorageError):
    """A dataset cannot be finished before some of its shards are made.

    Args:
        location: Folder or URL of the dataset.
        total: Number of shards of the dataset.
        shards: The shards to be made, in order.
        state: What is wrong with each, such as "is missing".
    """

    def __init__(self, location: str, total: int, shards: Sequence[int], state: str) -> None:
        others = f", as are {len(shards) - 1:,} others: {_ranges(shards[1:])}" if len(shards) > 1 else ""
        super().__init__(
            f"{location}: shard {shards[0]} of {total} {state}{others}; make {'them' if others else 'it'}, then finish"
        )
        self.shards = tuple(shards)


class OtherDatasetError(StorageError):
    """A folder contains another dataset than the one to be made, or other files."""


class SignatureError(DermisError):
    """A bundle, dataset or image has no signature, or one that cannot be trusted, or cannot be signed."""


class DataError(DermisError):
    """A folder of training images or its metadata cannot be used."""


class TrainingError(DermisError):
    """Training cannot start, resume or continue."""


def _ranges(numbers: Sequence[int], most: int = 20) -> str:
    """Write sorted numbers as `0, 4-7, 9`, with at most `most` parts."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    texts = ["-".join(map(str, part)) for part in parts]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def escape(text: object, limit: int = QUOTED_CHARACTERS) -> str:
    """Make foreign text safe for one line of a message, a log or a card.

    Args:
        text: A text, or an object (an exception) whose `str` is shown.
        limit: The longest result, in characters.

    Returns:
        The text with everything unprintable (control characters, line breaks, marks that turn the direction of writing,
        lone surrogates) written as Python escapes, cut at `limit` with "..." at the end.
    """
    start = str(text)[: limit + 1]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in start)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def quote(value: object, limit: int = QUOTED_CHARACTERS) -> str:
    """Write a foreign value as a short literal for a message: text in quotation marks, other values in Python's notation.

    Args:
        value: A text, number, or small container of them.
        limit: The longest result, in characters.

    Returns:
        One printable line. The work is bounded by `limit`, whatever the size of the value.
    """
    if isinstance(value, str):
        mark = '"' if "'" in value[:limit] and '"' not in value[:limit] else "'"
        return mark + escape(value, limit - 2) + mark
    return escape(_SHORT.repr(value), limit)


class _ShortRepr(reprlib.Repr):
    """reprlib's class with limits for the two types that it writes out completely first."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 8
        self.maxlevel = 3
        self.maxstring = self.maxother = QUOTED_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 256 else f"a number of {x.bit_length():,} bits"

    def repr_bytes(self, x: bytes, level: int) -> str:
        return repr(x[: QUOTED_CHARACTERS + 1])


_SHORT = _ShortRepr()


def install_command(extra: str) -> str:
    """The pip command that installs the packages of an extra, such as `pip install "captum>=0.9"`.

    The packages are named, as dermis itself may have been installed from a file or from a checkout.
    """
    try:
        requirements = importlib.metadata.requires("dermis") or []
    except importlib.metadata.PackageNotFoundError:  # the code alone, as in a Bento
        requirements = []
    parts = (requirement.partition(";") for requirement in requirements)
    names = [name.strip() for name, _, marker in parts if f'extra == "{extra}"' in marker]
    return "pip install " + (" ".join(f'"{name}"' for name in names) or f'"dermis[{extra}]"')
