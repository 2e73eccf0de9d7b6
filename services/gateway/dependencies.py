"""Dependencies of the routes: the injected context, strict JSON bodies, and content negotiation."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, cast

from fastapi import Depends, Header, Query
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from dermis.bundle import Bundle
from dermis.dataset.shards import Sign
from services.callers import wait_for_disconnect
from services.gateway.audit import AuditTrail
from services.gateway.auth.authentication import Authenticator
from services.gateway.auth.principal import Principal
from services.gateway.bodies import read_bytes
from services.gateway.compared import ComparedImages
from services.gateway.heat_maps import HeatMaps
from services.gateway.limits import GatewayLimits
from services.gateway.quotas import TenantQuotas
from services.gateway.threads import Threads
from services.gateway.uploads import Uploads
from services.inference.client import InferenceClients
from services.inference.connection import time_limit
from services.jobs.service import DatasetJobs, ProjectionJobs
from services.models import ServedModels
from services.problems import FieldError, ProblemError, field_errors, invalid_request
from services.settings import Settings
from services.studies.service import StudyService
from services.webhooks.outbox import WebhookTable

_MAX_DEPTH = 32
# Values and names in a body. Each can cause an error, and while pydantic validates a body nothing else in the process runs.
_MAX_VALUES = 10_000
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_JOB_ID = re.compile(r"[a-z]{2}_[0-9a-f]{32}")

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Context:
    """The parts of the service that the routes use. `services.composition` creates it.

    The methods of `jobs` and `projections` block: call them in a thread.
    """

    settings: Settings
    auth: Authenticator
    audit: AuditTrail
    models: ServedModels
    jobs: DatasetJobs
    projections: ProjectionJobs
    inference: InferenceClients
    limits: GatewayLimits
    compared: ComparedImages
    quotas: TenantQuotas
    uploads: Uploads
    heat_maps: HeatMaps
    webhooks: WebhookTable
    studies: StudyService
    storage_threads: Threads  # read from the storage
    image_threads: Threads  # encode images
    sign: Sign | None  # signs images; None without a certificate
    not_ready: Callable[[], Awaitable[str | None]]  # None if ready, otherwise the reason
    not_alive: Callable[[], Awaitable[str | None]]  # None if alive, otherwise why to restart
    stopping: threading.Event = field(default_factory=threading.Event)  # set when the process is to end


def get_context(request: Request) -> Context:
    """The context of the application that serves `request`."""
    return cast(Context, request.app.state.context)


ContextDep = Annotated[Context, Depends(get_context)]


def needs_access_control(context: ContextDep) -> None:
    """Refuse the admin API to everyone: a key that is made now would still be valid when DERMIS_AUTH is changed.

    Raises:
        ProblemError: The service is used without access control.
    """
    if context.settings.auth == "none":
        raise ProblemError(
            "no-access-control",
            "this service needs no credentials (DERMIS_AUTH=none), so keys and the audit trail are for the commands `dermis "
            "keys` and `dermis audit` only",
        )


ModelQuery = Annotated[
    str | None, Query(max_length=64, description="Name of a served bundle; by default the default model.")
]


@asynccontextmanager
async def limited_time(context: Context, detail: str) -> AsyncIterator[None]:
    """Limit the calls of inference services in a `with` block to the time of a call for images.

    Args:
        context: The context of the routes.
        detail: What is busy, and what the caller can do.

    Raises:
        ProblemError: They take longer.
    """
    try:
        async with time_limit(context.settings.image_timeout_seconds):
            yield
    except TimeoutError:
        raise ProblemError("overloaded", detail, headers={"Retry-After": "5"}) from None


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel the work in a `with` block when the sender closes the connection. The body must have been read.

    Raises:
        ProblemError: The sender has closed the connection. Nobody reads this.
    """
    task = asyncio.current_task()
    assert task is not None
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        await wait_for_disconnect(request.receive)
        disconnected = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if disconnected and task.uncancel() == 0:
            raise ProblemError("bad-request", "the sender closed the connection before the answer was ready") from None
        raise
    finally:
        watcher.cancel()


