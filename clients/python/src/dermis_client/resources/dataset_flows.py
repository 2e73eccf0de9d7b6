"""The requests of client.datasets as flows, which the synchronous and the asynchronous client run.

`_downloads.py` has the flows that download files; `_waiting.py` and `_events.py` the loops that follow a job.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic

import httpx

from dermis_client import _retry
from dermis_client._downloads import DownloadProgress, Plan, prepare
from dermis_client._events import MAX_SILENCE, EventDecoder, Message, emit_events, next_events, open_events
from dermis_client._flow import Emit, Flow, Request, call, close, now, parse, sleep
from dermis_client._requests import idempotency_header, job_path
from dermis_client._status import describe
from dermis_client._untrusted import MAX_LIST_BYTES, load_json, one_line, without_query
from dermis_client._waiting import STATUS_TIMEOUT, wait_until_finished
from dermis_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    DatasetCancelled,
    DatasetFailed,
    NotFoundError,
    WaitTimeoutError,
)
from dermis_client.models import DatasetFile
from dermis_client.report import DatasetReport
from dermis_client.resources.dataset_records import D, DatasetEvent

DELETE_TIMEOUT = 60.0  # seconds that delete() waits for a running dataset to stop
DELETE_PAUSE = 0.5  # seconds between its requests
MAX_EMPTY_PAGES = 10  # maximum number of consecutive pages of a list without an item


@dataclass(frozen=True)
class Api(Generic[D]):
    """The context of the flows.

    Attributes:
        parse_dataset: Converts JSON to a record that is bound to the client.
        max_retries: Further attempts after a failed request.
    """

    parse_dataset: Callable[[Any], D]
    max_retries: int


def create(api: Api[D], body: Mapping[str, Any], idempotency_key: str | None) -> Flow[D]:
    """POST /v1/datasets with an idempotency key, so that a repeated request does not create a second dataset."""
    headers = idempotency_header(idempotency_key)
    response = yield from call(Request("POST", "/v1/datasets", headers=headers, json=body), api.max_retries)
    return parse(response, api.parse_dataset)


def retrieve(api: Api[D], dataset_id: str) -> Flow[D]:
    """GET /v1/datasets/{id}."""
    response = yield from call(Request("GET", job_path("dataset", dataset_id)), api.max_retries)
    return parse(response, api.parse_dataset)


def list_files(api: Api[D], dataset_id: str) -> Flow[list[DatasetFile]]:
    """GET /v1/datasets/{id}/files."""
    request = Request("GET", job_path("dataset", dataset_id, "files"), max_bytes=MAX_LIST_BYTES)
    response = yield from call(request, api.max_retries)
    return parse(response, lambda page: [DatasetFile.model_validate(file) for file in _items(page)])


def report(api: Api[D], dataset_id: str) -> Flow[DatasetReport]:
    """GET /v1/datasets/{id}/report."""
    request = Request("GET", job_path("dataset", dataset_id, "report"), params={"format": "json"})
    response = yield from call(request, api.max_retries)
    return parse(response, DatasetReport.model_validate)


def list_datasets(api: Api[D], state: str | None, limit: int | None, page_size: int) -> Flow[None]:
    """GET /v1/datasets page by page; emit at most `limit` datasets, newest first."""
    cursor: str | None = None
    cursors: set[str] = set()
    empty_pages = 0  # number of consecutive empty pages
    remaining = math.inf if limit is None else limit
    while remaining > 0:
        params: dict[str, str | int] = {"limit": int(min(page_size, remaining))}
        params |= {"cursor": cursor} if cursor is not None else {}
        params |= {"state": state} if state is not None else {}
        response = yield from call(Request("GET", "/v1/datasets", params=params), api.max_retries)
        page, cursor = parse(response, partial(_page, api))
        for dataset in page[: int(min(len(page), remaining))]:
            yield Emit(dataset)
        remaining -= len(page)
        if cursor is None:
            return
        empty_pages = 0 if page else empty_pages + 1
        if cursor in cursors or empty_pages == MAX_EMPTY_PAGES:
            raise APIResponseError(f"the list of datasets at {without_query(response.url)} does not end")
        cursors.add(cursor)


def _items(page: Any) -> list[Any]:
    if not isinstance(page, dict) or not isinstance(page.get("data"), list):
        raise ValueError('no "data" list in it')
    items: list[Any] = page["data"]
    return items


def _page(api: Api[D], page: Any) -> tuple[list[D], str | None]:
    cursor = page.get("next_cursor") if isinstance(page, dict) else None
    if not (cursor is None or (isinstance(cursor, str) and cursor.isascii() and len(cursor) <= 1000)):
        raise ValueError('its "next_cursor" is not valid')
    return [api.parse_dataset(item) for item in _items(page)], cursor


def _event(api: Api[D], message: Message) -> DatasetEvent[D]:
    return DatasetEvent(message.event, api.parse_dataset(load_json(message.data)))


def events(api: Api[D], dataset_id: str) -> Flow[None]:
    """GET /v1/datasets/{id}/events; emit a DatasetEvent for each change until the dataset has finished."""
    path = job_path("dataset", dataset_id, "events")
    yield from emit_events(
        path, dataset_id, api.max_retries, parse=partial(_event, api), is_last=lambda event: event.dataset.finished
    )


def wait(
    api: Api[D],
    dataset_id: str,
    *,
    timeout: float | None,
    poll_interval: float,
    patience: float,
    report: Callable[[D], None],
) -> Flow[D]:
    """Wait until the dataset has finished; see `_waiting` for the arguments.

    Raises:
        DatasetFailed, DatasetCancelled, WaitTimeoutError, NotFoundError, APIConnectionError: See `Datasets.wait`.
    """
    request = Request("GET", job_path("dataset", dataset_id), read_timeout=STATUS_TIMEOUT)

    def poll() -> Flow[D]:
        return parse((yield from call(request, 0)), api.parse_dataset)

    def timeout_error(last: D | None) -> WaitTimeoutError:
        state = "?"
        if last is not None:
            done = last.progress
            state = f"is {one_line(last.state, 40)}, {done.samples_done} of {done.samples_total}"
        return WaitTimeoutError(
            f"{dataset_id} {state} after {timeout:g} s of waiting; it continues: wait for it again", last
        )

    dataset = yield from wait_until_finished(
        poll,
        timeout=timeout,
        poll_interval=poll_interval,
        patience=patience,
        report=report,
        timeout_error=timeout_error,
        follow=partial(_follow, api, dataset_id, report),
    )
    if dataset.state == "failed":
        reason = describe(dataset.error) if dataset.error else "the service stated no reason"
        raise DatasetFailed(f"{one_line(dataset.id)} failed: {reason}", dataset)
    if dataset.state == "cancelled":
        raise DatasetCancelled(f"{one_line(dataset.id)} was cancelled", dataset)
    return dataset


def _follow(api: Api[D], dataset_id: str, report: Callable[[D], None], deadline: float) -> Flow[D | None]:
    """Report the records of one event stream and return the last one; stop early when the deadline is near."""
    last: D | None = None
    try:
        stream, decoder = (yield from open_events(job_path("dataset", dataset_id, "events"), 0)), EventDecoder()
        while (arrived := (yield from next_events(stream, decoder, partial(_event, api)))) is not None:
            for event in arrived:
                last = event.dataset
                report(last)
            if (last is not None and last.finished) or deadline - (yield from now()) <= MAX_SILENCE:
                yield from close(stream)
                break
    except (httpx.RequestError, APIConnectionError, APIResponseError, APIStatusError):
        return last  # the next status request shows whether the failure persists
    return last


def cancel(api: Api[D], dataset_id: str) -> Flow[D]:
    """Stop a queued or running dataset. DELETE would remove a finished one, so the state is checked first."""
    attempt = 0
    while True:
        dataset = yield from retrieve(api, dataset_id)
        if dataset.finished or dataset.state == "cancelling":
            return dataset
        try:
            # Not repeated without a new check: a second DELETE after a lost response would delete the record.
            response = yield from call(Request("DELETE", job_path("dataset", dataset_id)), 0)
        except (APIConnectionError, APIStatusError) as error:
            status = error.status_code if isinstance(error, APIStatusError) else 503
            pause = _retry.delay(attempt, getattr(error, "retry_after", None))
            if pause is None or attempt >= api.max_retries or not _retry.after_status(status, idempotent=True):
                raise
            yield from sleep(pause)
            attempt += 1
        else:
            if response.status_code == 204:  # it finished before DELETE arrived and has been removed
                return dataset.model_copy(update={"state": "cancelled"})
            return parse(response, api.parse_dataset)


def delete(api: Api[D], dataset_id: str) -> Flow[None]:
    """Remove a dataset, its record and its files; a running one is stopped first."""
    dataset = yield from retrieve(api, dataset_id)  # raises NotFoundError if it does not exist
    began = yield from now()
    try:
        while True:
            if dataset.state != "cancelling":
                response = yield from call(Request("DELETE", job_path("dataset", dataset_id)), api.max_retries)
                if response.status_code == 204:
                    return
            if (yield from now()) - began > DELETE_TIMEOUT:
                raise WaitTimeoutError(
                    f"{dataset_id} is still {one_line(dataset.state, 40)}; delete it again later", dataset
                )
            yield from sleep(DELETE_PAUSE)
            dataset = yield from retrieve(api, dataset_id)
    except NotFoundError:  # one of the requests above removed it
        return


def plan_download(
    api: Api[D], dataset_id: str, folder: Path, overwrite: bool, report: Callable[[DownloadProgress], None]
) -> Flow[Plan]:
    """List the files of a dataset and prepare their download; see `_downloads.prepare`."""
    files = yield from list_files(api, dataset_id)
    plan = yield from prepare(
        dataset_id, files, folder, overwrite=overwrite, max_retries=api.max_retries, report=report
    )
    return plan
