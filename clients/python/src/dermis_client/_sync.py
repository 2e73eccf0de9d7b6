"""The blocking client. Its twin is _async.py; what both do is in the flows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex, cast

import httpx
from pydantic import PrivateAttr

from dermis_client import _classifications, _datasets, _downloads, _requests, _resources, _uploads
from dermis_client._datasets import DatasetEvent
from dermis_client._downloads import Download, DownloadProgress
from dermis_client._flow import Api
from dermis_client._progress import count_progress, dataset_progress, download_progress
from dermis_client._sync_latent import Authenticity, Edits, Projections
from dermis_client._transport import SyncTransport, settings
from dermis_client._uploads import Source
from dermis_client.errors import InvalidRequestError
from dermis_client.folders import extract_images
from dermis_client.images import ImagesResult
from dermis_client.models import ClassificationsResult, DatasetFile, DatasetRecord, Model

_Files = list[DatasetFile]  # inside the classes below, `list` is a method
_Models = list[Model]


class Dataset(DatasetRecord):
    """A dataset at one moment, with what can be done with it. It does not change: every action returns a new record."""

    _client: Any = PrivateAttr(default=None)

    @property
    def _datasets(self) -> Datasets:
        if self._client is None:
            raise InvalidRequestError("this dataset came from no client; use client.datasets.retrieve(id)")
        return cast(DermisClient, self._client).datasets

    def refresh(self) -> Dataset:
        """The dataset as it is now."""
        return self._datasets.retrieve(self.id)

    def wait(
        self,
        *,
        progress: bool | Callable[[Dataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> Dataset:
        """Block until it has finished; see Datasets.wait()."""
        return self._datasets.wait(
            self.id, progress=progress, timeout=timeout, poll_interval=poll_interval, patience=patience
        )

    def download(
        self,
        folder: str | os.PathLike[str],
        *,
        parallel: int = 4,
        overwrite: bool = False,
        extract: bool = False,
        progress: bool | Callable[[DownloadProgress], None] = False,
    ) -> Download:
        """Fetch all its files into a folder; see Datasets.download()."""
        return self._datasets.download(
            self.id, folder, parallel=parallel, overwrite=overwrite, extract=extract, progress=progress
        )

    def files(self) -> list[DatasetFile]:
        """Its files; ConflictError until it has succeeded."""
        return self._datasets.files(self.id)

    def events(self) -> Iterator[DatasetEvent[Dataset]]:
        """Its changes as they happen; see Datasets.events()."""
        return self._datasets.events(self.id)

    def cancel(self) -> Dataset:
        """Stop it if it has not finished; see Datasets.cancel()."""
        return self._datasets.cancel(self.id)

    def delete(self) -> None:
        """Remove it and its files from the service; see Datasets.delete()."""
        self._datasets.delete(self.id)


class Datasets:
    """client.datasets"""

    def __init__(self, client: DermisClient) -> None:
        self._transport, self._api = client._transport, client._api

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
        """Ask for a dataset; it is made in the background, so the answer comes at once, with state "queued".

        classes: how many samples of each class, such as {"malignant": 500, "benign": 500}. seed: 0..2**63-1; the same
        request gives the same bytes. format: "imagefolder", "webdataset" or "parquet". image_format: "png", "jpeg" or
        "webp"; image_quality 1..100 for the last two. truncation_psi: 0..2, lower is more typical and less varied;
        truncation_cutoff: in how many layers it holds. noise_mode: "random" (each sample has its own noise, from seed and
        index), "const" (all have the same) or "none". shard_size: samples a shard. classifier: what the model's
        classifier does, such as {"keep": "agreeing", "tries": 8}. edits: as for edits.create(). privacy: a gate against
        copies of training images, such as {"gate": "authentic", "on_reject": "resample"}. What is left out takes the
        service's default. idempotency_key: a new one by default, so that a request repeated after a lost answer makes no
        second dataset; give your own to hold that across programs. extra_body: further fields of a newer service.

        Raises UnprocessableEntityError (`.errors` names the fields), TooLargeError, ConflictError, NotFoundError (the
        model), InvalidRequestError (nothing was sent), APIConnectionError.
        """
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
        return self._transport.run(_datasets.create(self._api, body, idempotency_key))

    def retrieve(self, dataset_id: str) -> Dataset:
        """The dataset as it is now. Raises NotFoundError."""
        return self._transport.run(_datasets.retrieve(self._api, dataset_id))

    def list(self, *, state: str | None = None, limit: int | None = None, page_size: int = 100) -> Iterator[Dataset]:
        """Datasets, newest first, pages fetched as they are needed. limit: at most so many; state: only those."""
        return self._transport.iterate(_datasets.list_all(self._api, state, limit, page_size))

    def files(self, dataset_id: str) -> _Files:
        """The files of a dataset. Raises ConflictError until it has succeeded."""
        return self._transport.run(_datasets.files(self._api, dataset_id))

    def events(self, dataset_id: str) -> Iterator[DatasetEvent[Dataset]]:
        """Its changes as they happen, until it has finished; a broken stream is opened again."""
        return self._transport.iterate(_datasets.events(self._api, dataset_id))

    def wait(
        self,
        dataset_id: str,
        *,
        progress: bool | Callable[[Dataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> Dataset:
        """Block until a dataset has finished and return it, succeeded.

        Listens to its events and, where those do not come through, asks every `poll_interval` seconds. progress: True
        for a bar on stderr, or a function called with every new record. timeout: seconds for the whole wait. patience:
        seconds without any answer from the service before giving up; shorter silences (a restart) are sat out.

        Raises DatasetFailed, DatasetCancelled, WaitTimeoutError (it goes on), NotFoundError, APIConnectionError.
        """
        with dataset_progress(progress) as report:
            return self._transport.run(
                _datasets.wait(
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
        """Fetch all files of a succeeded dataset into a folder, `parallel` at a time.

        Files that are there already and intact stay; an interrupted download goes on where it ended. Every file is
        compared with the SHA-256 that the service and manifest.json name, and gets its own name only then. A file that
        is there and is not this dataset's is replaced only with `overwrite`. extract: also unpack images.zip into
        FOLDER/images. progress: True for a bar on stderr, or a function (called from several threads, one at a time).

        Raises DownloadError, IntegrityError, ConflictError (not finished), NotFoundError, APIConnectionError.
        """
        with download_progress(progress) as report:
            plan = self._transport.run(_downloads.prepare(self._api, dataset_id, Path(folder), overwrite, report))
            self._transport.run_all(
                [_downloads.fetch(self._api, plan, file) for file in plan.missing], _requests.workers(parallel)
            )
        if extract:
            extract_images(plan.folder)
        return plan.result()

    def cancel(self, dataset_id: str) -> Dataset:
        """Stop a queued or running dataset; what it has made so far is removed. A finished one is left as it is."""
        return self._transport.run(_datasets.cancel(self._api, dataset_id))

    def delete(self, dataset_id: str) -> None:
        """Remove a dataset and its files from the service; a running one is stopped first. Raises NotFoundError."""
        self._transport.run(_datasets.delete(self._api, dataset_id))


class Images:
    """client.images"""

    def __init__(self, client: DermisClient) -> None:
        self._transport, self._api = client._transport, client._api

    def generate(
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
        """A few images now, class by class. Image i has the latent and the noise of (seed, start_index + i).

        The options are those of datasets.create(). Raises UnprocessableEntityError, TooLargeError (more than the
        service gives in one call), NotFoundError (the model), IntegrityError, APIConnectionError.
        """
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
        return self._transport.run(_resources.generate_images(self._api, body))


class Classifications:
    """client.classifications"""

    def __init__(self, client: DermisClient) -> None:
        self._transport, self._api = client._transport, client._api

    def create(
        self,
        files: Source | Sequence[Source],
        *,
        model: str | None = None,
        threshold: str | float | None = None,
        heat_map: str | None = None,
        progress: bool | Callable[[int, int], None] = False,
    ) -> ClassificationsResult:
        """What the service's classifier says of images: one, or any number, sent in as many calls as the service needs.

        files: paths, bytes or files open for reading, PNG, JPEG or WebP. What they are called is not sent. model: default the
        service's. threshold: a name of the model's (`client.models.retrieve(name).classifier.thresholds`) or a number 0..1;
        default the classifier's own. heat_map: "xrai" or "integrated-gradients" for a picture of what of each image speaks for
        the positive class, which takes seconds an image. progress: True for a bar, or a function that gets (done, total).

        Raises UnprocessableEntityError (an image that cannot be used; `.errors` names `files[i]`, the message the path),
        UnsupportedMediaTypeError (no image), TooLargeError, NotFoundError (the model), InvalidRequestError (a file that
        cannot be read), APIConnectionError.
        """
        sources, params = _uploads.sources_of(files), _requests.classification(model, threshold, heat_map)
        with count_progress(progress, "classifying") as report:
            return self._transport.run(_classifications.classify(self._api, sources, params, report))


class Models:
    """client.models"""

    def __init__(self, client: DermisClient) -> None:
        self._transport, self._api = client._transport, client._api

    def list(self) -> _Models:
        """The models that the service offers."""
        return self._transport.run(_resources.list_models(self._api))

    def retrieve(self, name: str) -> Model:
        """One model, with its card. Raises NotFoundError."""
        return self._transport.run(_resources.retrieve_model(self._api, name))


class DermisClient:
    """A connection to a dermis service, blocking; threads may share it.

        with DermisClient("http://127.0.0.1:3000") as client:
            dataset = client.datasets.create(classes={"malignant": 500, "benign": 500}, seed=7)
            dataset.wait(progress=True)
            dataset.download("lesions")

    base_url: default the environment's DERMIS_BASE_URL, else http://127.0.0.1:3000. api_key: sent as a bearer token;
    default DERMIS_API_KEY, else none. timeout: seconds a request may stay without an answer. max_retries: further tries
    after a broken connection or a busy service, with growing pauses. http_client: your own httpx.Client (proxies, TLS,
    tests), which stays yours to close.
    """

    datasets: Datasets
    images: Images
    classifications: Classifications
    authenticity: Authenticity
    edits: Edits
    projections: Projections
    models: Models

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 3,
        http_client: httpx.Client | None = None,
    ) -> None:
        self._transport = SyncTransport(settings(base_url, api_key, timeout, max_retries), http_client)
        self._api = Api(self._dataset, max_retries)
        self.datasets, self.images, self.models = Datasets(self), Images(self), Models(self)
        self.classifications, self.authenticity = Classifications(self), Authenticity(self._transport, self._api)
        self.edits, self.projections = Edits(self._transport, self._api), Projections(self._transport, self._api)

    @property
    def base_url(self) -> str:
        return self._transport.settings.base_url

    def _dataset(self, answer: Any) -> Dataset:
        dataset = Dataset.model_validate(answer)
        dataset._client = self
        return dataset

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DermisClient({self._transport.settings!r})"
