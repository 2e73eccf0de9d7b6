"""Upload images: read them, divide them among requests that the service accepts, name the caller's files in errors."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeVar

from dermis_client._flow import Flow, compute
from dermis_client.embeddings import EmbeddingsResult
from dermis_client.errors import APIResponseError, APIStatusError, DermisError, InvalidRequestError, TooLargeError
from dermis_client.latent import AuthenticityResult
from dermis_client.models import ClassificationsResult

Source: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes]
R = TypeVar("R")
ResultT = TypeVar("ResultT", AuthenticityResult, ClassificationsResult, EmbeddingsResult)

# Every service accepts this much unless its operator has set less; a request that is still too large is divided.
MAX_FILES = 16
MAX_BYTES = 16 << 20

_KINDS = "a path, bytes or a file open for reading"
_FIELD = re.compile(r"files\[(\d+)\]")


@dataclass(frozen=True)
class File:
    """An image to upload.

    Attributes:
        position: Its position in the caller's list.
        name: Its path, or files[position].
        content: Its bytes.
    """

    position: int
    name: str
    content: bytes


def sources_of(files: Source | Iterable[Source]) -> list[Source]:
    """Return the images as a list; a single image becomes a list of one.

    Raises:
        InvalidRequestError: There are no images, or one is neither a path nor bytes nor a file.
    """
    if _is_source(files):
        return [files]  # type: ignore[list-item]  # _is_source narrows nothing
    try:
        sources = list(files)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidRequestError(f"files: must be {_KINDS}, or several of them, not {type(files).__name__}") from None
    if not sources:
        raise InvalidRequestError("files: give at least one image")
    for position, source in enumerate(sources):
        if not _is_source(source):
            raise InvalidRequestError(f"files[{position}]: must be {_KINDS}, not {type(source).__name__}")
    return sources  # type: ignore[return-value]


def _is_source(value: object) -> bool:
    return isinstance(value, str | bytes | bytearray | memoryview | os.PathLike) or hasattr(value, "read")


def upload(
    sources: Sequence[Source],
    max_files: int,
    send: Callable[[Sequence[File]], Flow[R]],
    report: Callable[[int, int], None],
) -> Flow[list[R]]:
    """Send images in as many requests as needed; a request that is too large for the service is divided.

    Args:
        sources: The images.
        max_files: Images in one request.
        send: Sends one request.
        report: Called with (done, total) after each request.

    Returns:
        The result of each request, in order.
    """
    results: list[R] = []
    batch: list[File] = []
    for position, source in enumerate(sources):
        file = yield from read_file(position, source)
        if batch and (len(batch) == max_files or sum(len(f.content) for f in batch) + len(file.content) > MAX_BYTES):
            results += yield from _send_divided(batch, send)
            report(position, len(sources))
            batch = []
        batch.append(file)
    results += yield from _send_divided(batch, send)
    report(len(sources), len(sources))
    return results


def _send_divided(files: Sequence[File], send: Callable[[Sequence[File]], Flow[R]]) -> Generator[Any, Any, list[R]]:
    """Send one request, or its halves where the service accepts less."""
    try:
        return [(yield from send(files))]
    except TooLargeError as error:
        if len(files) == 1 or error.kind == "image-too-large":
            raise with_file_names(error, files) from error
        half = len(files) // 2
        first = yield from _send_divided(files[:half], send)
        return first + (yield from _send_divided(files[half:], send))
    except APIStatusError as error:
        raise with_file_names(error, files) from error


def with_names(result: ResultT, files: Sequence[File]) -> ResultT:
    """Return the result of one request with the positions and names of the caller's files.

    Raises:
        APIResponseError: The result has another number of images than the request.
    """
    if len(result) != len(files):
        raise APIResponseError(f"the service sent {len(result)} results for {len(files)} images; check base_url")
    named = [
        item.model_copy(update={"index": file.position, "name": file.name})
        for item, file in zip(result.data, files, strict=True)
    ]
    return result.model_copy(update={"data": named})


def joined(results: Sequence[ResultT], changed: str, same: Callable[[ResultT], Any]) -> ResultT:
    """Join the results of several requests.

    Args:
        results: The results, in order.
        changed: Name of what must not change between the requests, for the error message.
        same: Returns the parts of a result that must be equal in all results.

    Raises:
        DermisError: The parts differ.
    """
    first = results[0]
    if any(same(result) != same(first) for result in results):
        raise DermisError(f"the service changed its {changed} while the images were sent; send them again")
    return first.model_copy(update={"data": [item for result in results for item in result.data]})


def form_parts(files: Sequence[File]) -> list[tuple[str, bytes]]:
    """Return the parts of a form. File names are not sent: they may contain names of patients."""
    return [(f"image-{i}", file.content) for i, file in enumerate(files)]


def read_file(position: int, source: Source) -> Flow[File]:
    """Read one image.

    Raises:
        InvalidRequestError: It cannot be read.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return File(position, f"files[{position}]", bytes(source))
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            content = yield from compute(path.read_bytes)
        except (OSError, ValueError) as error:  # ValueError: no file has this name
            reason = getattr(error, "strerror", None) or error
            raise InvalidRequestError(f"{path}: cannot be read ({reason})") from error
        return File(position, str(path), content)
    try:
        received: object = yield from compute(source.read)
    except UnicodeDecodeError:  # it is open as text
        received = None
    except (OSError, ValueError) as error:  # ValueError: it is closed
        raise InvalidRequestError(f"files[{position}]: cannot be read ({error})") from error
    if not isinstance(received, bytes):
        raise InvalidRequestError(f"files[{position}]: open it in binary mode")
    return File(position, f"files[{position}]", received)


def with_file_names(error: APIStatusError, files: Sequence[File]) -> APIStatusError:
    """Return the same error with the caller's file names and positions instead of those of one request."""

    def file_of(match: re.Match[str]) -> File | None:
        number = int(match[1])
        return files[number] if number < len(files) else None

    def name(match: re.Match[str]) -> str:
        file = file_of(match)
        return file.name if file else match[0]

    def field(match: re.Match[str]) -> str:
        file = file_of(match)
        return f"files[{file.position}]" if file else match[0]

    problem = error.problem.model_copy(
        update={
            "detail": _FIELD.sub(name, error.problem.detail),
            "errors": [
                item.model_copy(update={"field": _FIELD.sub(field, item.field)}) for item in error.problem.errors
            ],
        }
    )
    return type(error)(
        _FIELD.sub(name, str(error)),
        problem=problem,
        status_code=error.status_code,
        request_id=error.request_id,
        retry_after=error.retry_after,
        headers=error.headers,
    )
