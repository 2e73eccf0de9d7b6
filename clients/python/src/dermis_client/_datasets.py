"""Dataset operations as flows: create, list, events, wait, cancel, delete."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import httpx

from dermis_client import _requests, _retry, _sse
from dermis_client._flow import (
    Api,
    D,
    Emit,
    Flow,
    Request,
    Stream,
    call,
    close,
    connection_error,
    now,
    open_stream,
    parse,
    read,
    sleep,
)
from dermis_client._foreign import MOST_LIST_BYTES, load_json, one_line
from dermis_client._status import describe
from dermis_client.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    DatasetCancelled,
    DatasetFailed,
    NotFoundError,
    RateLimitError,
    ServerError,
    WaitTimeoutError,
)
from dermis_client.models import DatasetFile

EVENT_SILENCE = 45.0  # seconds without a byte on an event stream (a heartbeat comes every 15) before it counts as dead
QUICK_ANSWER = 30.0  # seconds that a status request may take
DELETE_PATIENCE = 60.0  # seconds that delete() waits for a running dataset to stop
MOST_EMPTY_PAGES = 10  # of a list, in a row
DELETE_PAUSE = 0.5  # seconds between its questions


@dataclass(frozen=True)
class DatasetEvent(Generic[D]):
    """One event of a dataset. event: "progress", or the final state's name; dataset: the record at that moment."""

    event: str
    dataset: D


def create(api: Api[D], body: Mapping[str, Any], idempotency_key: str | None) -> Flow[D]:
    request = _requests.create_dataset(body, idempotency_key)
    response = yield from call(request, api.max_retries)
    return parse(response, api.parse_dataset)


def retrieve(api: Api[D], dataset_id: str) -> Flow[D]:
    response = yield from call(Request("GET", _requests.dataset_path(dataset_id)), api.max_retries)
    return parse(response, api.parse_dataset)


def files(api: Api[D], dataset_id: str) -> Flow[list[DatasetFile]]:
    response = yield from call(
        Request("GET", _requests.dataset_path(dataset_id, "files"), most=MOST_LIST_BYTES), api.max_retries
    )
    return parse(response, lambda answer: [DatasetFile.model_validate(file) for file in _data(answer)])


def list_all(api: Api[D], state: str | None, limit: int | None, page_size: int) -> Flow[None]:
    """Emit datasets, newest first, page after page, at most `limit` of them."""
    cursor: str | None = None
    cursors: set[str] = set()
    empty = 0  # pages in a row
    left = math.inf if limit is None else limit
    while left > 0:
        params: dict[str, str | int] = {"limit": int(min(page_size, left))}
        params |= {"cursor": cursor} if cursor is not None else {}
        params |= {"state": state} if state is not None else {}
        response = yield from call(Request("GET", "/v1/datasets", params=params), api.max_retries)
        page, following = parse(response, partial(_page, api))
        for dataset in page[: int(min(len(page), left))]:
            yield Emit(dataset)
        left -= len(page)
        if following is None:
            return
        empty = 0 if page else empty + 1
        if following in cursors or empty == MOST_EMPTY_PAGES:
            raise APIResponseError(f"the list of datasets at {response.url.copy_with(query=None)} does not end")
        cursors.add(following)
        cursor = following


