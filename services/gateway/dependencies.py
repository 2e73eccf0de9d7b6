"""What routes need: the injected context, strict JSON bodies, and content negotiation."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Annotated, Any, Protocol, TypeVar, cast

import numpy as np
from fastapi import Depends, Header
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from dermis.bundle import Bundle
from dermis.dataset.request import DatasetRequest
from services.gateway.bodies import read_bytes
from services.gateway.heat_maps import HeatMaps
from services.gateway.limits import Limits
from services.gateway.uploads import Uploads
from services.inference.client import InferenceClients
from services.jobs.context import FileInfo
from services.jobs.projection import ProjectionOptions
from services.jobs.table import Job
from services.models import Models
from services.problems import FieldError, ProblemError, field_errors, invalid_request
from services.settings import Settings

_MAX_DEPTH = 32
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_JOB_ID = re.compile(r"[a-z]{2}_[0-9a-f]{32}")

M = TypeVar("M", bound=BaseModel)


class Jobs(Protocol):
    """The dataset jobs that routes need (`services.jobs.service.DatasetJobs`). Blocking; call them in a thread."""

    def submit(self, request: DatasetRequest, idempotency_key: str | None) -> Job:
        """Start a job, or return the one that this key started. See `services.jobs.service.DatasetJobs.submit`."""

    def get(self, job_id: str) -> Job | None:
        """The job, or None."""

    def page(self, limit: int, *, before: int | None = None, state: str | None = None) -> list[Job]:
        """Jobs, newest first."""

    def cancel_or_delete(self, job_id: str) -> Job | None:
        """Ask an active job to stop and return it; remove an ended one with its files and return None."""

    def files(self, job: Job) -> list[FileInfo]:
        """The files of a succeeded job."""

    def open(self, job: Job, name: str) -> AbstractContextManager[IO[bytes]]:
        """One of `files`, open for reading and seeking."""

    def count_by_state(self) -> Mapping[str, int]:
        """How many jobs are in each state."""


class Projections(Protocol):
    """The projection jobs that routes need (`services.jobs.service.ProjectionJobs`). Blocking; call them in a thread."""

    def submit(
        self, bundle: Bundle, options: ProjectionOptions, images: Sequence[NDArray[np.uint8]], key: str | None = None
    ) -> Job:
        """Start a job, or return the one that this key started. See `services.jobs.service.ProjectionJobs.submit`."""

    def get(self, job_id: str) -> Job | None:
        """The job, or None."""

    def cancel_or_delete(self, job_id: str) -> Job | None:
        """Ask an active job to stop and return it; remove an ended one with its files and return None."""

    def results(self, job: Job) -> list[Mapping[str, Any]]:
        """The results of a succeeded job: one row per image, with the names of its files."""

    def latents(self, job: Job, image: int) -> NDArray[np.float32]:
        """ws [num_ws, w_dim] of one image of a succeeded job."""

    def file(self, job: Job, name: str) -> FileInfo | None:
        """One of the files of `results`, or None."""

    def open(self, job: Job, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file, open for reading and seeking."""

    def count_by_state(self) -> Mapping[str, int]:
        """How many projections are in each state."""


@dataclass(frozen=True)
class Context:
    """What the routes need. `services.composition` makes it."""

    settings: Settings
    models: Models
    jobs: Jobs
    projections: Projections
    inference: InferenceClients
    limits: Limits
    uploads: Uploads
    heat_maps: HeatMaps
    not_ready: Callable[[], Awaitable[str | None]]  # None when ready, else what is missing
    not_alive: Callable[[], Awaitable[str | None]]  # None when alive, else why the process should be restarted
    stopping: threading.Event = field(default_factory=threading.Event)  # set when the process is asked to end


def get_context(request: Request) -> Context:
    """The context of the application that serves `request`."""
    return cast(Context, request.app.state.context)


ContextDep = Annotated[Context, Depends(get_context)]


class MalformedJSONError(ValueError):
    """Bytes that are not the JSON we accept; the message says why."""


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 means it: UTF-8, no NaN or Infinity, no key twice, no lone surrogates, at most 32 levels deep."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedJSONError(f"the body is not UTF-8: byte {error.start} does not fit") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise MalformedJSONError(f"the body is nested deeper than {_MAX_DEPTH} levels") from None
    except MalformedJSONError:
        raise
    except json.JSONDecodeError as error:
        raise MalformedJSONError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError:
        # Python refuses to read integers of more than some thousand digits.
        raise MalformedJSONError("a number has too many digits") from None
    _check_tree(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise MalformedJSONError(f"the key {key[:100]!r} stands twice in one object")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise MalformedJSONError(f"{name} is not a JSON number")


def _check_tree(root: Any) -> None:
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise MalformedJSONError(f"the body is nested deeper than {_MAX_DEPTH} levels")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.keys())
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError:
                    raise MalformedJSONError("a string holds half a surrogate pair") from None
        level = below


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a JSON request, never more of it in memory than `limit` bytes."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", media_type):
        raise ProblemError("unsupported-media-type", "send the body as application/json (header Content-Type)")
    return await read_bytes(request, limit)


async def read_model(request: Request, model: type[M], defaults: Mapping[str, Any] | None = None) -> M:
    """The JSON body as `model`, with `defaults` for fields that are not given."""
    data = await read_body(request, get_context(request).settings.max_body_bytes)
    try:
        value = parse_json(data)
    except MalformedJSONError as error:
        raise ProblemError("malformed-json", str(error)) from None
    if not isinstance(value, dict):
        raise invalid_request([FieldError(field="body", message="should be a JSON object")])
    try:
        return model.model_validate({**(defaults or {}), **value})
    except ValidationError as error:
        details = cast("list[Mapping[str, Any]]", error.errors(include_url=False, include_input=False))
        raise invalid_request(field_errors(details)) from None


def idempotency_key(
    value: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="A name of yours for this request; sending it again gives the same job. 1 to 255 visible ASCII "
            "characters.",
            json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": r"^[\x21-\x7e]{1,255}$"},
        ),
    ] = None,
) -> str | None:
    """The Idempotency-Key header, checked."""
    if value is not None and not _KEY.fullmatch(value):
        raise invalid_request([FieldError(field="Idempotency-Key", message="use 1 to 255 visible ASCII characters")])
    return value


IdempotencyKey = Annotated[str | None, Depends(idempotency_key)]


def is_job_id(value: str) -> bool:
    """Whether `value` has the form of a job's id, so that it can be looked up. The table has the kind of the job."""
    return _JOB_ID.fullmatch(value) is not None


def negotiate(accept: str | None, offers: Sequence[str]) -> str | None:
    """The media type of `offers` (best first) that an Accept header likes best; None if it likes none of them."""
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [parsed for part in accept.split(",") if (parsed := _media_range(part)) is not None]
    best, best_quality = None, 0.0
    for offer in offers:
        quality = _quality(offer, ranges)
        if quality > best_quality:
            best, best_quality = offer, quality
    return best


def _media_range(text: str) -> tuple[str, float] | None:
    name, *parameters = [part.strip().lower() for part in text.split(";")]
    if "/" not in name:
        return None
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                return None
    return name, quality if 0.0 <= quality <= 1.0 else 0.0


def _quality(offer: str, ranges: list[tuple[str, float]]) -> float:
    """The quality of the most specific range that matches the offer."""
    kind = offer.split("/", maxsplit=1)[0]
    for wanted in (offer, f"{kind}/*", "*/*"):
        found = [quality for name, quality in ranges if name == wanted]
        if found:
            return max(found)
    return 0.0
