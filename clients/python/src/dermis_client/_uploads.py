"""Images on their way to the service: read, cut into calls that it takes, and errors told by the caller's own names."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from dermis_client._flow import Flow, compute
from dermis_client.errors import APIStatusError, InvalidRequestError, TooLargeError

Source: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes]
R = TypeVar("R")

# What every service takes unless its operator has set less; a call that is too large all the same is halved.
MOST_FILES = 16
MOST_BYTES = 16 << 20

_FIELD = re.compile(r"files\[(\d+)\]")


@dataclass(frozen=True)
class File:
    """An image as it is sent."""

    place: int  # in the whole list
    name: str
    content: bytes


def sources_of(files: Source | Sequence[Source]) -> list[Source]:
    """The images as a list; one alone becomes a list of one. Raises InvalidRequestError if there are none."""
    found = [files] if isinstance(files, str | bytes | os.PathLike) or hasattr(files, "read") else list(files)
    if not found:
        raise InvalidRequestError("files: give at least one image")
    return found  # type: ignore[return-value]  # hasattr narrows nothing


def in_calls(
    sources: Sequence[Source],
    most: int,
    send: Callable[[Sequence[File]], Flow[R]],
    report: Callable[[int, int], None],
) -> Flow[list[R]]:
    """`send` of all images in calls of at most `most`, halved where the service takes less. `report` gets (done, total)."""
    results: list[R] = []
    waiting: list[File] = []
    for place, source in enumerate(sources):
        file = yield from read_file(place, source)
        if waiting and (len(waiting) == most or sum(len(w.content) for w in waiting) + len(file.content) > MOST_BYTES):
            results += yield from _halved(waiting, send)
            report(place, len(sources))
            waiting = []
        waiting.append(file)
    results += yield from _halved(waiting, send)
    report(len(sources), len(sources))
    return results


def _halved(files: Sequence[File], send: Callable[[Sequence[File]], Flow[R]]) -> Generator[Any, Any, list[R]]:
    """One call, or halves of it where the service takes less at a time."""
    try:
        return [(yield from send(files))]
    except TooLargeError as error:
        if len(files) == 1 or error.kind == "image-too-large":
            raise told_by_name(error, files) from error
        half = len(files) // 2
        first = yield from _halved(files[:half], send)
        return first + (yield from _halved(files[half:], send))
    except APIStatusError as error:
        raise told_by_name(error, files) from error


def parts_of(files: Sequence[File]) -> list[tuple[str, bytes]]:
    """The parts of a form. What files are called stays here: names may tell who is on them."""
    return [(f"image-{i}", file.content) for i, file in enumerate(files)]


def read_file(place: int, source: Source) -> Flow[File]:
    if isinstance(source, bytes):
        return File(place, f"files[{place}]", source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            content = yield from compute(path.read_bytes)
        except OSError as error:
            raise InvalidRequestError(f"{path}: cannot be read ({error.strerror or error})") from error
        return File(place, str(path), content)
    content = yield from compute(source.read)
    if not isinstance(content, bytes):
        raise InvalidRequestError(f"files[{place}]: open it in binary mode")
    return File(place, f"files[{place}]", content)


def told_by_name(error: APIStatusError, files: Sequence[File]) -> APIStatusError:
    """The same error, speaking of the caller's files where the service spoke of the parts of one call."""

    def file_of(match: re.Match[str]) -> File | None:
        number = int(match[1])
        return files[number] if number < len(files) else None

    def name(match: re.Match[str]) -> str:
        file = file_of(match)
        return file.name if file else match[0]

    def place(match: re.Match[str]) -> str:
        file = file_of(match)
        return f"files[{file.place}]" if file else match[0]

    problem = error.problem.model_copy(
        update={
            "detail": _FIELD.sub(name, error.problem.detail),
            "errors": [one.model_copy(update={"field": _FIELD.sub(place, one.field)}) for one in error.problem.errors],
        }
    )
    return type(error)(
        _FIELD.sub(name, str(error)),
        problem=problem,
        status_code=error.status_code,
        request_id=error.request_id,
        retry_after=error.retry_after,
    )
