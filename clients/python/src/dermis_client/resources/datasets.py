"""client.datasets: datasets, which the service generates in the background.

`_downloads.py` has the flows that download files; `_waiting.py` and `_events.py` the loops that follow a job.
"""

from __future__ import annotations

import asyncio
import math
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, SupportsIndex

import httpx

from dermis_client import _retry
from dermis_client._downloads import Download, DownloadProgress, Plan, fetch, prepare, worker_count
from dermis_client._events import MAX_SILENCE, EventDecoder, Message, emit_events, next_events, open_events
from dermis_client._flow import Emit, Flow, Request, call, close, now, parse, sleep
from dermis_client._progress import dataset_progress, download_progress
from dermis_client._requests import checked_key, edit_options, generation_body, job_path
from dermis_client._status import describe
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client._untrusted import MAX_LIST_BYTES, load_json, one_line
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
from dermis_client.folders import extract_images
from dermis_client.models import DatasetFile
from dermis_client.resources.dataset_records import AsyncDataset, D, Dataset, DatasetEvent

DELETE_TIMEOUT = 60.0  # seconds that delete() waits for a running dataset to stop
DELETE_PAUSE = 0.5  # seconds between its requests
MAX_EMPTY_PAGES = 10  # maximum number of consecutive pages of a list without an item
_FileList = list[DatasetFile]  # `list` is a method in the classes below


# Flows


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
    headers = {"Idempotency-Key": checked_key(idempotency_key or uuid.uuid4().hex)}
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
            raise APIResponseError(f"the list of datasets at {response.url.copy_with(query=None)} does not end")
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


