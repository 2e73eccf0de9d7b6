"""The asynchronous client: _sync.py's twin, name for name; what both do is in the flows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex, cast

import httpx
from pydantic import PrivateAttr

from dermis_client import _classifications, _datasets, _downloads, _requests, _resources, _uploads
from dermis_client._async_latent import AsyncAuthenticity, AsyncEdits, AsyncProjections
from dermis_client._datasets import DatasetEvent
from dermis_client._downloads import Download, DownloadProgress
from dermis_client._flow import Api
from dermis_client._progress import count_progress, dataset_progress, download_progress
from dermis_client._transport import AsyncTransport, settings
from dermis_client._uploads import Source
from dermis_client.errors import InvalidRequestError
from dermis_client.folders import extract_images
from dermis_client.images import ImagesResult
from dermis_client.models import ClassificationsResult, DatasetFile, DatasetRecord, Model

_Files = list[DatasetFile]  # inside the classes below, `list` is a method
_Models = list[Model]


class AsyncDataset(DatasetRecord):
    """A dataset at one moment, with what can be done with it. It does not change: every action returns a new record."""

    _client: Any = PrivateAttr(default=None)

    @property
    def _datasets(self) -> AsyncDatasets:
        if self._client is None:
            raise InvalidRequestError("this dataset came from no client; use client.datasets.retrieve(id)")
        return cast(AsyncDermisClient, self._client).datasets

    async def refresh(self) -> AsyncDataset:
        """The dataset as it is now."""
        return await self._datasets.retrieve(self.id)

    async def wait(
        self,
        *,
        progress: bool | Callable[[AsyncDataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> AsyncDataset:
        """Return when it has finished; see Datasets.wait()."""
        return await self._datasets.wait(
            self.id, progress=progress, timeout=timeout, poll_interval=poll_interval, patience=patience
        )

    async def download(
        self,
        folder: str | os.PathLike[str],
        *,
        parallel: int = 4,
        overwrite: bool = False,
        extract: bool = False,
        progress: bool | Callable[[DownloadProgress], None] = False,
    ) -> Download:
        """Fetch all its files into a folder; see Datasets.download()."""
        return await self._datasets.download(
            self.id, folder, parallel=parallel, overwrite=overwrite, extract=extract, progress=progress
        )

    async def files(self) -> list[DatasetFile]:
        """Its files; ConflictError until it has succeeded."""
        return await self._datasets.files(self.id)

    def events(self) -> AsyncIterator[DatasetEvent[AsyncDataset]]:
        """Its changes as they happen; see Datasets.events()."""
        return self._datasets.events(self.id)

    async def cancel(self) -> AsyncDataset:
        """Stop it if it has not finished; see Datasets.cancel()."""
        return await self._datasets.cancel(self.id)

    async def delete(self) -> None:
        """Remove it and its files from the service; see Datasets.delete()."""
        await self._datasets.delete(self.id)


class AsyncDatasets:
    """client.datasets"""

    def __init__(self, client: AsyncDermisClient) -> None:
        self._transport, self._api = client._transport, client._api

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
        """Ask for a dataset, to be made in the background; options and errors are those of Datasets.create()."""
        body = _requests.body(
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
            edits=_requests.edit_options(edits),
            privacy=None if privacy is None else dict(privacy),
        )
        return await self._transport.run(_datasets.create(self._api, body, idempotency_key))

    async def retrieve(self, dataset_id: str) -> AsyncDataset:
        """The dataset as it is now. Raises NotFoundError."""
        return await self._transport.run(_datasets.retrieve(self._api, dataset_id))

    def list(
        self, *, state: str | None = None, limit: int | None = None, page_size: int = 100
    ) -> AsyncIterator[AsyncDataset]:
        """Datasets, newest first, pages fetched as they are needed. limit: at most so many; state: only those."""
        return self._transport.iterate(_datasets.list_all(self._api, state, limit, page_size))

    async def files(self, dataset_id: str) -> _Files:
        """The files of a dataset. Raises ConflictError until it has succeeded."""
        return await self._transport.run(_datasets.files(self._api, dataset_id))

    def events(self, dataset_id: str) -> AsyncIterator[DatasetEvent[AsyncDataset]]:
        """Its changes as they happen, until it has finished; a broken stream is opened again."""
        return self._transport.iterate(_datasets.events(self._api, dataset_id))

    async def wait(
        self,
        dataset_id: str,
        *,
        progress: bool | Callable[[AsyncDataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> AsyncDataset:
        """Return when a dataset has finished; options and errors are those of Datasets.wait()."""
        with dataset_progress(progress) as report:
            return await self._transport.run(
                _datasets.wait(
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
        """Fetch all files of a succeeded dataset; options and errors are those of Datasets.download().

        The `progress` function is called on the event loop.
        """
        with download_progress(progress) as report:
            plan = await self._transport.run(_downloads.prepare(self._api, dataset_id, Path(folder), overwrite, report))
            await self._transport.run_all(
                [_downloads.fetch(self._api, plan, file) for file in plan.missing], _requests.workers(parallel)
            )
        if extract:
            await asyncio.to_thread(extract_images, plan.folder)
        return plan.result()

    async def cancel(self, dataset_id: str) -> AsyncDataset:
        """Stop a queued or running dataset; what it has made so far is removed. A finished one is left as it is."""
        return await self._transport.run(_datasets.cancel(self._api, dataset_id))

    async def delete(self, dataset_id: str) -> None:
        """Remove a dataset and its files from the service; a running one is stopped first. Raises NotFoundError."""
        await self._transport.run(_datasets.delete(self._api, dataset_id))


class AsyncImages:
    """client.images"""

    def __init__(self, client: AsyncDermisClient) -> None:
        self._transport, self._api = client._transport, client._api

    async def generate(
        self,
        classes: Mapping[str, SupportsIndex],
        *,
        seed: SupportsIndex = 0,
        start_index: SupportsIndex | None = None,
        model: str | None = None,
        truncation_psi: float | None = None,
        truncation_cutoff: SupportsIndex | None = None,
        noise_mode: str | None = None,
        image_format: str | None = None,
        image_quality: SupportsIndex | None = None,
        edits: Sequence[Mapping[str, Any]] | Mapping[str, float] | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> ImagesResult:
        """A few images now; options and errors are those of Images.generate()."""
        body = _requests.body(
            classes,
            seed,
            extra_body,
            start_index=start_index,
            model=model,
            truncation_psi=truncation_psi,
            truncation_cutoff=truncation_cutoff,
            noise_mode=noise_mode,
            image_format=image_format,
            image_quality=image_quality,
            edits=_requests.edit_options(edits),
        )
        return await self._transport.run(_resources.generate_images(self._api, body))


class AsyncClassifications:
    """client.classifications"""

    def __init__(self, client: AsyncDermisClient) -> None:
        self._transport, self._api = client._transport, client._api

    async def create(
        self,
        files: Source | Sequence[Source],
        *,
        model: str | None = None,
        threshold: str | float | None = None,
        heat_map: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> ClassificationsResult:
        """What the service's classifier says of images; options and errors are those of the blocking client."""
        sources, params = _uploads.sources_of(files), _requests.classification(model, threshold, heat_map)
        with count_progress(progress, "classifying") as report:
            return await self._transport.run(_classifications.classify(self._api, sources, params, report))


