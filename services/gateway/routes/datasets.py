"""/v1/datasets: ask for a dataset, watch it, stop it."""

from __future__ import annotations

import asyncio
import base64
import binascii
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dermis.dataset.request import DatasetRequest
from services.gateway.dependencies import Context, ContextDep, IdempotencyKey, is_job_id, read_model
from services.gateway.events import progress_events
from services.gateway.openapi import headers, json_body, problems
from services.gateway.schemas import Dataset, DatasetList, State, dataset_of
from services.jobs.table import Job
from services.problems import FieldError, ProblemError, invalid_request

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

# One event, as tools that know server-sent events read a schema of text/event-stream.
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
    """OpenAPI's way to say where the id of a new dataset can be used."""
    return {"operationId": operation, "parameters": {"dataset_id": "$response.body#/id"}}


async def find_job(context: Context, dataset_id: str) -> Job:
    """The job, or the problem that there is none."""
    job = await asyncio.to_thread(context.jobs.get, dataset_id) if is_job_id(dataset_id) else None
    if job is None:
        raise ProblemError("not-found", f"there is no dataset {dataset_id[:100]}")
    return job


@router.post(
    "",
    status_code=202,
    summary="Ask for a dataset",
    response_model=Dataset,
    openapi_extra=json_body("DatasetRequest"),
    responses={
        202: {
            "description": "The dataset, queued or further",
            "headers": headers("Location"),
            "links": {name: _link(name) for name in ("get_dataset", "watch_dataset", "list_files", "delete_dataset")},
        },
        **problems(
            "malformed-json",
            "unknown-model",
            "idempotency-conflict",
            "too-large",
            "unsupported-media-type",
            "invalid-request",
            "unknown-class",
            "request-too-large",
            "too-many-requests",
            "not-ready",
            "model-unavailable",
            "storage-full",
        ),
    },
)
async def create_dataset(request: Request, response: Response, context: ContextDep, key: IdempotencyKey) -> Dataset:
    """Start making a dataset. The answer comes at once; the work goes on through crashes and restarts."""
    wanted = await read_model(request, DatasetRequest, {"model": context.models.default})
    job = await asyncio.to_thread(context.jobs.submit, wanted, key)
    response.headers["Location"] = f"/v1/datasets/{job.id}"
    return dataset_of(job)


@router.get("", summary="List the datasets", responses=problems("invalid-request", "not-ready"))
async def list_datasets(
    context: ContextDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most datasets on the page.")] = 20,
    cursor: Annotated[
        str | None,
        Query(description="`next_cursor` of the page before.", json_schema_extra={"pattern": "^[A-Za-z0-9_-]{8}$"}),
    ] = None,
    state: Annotated[State | None, Query(description="Only datasets in this state.")] = None,
) -> DatasetList:
    """A page of datasets, newest first. Pages stay whole while datasets come and go."""
    before = None if cursor is None else read_cursor(cursor)
    jobs = await asyncio.to_thread(context.jobs.page, limit + 1, before=before, state=state)
    page = jobs[:limit]
    more = len(jobs) > limit
    return DatasetList(
        data=[dataset_of(job) for job in page], next_cursor=make_cursor(page[-1].sequence) if more else None
    )


@router.get("/{dataset_id}", summary="Show a dataset", responses=problems("not-found", "not-ready"))
async def get_dataset(dataset_id: str, context: ContextDep) -> Dataset:
    """State and progress."""
    return dataset_of(await find_job(context, dataset_id))


@router.delete(
    "/{dataset_id}",
    status_code=202,
    summary="Stop or delete a dataset",
    response_model=Dataset,
    responses={
        202: {"description": "It was at work and stops now; its files are removed"},
        204: {"description": "It had ended; its record and files are gone"},
        **problems("not-found", "not-ready"),
    },
)
async def delete_dataset(dataset_id: str, context: ContextDep) -> Dataset | Response:
    """Stop a dataset that is being made, or delete one that has ended."""
    await find_job(context, dataset_id)
    job = await asyncio.to_thread(context.jobs.cancel_or_delete, dataset_id)
    return Response(status_code=204) if job is None else dataset_of(job)


@router.get(
    "/{dataset_id}/events",
    summary="Watch a dataset",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-sent events: `progress` with the dataset as data, at last `succeeded`, `failed` or "
            "`cancelled`",
            "content": {"text/event-stream": {"schema": _EVENT}},
        },
        **problems("not-found", "not-ready", "too-many-requests"),
    },
)
async def watch_dataset(dataset_id: str, context: ContextDep) -> Response:
    """Progress as it happens, until the dataset has ended."""
    job = await find_job(context, dataset_id)
    context.limits.event_streams.acquire()
    return StreamingResponse(
        progress_events(context, job),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def make_cursor(sequence: int) -> str:
    """An opaque cursor that continues below `sequence`."""
    return base64.urlsafe_b64encode(sequence.to_bytes(6, "big")).decode("ascii")


def read_cursor(cursor: str) -> int:
    """The sequence number of a cursor of ours; ProblemError for any other text."""
    try:
        data = base64.b64decode(cursor.encode("ascii"), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if len(data) != 6:
        raise invalid_request([FieldError(field="cursor", message="use the next_cursor of an earlier page, unchanged")])
    return int.from_bytes(data, "big")
