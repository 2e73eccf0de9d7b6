"""/v1/datasets: create, list, follow and delete datasets."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dermis.dataset.request import DatasetRequest
from services.gateway.auth.authentication import requires
from services.gateway.auth.principal import Principal
from services.gateway.dependencies import Context, ContextDep, IdempotencyKey, is_job_id, read_model
from services.gateway.events import EventStream, progress_events
from services.gateway.openapi import JSON_PROBLEMS, headers, json_body, problems
from services.gateway.schemas.datasets import Dataset, DatasetList, State, dataset_of
from services.jobs.table import Job
from services.problems import FieldError, ProblemError, invalid_request

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

_Reader = Annotated[Principal, requires("datasets:read")]
_Writer = Annotated[Principal, requires("datasets:write")]

# The schema of one event: tools that support server-sent events read the schema of text/event-stream so.
_EVENT = {
    "type": "object",
    "required": ["event", "id", "data"],
    "properties": {
        "event": {"enum": ["progress", "succeeded", "failed", "cancelled"]},
        "id": {"type": "string"},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/Dataset"},
        },
    },
}


def _link(operation: str) -> dict[str, Any]:
    """OpenAPI link: an operation that accepts the id of the new dataset."""
    return {"operationId": operation, "parameters": {"dataset_id": "$response.body#/id"}}


async def find_job(context: Context, principal: Principal, dataset_id: str) -> Job:
    """The job with this id, of the sender's tenant.

    Raises:
        ProblemError: The tenant has no such dataset.
    """
    job = await asyncio.to_thread(context.jobs.get, principal.tenant, dataset_id) if is_job_id(dataset_id) else None
    if job is None:
        raise ProblemError("not-found", f"there is no dataset {dataset_id[:100]}")
    return job


@router.post(
    "",
    status_code=202,
    summary="Create a dataset",
    response_model=Dataset,
    openapi_extra=json_body("DatasetRequest"),
    responses={
        202: {
            "description": "The dataset; it is queued, or in a later state if the idempotency key was used before",
            "headers": headers("Location"),
            "links": {name: _link(name) for name in ("get_dataset", "watch_dataset", "list_files", "delete_dataset")},
        },
        **problems(
            *JSON_PROBLEMS,
            "unknown-model",
            "idempotency-conflict",
            "unknown-class",
            "request-too-large",
            "quota-exceeded",
            "too-many-requests",
            "not-ready",
            "model-unavailable",
            "storage-full",
        ),
    },
)
async def create_dataset(
    request: Request, response: Response, context: ContextDep, principal: _Writer, key: IdempotencyKey
) -> Dataset:
    """Start a dataset, which is generated in the background. The job continues after crashes and restarts."""
    body = await read_model(request, DatasetRequest, {"model": context.models.default_for(principal.tenant)})
    job = await asyncio.to_thread(context.jobs.submit, principal.tenant, body, key)
    await context.quotas.show(request, principal, "images_per_day")
    response.headers["Location"] = f"/v1/datasets/{job.id}"
    return dataset_of(job, context.jobs.expires_at(job))


@router.get("", summary="List the datasets", responses=problems("invalid-request", "not-ready"))
async def list_datasets(
    context: ContextDep,
    principal: _Reader,
    limit: Annotated[int, Query(ge=1, le=100, description="Maximum number of datasets on the page.")] = 20,
    cursor: Annotated[
        str | None,
        Query(description="`next_cursor` of the previous page.", json_schema_extra={"pattern": "^[A-Za-z0-9_-]{8}$"}),
    ] = None,
    state: Annotated[State | None, Query(description="Only datasets in this state.")] = None,
) -> DatasetList:
    """List the datasets of the sender's tenant, newest first.

    Datasets that are created or deleted between two pages do not shift the pages.
    """
    before = None if cursor is None else read_cursor(cursor)
    jobs = await asyncio.to_thread(context.jobs.page, principal.tenant, limit + 1, before=before, state=state)
    page = jobs[:limit]
    more = len(jobs) > limit
    return DatasetList(
        data=[dataset_of(job, context.jobs.expires_at(job)) for job in page],
        next_cursor=make_cursor(page[-1].sequence) if more else None,
    )


@router.get("/{dataset_id}", summary="Show a dataset", responses=problems("not-found", "not-ready"))
async def get_dataset(dataset_id: str, context: ContextDep, principal: _Reader) -> Dataset:
    """Show the state and progress of a dataset."""
    job = await find_job(context, principal, dataset_id)
    return dataset_of(job, context.jobs.expires_at(job))


@router.delete(
    "/{dataset_id}",
    status_code=202,
    summary="Stop or delete a dataset",
    response_model=Dataset,
    responses={
        202: {"description": "It was active and is being stopped; its files are removed"},
        204: {"description": "It had ended; its record and files are deleted"},
        **problems("not-found", "not-ready"),
    },
)
async def delete_dataset(dataset_id: str, context: ContextDep, principal: _Writer) -> Dataset | Response:
    """Stop an active dataset, or delete one that has ended."""
    job = await find_job(context, principal, dataset_id)
    stopping = await asyncio.to_thread(context.jobs.cancel_or_delete, job)
    return Response(status_code=204) if stopping is None else dataset_of(stopping, None)


@router.get(
    "/{dataset_id}/events",
    summary="Follow a dataset",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events with the dataset as data: `progress`, and at the end `succeeded`, `failed` or "
            "`cancelled`",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **problems("not-found", "not-ready", "too-many-requests"),
    },
)
async def watch_dataset(dataset_id: str, request: Request, context: ContextDep, principal: _Reader) -> Response:
    """Stream the progress until the dataset has ended."""
    job = await find_job(context, principal, dataset_id)
    context.limits.event_streams.acquire(principal.tenant)
    return EventStream(
        progress_events(context, job, lambda: context.auth.principal_of(request.headers)),
        lambda: context.limits.event_streams.release(principal.tenant),
    )


def make_cursor(sequence: int) -> str:
    """An opaque cursor of the page that begins below `sequence`."""
    return base64.urlsafe_b64encode(sequence.to_bytes(6, "big")).decode("ascii")


def read_cursor(cursor: str) -> int:
    """The sequence number of a cursor.

    Raises:
        ProblemError: The text is not a cursor of `make_cursor`.
    """
    try:
        data = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != 6:
        raise invalid_request([FieldError(field="cursor", message="use the next_cursor of an earlier page, unchanged")])
    return int.from_bytes(data, "big")