async def served_bundle(context: Context, principal: Principal, model: str | None) -> Bundle:
    """The served bundle with this name; the default one for None.

    Raises:
        RequestError: If there is no such bundle, or it is not for the tenant of the sender.
        BundleError: If the bundle cannot be served.
    """
    return await asyncio.to_thread(context.models.serving_for, principal.tenant, model)


async def count_pixels(context: Context, request: Request, principal: Principal, pixels: int) -> None:
    """Count the pixels of an upload.

    Raises:
        QuotaExceededError: The quota of the sender's tenant would be exceeded.
    """
    await context.quotas.count(request, principal, {"upload_megapixels_per_minute": pixels})


def model_header(bundle: Bundle) -> dict[str, str]:
    """The response header that names the bundle. Names of bundles are ASCII."""
    return {"X-Dermis-Model": f"{bundle.name}@{bundle.digest}"}


class MalformedJSONError(ValueError):
    """Bytes that are not acceptable JSON; the message says why."""


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly: UTF-8, no NaN or Infinity, no repeated keys, no half surrogate pairs, few levels and values.

    Raises:
        MalformedJSONError: The data is not such JSON.
    """
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
            raise MalformedJSONError(f"the key {key[:100]!r} occurs twice in one object")
        result[key] = value
    return result


def _no_constant(name: str) -> Any:
    raise MalformedJSONError(f"{name} is not a JSON number")


def _check_tree(root: Any) -> None:
    level, depth, values = [root], 0, 0
    while level:
        depth += 1
        values += len(level)
        if depth > _MAX_DEPTH:
            raise MalformedJSONError(f"the body is nested deeper than {_MAX_DEPTH} levels")
        if values > _MAX_VALUES:
            raise MalformedJSONError(f"the body has more than {_MAX_VALUES:,} values and names of fields")
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
                    raise MalformedJSONError("a string contains half a surrogate pair") from None
        level = below


async def read_body(request: Request, limit: int) -> bytes:
    """Read the body of a JSON request, at most `limit` bytes."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", media_type):
        raise ProblemError("unsupported-media-type", "send the body as application/json (header Content-Type)")
    return await read_bytes(request, limit)


async def read_model(request: Request, model: type[M], defaults: Mapping[str, Any] | None = None) -> M:
    """Read the JSON body and validate it.

    Args:
        request: The request.
        model: The model of the body.
        defaults: Values of fields that the body does not contain.

    Raises:
        ProblemError: The body is not JSON or not valid.
    """
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
            description="Your own name for this request. A second request with the same key returns the same job. 1 to 255 "
            "visible ASCII characters.",
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
    """The media type that an Accept header prefers; None if it accepts none.

    Args:
        accept: The header; None or empty accepts everything.
        offers: The available media types, the default first.
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [parsed for part in accept.split(",") if (parsed := _media_range(part)) is not None]
    best, best_quality = None, 0.0
    for offer in offers:
        quality = _quality(offer, ranges)
        if quality > best_quality:
            best, best_quality = offer, quality
    return best


def choose_media_type(request: Request, offers: Sequence[str], more: str = "") -> str:
    """The media type of the response that the Accept header of a request prefers.

    Args:
        request: The request.
        offers: The available media types, the default first.
        more: Text that the message of the refusal adds to the list of media types.

    Raises:
        ProblemError: The header accepts none of them.
    """
    media_type = negotiate(request.headers.get("accept"), offers)
    if media_type is None:
        separator = " and " if len(offers) == 2 else ", "
        raise ProblemError("not-acceptable", f"this route answers with {separator.join(offers)}{more}")
    return media_type


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
    for pattern in (offer, f"{kind}/*", "*/*"):
        qualities = [quality for name, quality in ranges if name == pattern]
        if qualities:
            return max(qualities)
    return 0.0