def _data(answer: Any) -> list[Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
        raise ValueError('no "data" list in it')
    data: list[Any] = answer["data"]
    return data


def _page(api: Api[D], answer: Any) -> tuple[list[D], str | None]:
    following = answer.get("next_cursor") if isinstance(answer, dict) else None
    if not (following is None or (isinstance(following, str) and following.isascii() and len(following) <= 1000)):
        raise ValueError('its "next_cursor" is not one')
    return [api.parse_dataset(item) for item in _data(answer)], following


def _open_events(dataset_id: str, max_retries: int) -> Flow[Stream]:
    request = Request(
        "GET",
        _requests.dataset_path(dataset_id, "events"),
        headers={"Accept": "text/event-stream", "Cache-Control": "no-store"},
        read_timeout=EVENT_SILENCE,
    )
    stream = yield from open_stream(request, max_retries)
    media_type = stream.response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "text/event-stream":
        yield from close(stream)
        raise APIResponseError(f"{stream.response.url} gave {media_type or 'no media type'}, not an event stream")
    return stream


def _next_events(api: Api[D], stream: Stream, decoder: _sse.Decoder) -> Flow[list[DatasetEvent[D]] | None]:
    """The events in the next piece of the stream, often none; None at its end."""
    piece = yield from read(stream)
    if not piece:
        return None
    try:
        return [DatasetEvent(m.event, api.parse_dataset(load_json(m.data))) for m in decoder.feed(piece)]
    except ValueError as error:
        raise APIResponseError(
            f"{stream.response.url} sent an event that this client does not understand ({one_line(str(error))})"
        ) from error


def events(api: Api[D], dataset_id: str) -> Flow[None]:
    """Emit a DatasetEvent for each change until the dataset has finished, connecting again whenever the stream ends."""
    barren = 0  # connections in a row that brought no event
    while True:
        failure: Exception = APIConnectionError(f"the event stream of {dataset_id} keeps closing early")
        try:
            stream, decoder = (yield from _open_events(dataset_id, api.max_retries)), _sse.Decoder()
            while (arrived := (yield from _next_events(api, stream, decoder))) is not None:
                for event in arrived:
                    yield Emit(event)
                    barren = -1
                    if event.dataset.finished:
                        yield from close(stream)
                        return
        except httpx.RequestError as error:
            failure = connection_error(error, f"events of {dataset_id}")
        barren += 1
        if barren > api.max_retries:
            raise failure
        yield from sleep(_retry.delay(barren) or 0.0)


def wait(
    api: Api[D],
    dataset_id: str,
    *,
    timeout: float | None,
    poll_interval: float,
    patience: float,
    report: Callable[[D], None],
) -> Flow[D]:
    """Until the dataset has finished: by its events, by asking again and again where those do not come.

    timeout: seconds for the whole wait, None for no limit. poll_interval: seconds between questions. patience: seconds
    without any answer before giving up, so that a restart of the service in the middle does no harm. report is called
    with every record. Raises DatasetFailed, DatasetCancelled, WaitTimeoutError, NotFoundError, APIConnectionError.
    """
    heard = yield from now()
    deadline = math.inf if timeout is None else heard + timeout
    barren = 0  # event streams in a row that told nothing
    last: D | None = None
    quick = Request("GET", _requests.dataset_path(dataset_id), read_timeout=QUICK_ANSWER)
    while True:
        try:
            # No retries here: this loop is the retry, under the caller's own patience.
            last = parse((yield from call(quick, 0)), api.parse_dataset)
        except (APIConnectionError, ServerError, RateLimitError) as error:
            if (yield from now()) - heard > patience:
                raise
            pause = max(poll_interval, min(getattr(error, "retry_after", None) or 0.0, patience))
        else:
            heard, pause = (yield from now()), poll_interval
            report(last)
            # An event stream can be silent for EVENT_SILENCE: close to the deadline, asking is more exact.
            if not last.finished and barren < 2 and deadline - heard > EVENT_SILENCE:
                told = yield from _follow(api, dataset_id, deadline, report)
                barren = 0 if told else barren + 1
                last, heard = told or last, ((yield from now()) if told else heard)
            if last.finished:
                return _settled(last)
        left = deadline - (yield from now())
        if left <= 0:
            state = (
                f"is {one_line(last.state, 40)}, {last.progress.samples_done} of {last.progress.samples_total}"
                if last
                else "?"
            )
            raise WaitTimeoutError(
                f"{dataset_id} {state} after {timeout:g} s of waiting; it goes on: wait for it again", last
            )
        yield from sleep(min(pause, left))


def _follow(api: Api[D], dataset_id: str, deadline: float, report: Callable[[D], None]) -> Flow[D | None]:
    """The last record that one event stream told, None if it told nothing; ends early where the deadline comes near."""
    last: D | None = None
    try:
        stream, decoder = (yield from _open_events(dataset_id, 0)), _sse.Decoder()
        while (arrived := (yield from _next_events(api, stream, decoder))) is not None:
            for event in arrived:
                last = event.dataset
                report(last)
            if (last is not None and last.finished) or deadline - (yield from now()) <= EVENT_SILENCE:
                yield from close(stream)
                break
    except (httpx.RequestError, APIConnectionError, APIResponseError, APIStatusError):
        return last  # whatever it is, the next question to the service will tell
    return last


def _settled(dataset: D) -> D:
    if dataset.state == "failed":
        reason = describe(dataset.error) if dataset.error else "the service gave no reason"
        raise DatasetFailed(f"{one_line(dataset.id)} failed: {reason}", dataset)
    if dataset.state == "cancelled":
        raise DatasetCancelled(f"{one_line(dataset.id)} was cancelled", dataset)
    return dataset


def cancel(api: Api[D], dataset_id: str) -> Flow[D]:
    """Stop a queued or running dataset; a finished one is left as it is (DELETE would remove it, so look first)."""
    attempt = 0
    while True:
        dataset = yield from retrieve(api, dataset_id)
        if dataset.finished or dataset.state == "cancelling":
            return dataset
        try:
            # Never sent again blindly: a second DELETE after a lost answer would delete the record.
            response = yield from call(Request("DELETE", _requests.dataset_path(dataset_id)), 0)
        except (APIConnectionError, APIStatusError) as error:
            status = error.status_code if isinstance(error, APIStatusError) else 503
            pause = _retry.delay(attempt, getattr(error, "retry_after", None))
            if pause is None or attempt >= api.max_retries or not _retry.after_status(status, idempotent=True):
                raise
            yield from sleep(pause)
            attempt += 1
        else:
            if response.status_code == 204:  # it finished in between and is gone now
                return dataset.model_copy(update={"state": "cancelled"})
            return parse(response, api.parse_dataset)


def delete(api: Api[D], dataset_id: str) -> Flow[None]:
    """Remove a dataset, its record and its files; a running one is stopped first."""
    dataset = yield from retrieve(api, dataset_id)  # NotFoundError here: there was none
    began = yield from now()
    try:
        while True:
            if dataset.state != "cancelling":
                response = yield from call(Request("DELETE", _requests.dataset_path(dataset_id)), api.max_retries)
                if response.status_code == 204:
                    return
            if (yield from now()) - began > DELETE_PATIENCE:
                raise WaitTimeoutError(
                    f"{dataset_id} is still {one_line(dataset.state, 40)}; delete it again in a while", dataset
                )
            yield from sleep(DELETE_PAUSE)
            dataset = yield from retrieve(api, dataset_id)
    except NotFoundError:  # gone, whichever of our requests did it
        return
