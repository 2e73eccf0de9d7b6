"""Authenticity, directions, edits and projections as flows."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dermis_client import _requests
from dermis_client._flow import Api, D, Flow, Request, call, compute, now, parse, sleep
from dermis_client._status import describe
from dermis_client._uploads import MOST_FILES, File, Source, in_calls, parts_of, read_file, told_by_name
from dermis_client._writing import write_whole
from dermis_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    DermisError,
    ProjectionFailed,
    RateLimitError,
    ServerError,
    WaitTimeoutError,
)
from dermis_client.latent import AuthenticityResult, Direction, EditsResult, Projection
from dermis_client.models import Answer

QUICK_ANSWER = 30.0  # seconds that a status request may take
MOST_FILE_BYTES = 256 << 20  # of one file of a projection: latents, an image or a video
_SUFFIXES = {"latents": "safetensors", "image": "png", "video": "gif"}


class _Directions(Answer):
    data: list[Direction]


def check_files(
    api: Api[D], sources: Sequence[Source], model: str | None, report: Callable[[int, int], None]
) -> Flow[AuthenticityResult]:
    """POST /v1/authenticity with uploads, as often as it takes."""
    params = {} if model is None else {"model": model}
    results = yield from in_calls(sources, MOST_FILES, partial(_check, api, params), report)
    if any(one.model != results[0].model for one in results):
        raise DermisError("the service changed its index while the images were sent; send them again")
    return results[0].model_copy(update={"data": [verdict for one in results for verdict in one.data]})


def _check(api: Api[D], params: dict[str, str], files: Sequence[File]) -> Flow[AuthenticityResult]:
    request = Request("POST", "/v1/authenticity", params=params, files=parts_of(files))
    result = parse((yield from call(request, api.max_retries)), AuthenticityResult.model_validate)
    if len(result) != len(files):
        raise APIResponseError(f"the service gave {len(result)} answers for {len(files)} images; is base_url right?")
    told = [
        verdict.model_copy(update={"index": file.place, "name": file.name})
        for verdict, file in zip(result.data, files, strict=True)
    ]
    return result.model_copy(update={"data": told})


def check_generated(api: Api[D], body: Mapping[str, Any]) -> Flow[AuthenticityResult]:
    """POST /v1/authenticity with the body of /v1/images."""
    response = yield from call(Request("POST", "/v1/authenticity", json=body), api.max_retries)
    return parse(response, AuthenticityResult.model_validate)


def list_directions(api: Api[D], model: str | None) -> Flow[list[Direction]]:
    """GET /v1/directions."""
    params = {} if model is None else {"model": model}
    response = yield from call(Request("GET", "/v1/directions", params=params), api.max_retries)
    return parse(response, _Directions.model_validate).data


def edit(api: Api[D], body: Mapping[str, Any]) -> Flow[EditsResult]:
    """POST /v1/edits; the same request gives the same images."""
    across = len((body.get("sweep") or {}).get("strengths", ())) or 1
    most = _requests.most_bytes(len(body.get("samples") or body.get("projections") or ()) * across)
    response = yield from call(Request("POST", "/v1/edits", json=body, most=most), api.max_retries)
    result = parse(response, EditsResult.model_validate)
    for image in result.data:
        image.check()
    return result


def create_projection(
    api: Api[D], sources: Sequence[Source], params: dict[str, str], idempotency_key: str | None
) -> Flow[Projection]:
    """POST /v1/projections, all images in one call."""
    files = []
    for place, source in enumerate(sources):
        files.append((yield from read_file(place, source)))
    key = _requests.checked_key(idempotency_key or uuid.uuid4().hex)
    request = Request("POST", "/v1/projections", params=params, headers={"Idempotency-Key": key}, files=parts_of(files))
    try:
        response = yield from call(request, api.max_retries)
    except APIStatusError as error:
        raise told_by_name(error, files) from error
    return parse(response, Projection.model_validate)


def retrieve_projection(api: Api[D], projection_id: str) -> Flow[Projection]:
    """GET /v1/projections/{id}."""
    response = yield from call(Request("GET", _requests.projection_path(projection_id)), api.max_retries)
    return parse(response, Projection.model_validate)


def delete_projection(api: Api[D], projection_id: str) -> Flow[None]:
    """DELETE /v1/projections/{id}."""
    yield from call(Request("DELETE", _requests.projection_path(projection_id)), api.max_retries)


def wait_for_projection(
    api: Api[D],
    projection_id: str,
    *,
    timeout: float | None,
    poll_interval: float,
    patience: float,
    report: Callable[[Projection], None],
) -> Flow[Projection]:
    """Until the projection has ended, asking every `poll_interval` seconds; a silence of `patience` is sat out."""
    heard = yield from now()
    deadline = math.inf if timeout is None else heard + timeout
    request = Request("GET", _requests.projection_path(projection_id), read_timeout=QUICK_ANSWER)
    while True:
        try:
            found = parse((yield from call(request, 0)), Projection.model_validate)
        except (APIConnectionError, ServerError, RateLimitError):
            if (yield from now()) - heard > patience:
                raise
        else:
            heard = yield from now()
            report(found)
            if found.state == "failed":
                reason = describe(found.error) if found.error else "the service gave no reason"
                raise ProjectionFailed(f"{projection_id} failed: {reason}", found)
            if found.finished:
                return found
        left = deadline - (yield from now())
        if left <= 0:
            raise WaitTimeoutError(f"{projection_id} goes on after {timeout:g} s of waiting: wait for it again", None)
        yield from sleep(min(poll_interval, left))


def download_projection(api: Api[D], projection_id: str, folder: Path) -> Flow[list[Path]]:
    """All files of a projection into a folder, as 0000.safetensors, 0000.png, ..."""
    found = yield from retrieve_projection(api, projection_id)
    if found.data is None:
        # The service's own words, for instance that it is still running.
        request = Request("GET", _requests.projection_path(projection_id, "files", "00000.safetensors"))
        yield from call(request, api.max_retries)
        raise APIResponseError(f"{projection_id} lists no results; is the service older than this client?")
    if [image.index for image in found.data] != list(range(len(found.data))):
        raise APIResponseError(f"{projection_id} lists its images out of order; is the service broken?")
    written: list[Path] = []
    for image in found.data:
        for kind, path in sorted(image.files.items()):
            name = path.rpartition("/")[2]
            request = Request("GET", _requests.projection_path(projection_id, "files", name), most=MOST_FILE_BYTES)
            content = (yield from call(request, api.max_retries)).content
            target = folder / f"{image.index:04d}.{_SUFFIXES.get(kind, 'bin')}"
            yield from compute(partial(write_whole, target, content))
            written.append(target)
    return written
