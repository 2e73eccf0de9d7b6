"""client.datasets: datasets, which the service generates in the background. `dataset_flows.py` has its requests."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, SupportsIndex

from dermis_client._downloads import Download, DownloadProgress, fetch, worker_count
from dermis_client._progress import dataset_progress, download_progress
from dermis_client._raw import async_raw, raw
from dermis_client._requests import generation_body
from dermis_client._transport import AsyncTransport, SyncTransport
from dermis_client.folders import extract_images
from dermis_client.models import DatasetFile, DatasetFormat, DatasetState, ImageFormat, NoiseMode
from dermis_client.params import ClassifierParams, EditParams, PrivacyParams, ProvenanceParams
from dermis_client.report import DatasetReport
from dermis_client.resources import dataset_flows as flows
from dermis_client.resources.dataset_records import AsyncDataset, Dataset, DatasetEvent

_FileList = list[DatasetFile]  # `list` is a method in the classes below


class RawDatasets:
    """The methods of `Datasets` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: Datasets) -> None:
        self.create = raw(resource.create)
        self.retrieve = raw(resource.retrieve)
        self.files = raw(resource.files)
        self.report = raw(resource.report)
        self.cancel = raw(resource.cancel)
        self.delete = raw(resource.delete)


class Datasets:
    """Datasets of a service: `client.datasets` of a DermisClient."""

    with_raw_response = cached_property(RawDatasets)

    def __init__(self, transport: SyncTransport) -> None:
        self._transport = transport
        self._api = flows.Api(partial(Dataset._bound, self), transport.settings.max_retries)

    def create(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        model: str | None = None,
        format: DatasetFormat | None = None,  # noqa: A002  the API's own name
        image_format: ImageFormat | None = None,
        image_quality: SupportsIndex | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: NoiseMode | None = None,
        shard_size: SupportsIndex | None = None,
        classifier: ClassifierParams | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        privacy: PrivacyParams | None = None,
        provenance: ProvenanceParams | None = None,
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
            provenance: {"c2pa": True} for images with a signed manifest, False for images without one.
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
            classifier=classifier,
            edits=edits,
            privacy=privacy,
            provenance=provenance,
        )
        return self._transport.run(flows.create(self._api, body, idempotency_key))

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
        return self._transport.run(flows.retrieve(self._api, dataset_id))

    def list(
        self, *, state: DatasetState | None = None, limit: int | None = None, page_size: int = 100
    ) -> Iterator[Dataset]:
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
        return self._transport.iterate(flows.list_datasets(self._api, state, limit, page_size))

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
        return self._transport.run(flows.list_files(self._api, dataset_id))

    def report(self, dataset_id: str) -> DatasetReport:
        """Retrieve the report of a dataset: fidelity, variety, privacy, artefacts, skin tones, and the scorecard.

        Args:
            dataset_id: Id of the dataset.

        Returns:
            The report. A number that was not measured is None.

        Raises:
            ConflictError: The dataset has not succeeded.
            NotFoundError: The service has no such dataset, or an earlier version made it without a report.
        """
        return self._transport.run(flows.report(self._api, dataset_id))

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
        return self._transport.iterate(flows.events(self._api, dataset_id))

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
                flows.wait(
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
            plan = self._transport.run(flows.plan_download(self._api, dataset_id, Path(folder), overwrite, report))
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
        return self._transport.run(flows.cancel(self._api, dataset_id))

    def delete(self, dataset_id: str) -> None:
        """Delete a dataset with its files; a running one is stopped first.

        Args:
            dataset_id: Id of the dataset.

        Raises:
            NotFoundError: The service has no such dataset.
            WaitTimeoutError: The dataset does not stop.
            APIConnectionError: The service did not respond.
        """
        self._transport.run(flows.delete(self._api, dataset_id))


class AsyncRawDatasets:
    """The methods of `AsyncDatasets` with the responses of the service; see `RawResponse`."""

    def __init__(self, resource: AsyncDatasets) -> None:
        self.create = async_raw(resource.create)
        self.retrieve = async_raw(resource.retrieve)
        self.files = async_raw(resource.files)
        self.report = async_raw(resource.report)
        self.cancel = async_raw(resource.cancel)
        self.delete = async_raw(resource.delete)


class AsyncDatasets:
    """Datasets of a service: `client.datasets` of an AsyncDermisClient."""

    with_raw_response = cached_property(AsyncRawDatasets)

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._api = flows.Api(partial(AsyncDataset._bound, self), transport.settings.max_retries)

    async def create(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        model: str | None = None,
        format: DatasetFormat | None = None,  # noqa: A002  the API's own name
        image_format: ImageFormat | None = None,
        image_quality: SupportsIndex | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: NoiseMode | None = None,
        shard_size: SupportsIndex | None = None,
        classifier: ClassifierParams | None = None,
        edits: Sequence[EditParams] | Mapping[str, float] | None = None,
        privacy: PrivacyParams | None = None,
        provenance: ProvenanceParams | None = None,
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
            classifier=classifier,
            edits=edits,
            privacy=privacy,
            provenance=provenance,
        )
        return await self._transport.run(flows.create(self._api, body, idempotency_key))

    async def retrieve(self, dataset_id: str) -> AsyncDataset:
        """Retrieve the current record of a dataset; see `Datasets.retrieve`."""
        return await self._transport.run(flows.retrieve(self._api, dataset_id))

    def list(
        self, *, state: DatasetState | None = None, limit: int | None = None, page_size: int = 100
    ) -> AsyncIterator[AsyncDataset]:
        """Iterate over datasets, newest first; see `Datasets.list`."""
        return self._transport.iterate(flows.list_datasets(self._api, state, limit, page_size))

    async def files(self, dataset_id: str) -> _FileList:
        """List the files of a dataset; see `Datasets.files`."""
        return await self._transport.run(flows.list_files(self._api, dataset_id))

    async def report(self, dataset_id: str) -> DatasetReport:
        """Retrieve the report of a dataset; see `Datasets.report`."""
        return await self._transport.run(flows.report(self._api, dataset_id))

    def events(self, dataset_id: str) -> AsyncIterator[DatasetEvent[AsyncDataset]]:
        """Iterate over the changes of a dataset until it has finished; see `Datasets.events`."""
        return self._transport.iterate(flows.events(self._api, dataset_id))

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
                flows.wait(
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
            plan = await self._transport.run(
                flows.plan_download(self._api, dataset_id, Path(folder), overwrite, report)
            )
            await self._transport.run_all(
                [fetch(plan, file, self._api.max_retries) for file in plan.missing], worker_count(parallel)
            )
        if extract:
            await asyncio.to_thread(extract_images, plan.folder)
        return plan.result()

    async def cancel(self, dataset_id: str) -> AsyncDataset:
        """Stop a queued or running dataset; see `Datasets.cancel`."""
        return await self._transport.run(flows.cancel(self._api, dataset_id))

    async def delete(self, dataset_id: str) -> None:
        """Delete a dataset with its files; see `Datasets.delete`."""
        await self._transport.run(flows.delete(self._api, dataset_id))