class Datasets:
    """Datasets of a service: `client.datasets` of a DermisClient."""

    def __init__(self, transport: SyncTransport) -> None:
        self._transport = transport
        self._api = Api(partial(Dataset._bound, self), transport.settings.max_retries)

    def create(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        model: str | None = None,
        format: str | None = None,  # noqa: A002  the API's own name
        image_format: str | None = None,
        image_quality: SupportsIndex | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: str | None = None,
        shard_size: SupportsIndex | None = None,
        classifier: Mapping[str, Any] | None = None,
        edits: Sequence[Mapping[str, Any]] | Mapping[str, float] | None = None,
        privacy: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> Dataset:
        """Start a dataset, which the service generates in the background.

        An option that is None takes the service's default.

        Args:
            classes: Number of samples of each class, such as {"malignant": 500, "benign": 500}.
            seed: 0 to 2**63 - 1. The same request gives the same bytes.
            model: Name of the model.
            format: "imagefolder", "webdataset" or "parquet".
            image_format: "png", "jpeg" or "webp".
            image_quality: 1 to 100, for "jpeg" and "webp".
            truncation_psi: 0 to 2. Lower values give more typical and less varied images.
            truncation_cutoff: Number of layers that truncation applies to.
            noise_mode: "random" (each sample has its own noise, from seed and index), "const" (all have the same) or "none".
            shard_size: Samples in a shard.
            classifier: Options of the classifier's filter, such as {"keep": "agreeing", "tries": 8}.
            edits: Edits of every sample; see `Edits.create`.
            privacy: Options of the gate against copies of training images, such as {"gate": "authentic", "on_reject":
                "resample"}.
            idempotency_key: A request with the same key does not create a second dataset. By default a new key, which
                protects retries of this call; a key of your own does so across programs.
            extra_body: Further fields, for a newer service.

        Returns:
            The dataset, in state "queued".

        Raises:
            UnprocessableEntityError: A value is not valid; `errors` names the fields.
            TooLargeError: More samples than the service generates in one dataset.
            ConflictError: The key was used with another request.
            NotFoundError: The service has no such model.
            InvalidRequestError: An argument cannot be sent; nothing was sent.
            APIConnectionError: The service did not respond.
        """
        body = generation_body(
            classes,
            seed,
            extra_body,
            model=model,
            format=format,
            image_format=image_format,
            image_quality=image_quality,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            shard_size=shard_size,
            classifier=None if classifier is None else dict(classifier),
            edits=edit_options(edits),
            privacy=None if privacy is None else dict(privacy),
        )
        return self._transport.run(create(self._api, body, idempotency_key))

    def retrieve(self, dataset_id: str) -> Dataset:
        """Retrieve the current record of a dataset.

        Args:
            dataset_id: Id of the dataset.

        Returns:
            The record.

        Raises:
            NotFoundError: The service has no such dataset.
            InvalidRequestError: The id is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(retrieve(self._api, dataset_id))

    def list(self, *, state: str | None = None, limit: int | None = None, page_size: int = 100) -> Iterator[Dataset]:
        """Iterate over datasets, newest first. Pages are fetched as needed.

        Args:
            state: Only datasets in this state.
            limit: Maximum number of datasets.
            page_size: Datasets in one page.

        Returns:
            An iterator of datasets.

        Raises:
            UnprocessableEntityError: The state or the page size is not valid.
            APIConnectionError: The service did not respond.
        """
        return self._transport.iterate(list_datasets(self._api, state, limit, page_size))

    def files(self, dataset_id: str) -> _FileList:
        """List the files of a dataset.

        Args:
            dataset_id: Id of the dataset.

        Returns:
            The files, with sizes and hashes.

        Raises:
            ConflictError: The dataset has not succeeded.
            NotFoundError: The service has no such dataset.
        """
        return self._transport.run(list_files(self._api, dataset_id))

    def events(self, dataset_id: str) -> Iterator[DatasetEvent[Dataset]]:
        """Iterate over the changes of a dataset until it has finished. A broken stream is opened again.

        Args:
            dataset_id: Id of the dataset.

        Returns:
            An iterator of events. The last one has the final state.

        Raises:
            NotFoundError: The service has no such dataset.
            RateLimitError: Too many event streams are open.
            APIConnectionError: The stream breaks repeatedly.
        """
        return self._transport.iterate(events(self._api, dataset_id))

    def wait(
        self,
        dataset_id: str,
        *,
        progress: bool | Callable[[Dataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> Dataset:
        """Wait until a dataset has succeeded: by its events, or by status requests where events do not arrive.

        Args:
            dataset_id: Id of the dataset.
            progress: True for a progress bar on stderr, or a function that is called with every record.
            timeout: Seconds for the whole wait; None for no limit.
            poll_interval: Seconds between status requests.
            patience: Seconds without any response before giving up; a shorter restart of the service is tolerated.

        Returns:
            The record of the dataset, which has succeeded.

        Raises:
            DatasetFailed: The dataset failed.
            DatasetCancelled: The dataset was cancelled.
            WaitTimeoutError: The timeout expired; the dataset continues.
            NotFoundError: The service has no such dataset.
            APIConnectionError: No response within `patience`.
        """
        with dataset_progress(progress) as report:
            return self._transport.run(
                wait(
                    self._api,
                    dataset_id,
                    timeout=timeout,
                    poll_interval=poll_interval,
                    patience=patience,
                    report=report,
                )
            )

    def download(
        self,
        dataset_id: str,
        folder: str | os.PathLike[str],
        *,
        parallel: int = 4,
        overwrite: bool = False,
        extract: bool = False,
        progress: bool | Callable[[DownloadProgress], None] = False,
    ) -> Download:
        """Download all files of a succeeded dataset.

        Files that are present and intact are kept, and an interrupted download is resumed. A file gets its name only
        after its SHA-256 agrees with the service's list and with manifest.json.

        Args:
            dataset_id: Id of the dataset.
            folder: The target folder.
            parallel: Files to fetch at the same time, 1 to 32.
            overwrite: Whether files of another dataset in the folder may be replaced.
            extract: Whether to unpack images.zip to FOLDER/images.
            progress: True for a progress bar on stderr, or a function. It is called from several threads, one at a time.

        Returns:
            The folder and the files.

        Raises:
            DownloadError: A file cannot be fetched or written.
            IntegrityError: A file or the manifest is not what the service listed.
            ConflictError: The dataset has not succeeded.
            NotFoundError: The service has no such dataset.
            APIConnectionError: The service did not respond.
        """
        with download_progress(progress) as report:
            plan = self._transport.run(plan_download(self._api, dataset_id, Path(folder), overwrite, report))
            self._transport.run_all(
                [fetch(plan, file, self._api.max_retries) for file in plan.missing], worker_count(parallel)
            )
        if extract:
            extract_images(plan.folder)
        return plan.result()

    def cancel(self, dataset_id: str) -> Dataset:
        """Stop a queued or running dataset and remove its images. A finished dataset is not changed.

        Args:
            dataset_id: Id of the dataset.

        Returns:
            The record, in state "cancelling" or in a final state.

        Raises:
            NotFoundError: The service has no such dataset.
            APIConnectionError: The service did not respond.
        """
        return self._transport.run(cancel(self._api, dataset_id))

    def delete(self, dataset_id: str) -> None:
        """Delete a dataset with its files; a running one is stopped first.

        Args:
            dataset_id: Id of the dataset.

        Raises:
            NotFoundError: The service has no such dataset.
            WaitTimeoutError: The dataset does not stop.
            APIConnectionError: The service did not respond.
        """
        self._transport.run(delete(self._api, dataset_id))


class AsyncDatasets:
    """Datasets of a service: `client.datasets` of an AsyncDermisClient."""

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._api = Api(partial(AsyncDataset._bound, self), transport.settings.max_retries)

    async def create(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        model: str | None = None,
        format: str | None = None,  # noqa: A002  the API's own name
        image_format: str | None = None,
        image_quality: SupportsIndex | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: str | None = None,
        shard_size: SupportsIndex | None = None,
        classifier: Mapping[str, Any] | None = None,
        edits: Sequence[Mapping[str, Any]] | Mapping[str, float] | None = None,
        privacy: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> AsyncDataset:
        """Start a dataset; see `Datasets.create` for arguments and errors."""
        body = generation_body(
            classes,
            seed,
            extra_body,
            model=model,
            format=format,
            image_format=image_format,
            image_quality=image_quality,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            shard_size=shard_size,
            classifier=None if classifier is None else dict(classifier),
            edits=edit_options(edits),
            privacy=None if privacy is None else dict(privacy),
        )
        return await self._transport.run(create(self._api, body, idempotency_key))

    async def retrieve(self, dataset_id: str) -> AsyncDataset:
        """Retrieve the current record of a dataset; see `Datasets.retrieve`."""
        return await self._transport.run(retrieve(self._api, dataset_id))

    def list(
        self, *, state: str | None = None, limit: int | None = None, page_size: int = 100
    ) -> AsyncIterator[AsyncDataset]:
        """Iterate over datasets, newest first; see `Datasets.list`."""
        return self._transport.iterate(list_datasets(self._api, state, limit, page_size))

    async def files(self, dataset_id: str) -> _FileList:
        """List the files of a dataset; see `Datasets.files`."""
        return await self._transport.run(list_files(self._api, dataset_id))

    def events(self, dataset_id: str) -> AsyncIterator[DatasetEvent[AsyncDataset]]:
        """Iterate over the changes of a dataset until it has finished; see `Datasets.events`."""
        return self._transport.iterate(events(self._api, dataset_id))

    async def wait(
        self,
        dataset_id: str,
        *,
        progress: bool | Callable[[AsyncDataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> AsyncDataset:
        """Wait until a dataset has succeeded; see `Datasets.wait` for arguments and errors."""
        with dataset_progress(progress) as report:
            return await self._transport.run(
                wait(
                    self._api,
                    dataset_id,
                    timeout=timeout,
                    poll_interval=poll_interval,
                    patience=patience,
                    report=report,
                )
            )

    async def download(
        self,
        dataset_id: str,
        folder: str | os.PathLike[str],
        *,
        parallel: int = 4,
        overwrite: bool = False,
        extract: bool = False,
        progress: bool | Callable[[DownloadProgress], None] = False,
    ) -> Download:
        """Download all files of a succeeded dataset; see `Datasets.download` for arguments and errors.

        The `progress` function is called on the event loop.
        """
        with download_progress(progress) as report:
            plan = await self._transport.run(plan_download(self._api, dataset_id, Path(folder), overwrite, report))
            await self._transport.run_all(
                [fetch(plan, file, self._api.max_retries) for file in plan.missing], worker_count(parallel)
            )
        if extract:
            await asyncio.to_thread(extract_images, plan.folder)
        return plan.result()

    async def cancel(self, dataset_id: str) -> AsyncDataset:
        """Stop a queued or running dataset; see `Datasets.cancel`."""
        return await self._transport.run(cancel(self._api, dataset_id))

    async def delete(self, dataset_id: str) -> None:
        """Delete a dataset with its files; see `Datasets.delete`."""
        await self._transport.run(delete(self._api, dataset_id))