class AsyncModels:
    """client.models"""

    def __init__(self, client: AsyncDermisClient) -> None:
        self._transport, self._api = client._transport, client._api

    async def list(self) -> _Models:
        """The models that the service offers."""
        return await self._transport.run(_resources.list_models(self._api))

    async def retrieve(self, name: str) -> Model:
        """One model, with its card. Raises NotFoundError."""
        return await self._transport.run(_resources.retrieve_model(self._api, name))


class AsyncDermisClient:
    """A connection to a dermis service, for asyncio; the arguments are those of DermisClient.

    async with AsyncDermisClient("http://127.0.0.1:3000") as client:
        dataset = await client.datasets.create(classes={"malignant": 500, "benign": 500}, seed=7)
        await dataset.wait(progress=True)
        await dataset.download("lesions")
    """

    datasets: AsyncDatasets
    images: AsyncImages
    classifications: AsyncClassifications
    authenticity: AsyncAuthenticity
    edits: AsyncEdits
    projections: AsyncProjections
    models: AsyncModels

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 3,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        self._transport = AsyncTransport(settings(base_url, api_key, timeout, max_retries), http_client)
        self._api = Api(self._dataset, max_retries)
        self.datasets, self.images, self.models = AsyncDatasets(self), AsyncImages(self), AsyncModels(self)
        self.classifications, self.authenticity = (
            AsyncClassifications(self),
            AsyncAuthenticity(self._transport, self._api),
        )
        self.edits, self.projections = (
            AsyncEdits(self._transport, self._api),
            AsyncProjections(self._transport, self._api),
        )

    @property
    def base_url(self) -> str:
        return self._transport.settings.base_url

    def _dataset(self, answer: Any) -> AsyncDataset:
        dataset = AsyncDataset.model_validate(answer)
        dataset._client = self
        return dataset

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncDermisClient({self._transport.settings!r})"
