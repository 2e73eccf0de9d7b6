"""ClassificationsResult as flows: many images in calls that the service takes, one after the other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from dermis_client._flow import Api, D, Flow, Request, call, compute, parse
from dermis_client.errors import APIResponseError, APIStatusError, DermisError, InvalidRequestError, TooLargeError
from dermis_client.models import ClassificationsResult

Source: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes]

# What every service takes unless its operator has set less; a call that is too large all the same is halved.
MOST_FILES = 16
MOST_BYTES = 16 << 20
# Heat maps take seconds an image: each image goes by itself, so that no call runs into a time limit.
MOST_HEAT_MAPS = 1

_FIELD = re.compile(r"files\[(\d+)\]")


@dataclass(frozen=True)
class _File:
    place: int  # in the whole list
    name: str
    content: bytes


def sources_of(files: Source | Sequence[Source]) -> list[Source]:
    """The images as a list; one alone becomes a list of one. Raises InvalidRequestError if there are none."""
    found = [files] if isinstance(files, str | bytes | os.PathLike) or hasattr(files, "read") else list(files)
    if not found:
        raise InvalidRequestError("files: give at least one image")
    return found  # type: ignore[return-value]  # hasattr narrows nothing


def classify(
    api: Api[D],
    sources: Sequence[Source],
    params: dict[str, str],
    report: Callable[[int, int], None],
) -> Flow[ClassificationsResult]:
    """POST /v1/classifications, as often as it takes. `report` gets (done, total) after each call."""
    results: list[ClassificationsResult] = []
    waiting: list[_File] = []
    done = 0
    most = MOST_HEAT_MAPS if "heat_map" in params else MOST_FILES
    for place, source in enumerate(sources):
        file = yield from _read(place, source)
        if waiting and (len(waiting) == most or sum(len(w.content) for w in waiting) + len(file.content) > MOST_BYTES):
            results += yield from _send(api, waiting, params)
            done += len(waiting)
            report(done, len(sources))
            waiting = []
        waiting.append(file)
    results += yield from _send(api, waiting, params)
    report(len(sources), len(sources))
    return _merged(results)


def _read(place: int, source: Source) -> Flow[_File]:
    if isinstance(source, bytes):
        return _File(place, f"files[{place}]", source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        try:
            content = yield from compute(path.read_bytes)
        except OSError as error:
            raise InvalidRequestError(f"{path}: cannot be read ({error.strerror or error})") from error
        return _File(place, str(path), content)
    content = yield from compute(source.read)
    if not isinstance(content, bytes):
        raise InvalidRequestError(f"files[{place}]: open it in binary mode")
    return _File(place, f"files[{place}]", content)


def _send(api: Api[D], files: Sequence[_File], params: dict[str, str]) -> Flow[list[ClassificationsResult]]:
    """One call, or halves of it where the service takes less at a time."""
    # What files are called stays here: names may tell who is on them.
    parts = [(f"image-{i}", file.content) for i, file in enumerate(files)]
    try:
        response = yield from call(Request("POST", "/v1/classifications", params=params, files=parts), api.max_retries)
    except TooLargeError as error:
        if len(files) == 1 or error.kind == "image-too-large":
            raise _told_by_name(error, files) from error
        half = len(files) // 2
        first = yield from _send(api, files[:half], params)
        return first + (yield from _send(api, files[half:], params))
    except APIStatusError as error:
        raise _told_by_name(error, files) from error
    result = parse(response, ClassificationsResult.model_validate)
    if len(result) != len(files):
        raise APIResponseError(f"the service gave {len(result)} answers for {len(files)} images; is base_url right?")
    for item in result.data:
        if item.heat_map is not None:
            item.heat_map.check()
        elif "heat_map" in params:
            raise APIResponseError("the service made no heat map; it is older than this client")
    told = [
        item.model_copy(update={"index": file.place, "name": file.name})
        for item, file in zip(result.data, files, strict=True)
    ]
    return [result.model_copy(update={"data": told})]


def _told_by_name(error: APIStatusError, files: Sequence[_File]) -> APIStatusError:
    """The same error, speaking of the caller's files where the service spoke of the parts of one call."""

    def file_of(match: re.Match[str]) -> _File | None:
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


def _merged(results: Sequence[ClassificationsResult]) -> ClassificationsResult:
    first = results[0]
    if any((one.model, one.threshold) != (first.model, first.threshold) for one in results):
        raise DermisError("the service changed its classifier while the images were sent; send them again")
    return first.model_copy(update={"data": [item for one in results for item in one.data]})
