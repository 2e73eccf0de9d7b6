"""Records of datasets with methods that act on them, each of which calls client.datasets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pydantic import PrivateAttr

from dermis_client._downloads import Download, DownloadProgress
from dermis_client._loading import check_format, default_folder, require_datasets, require_torch
from dermis_client._notebook import dataset_html
from dermis_client._untrusted import one_line
from dermis_client.errors import InvalidRequestError
from dermis_client.models import DatasetFile, DatasetRecord
from dermis_client.report import DatasetReport

if TYPE_CHECKING:
    from dermis_client.resources.datasets import AsyncDatasets, Datasets
    from dermis_client.torch import SyntheticDataset

D = TypeVar("D", bound=DatasetRecord)


@dataclass(frozen=True)
class DatasetEvent(Generic[D]):
    """One event of a dataset.

    Attributes:
        event: "progress", or the name of the final state.
        dataset: The record at that moment.
    """

    event: str
    dataset: D


@dataclass(frozen=True)
class _Binding:
    """The `datasets` of the client that the methods of a record call. Copies of the record share it, and no pickle has it."""

    resource: Any = field(default=None, compare=False)

    def __deepcopy__(self, _: dict[int, Any]) -> _Binding:
        return self

    def __reduce__(self) -> tuple[type[_Binding], tuple[()]]:
        return _Binding, ()

    def of(self, record: DatasetRecord) -> Any:
        """Return the `datasets` of the client.

        Raises:
            InvalidRequestError: The record has no client.
        """
        if self.resource is None:
            raise InvalidRequestError(
                f"this record of {one_line(record.id, 140)} is not connected to a client: it was pickled, or was not made by "
                "one; use client.datasets.retrieve(id)"
            )
        return self.resource


class Dataset(DatasetRecord):
    """A dataset at one moment, with methods that act on it. A record does not change: methods return new records."""

    _binding: _Binding = PrivateAttr(default=_Binding())

    @classmethod
    def _bound(cls, resource: Datasets, payload: Any) -> Dataset:
        """Parse a record and bind it to the `datasets` of a client."""
        dataset = cls.model_validate(payload)
        dataset._binding = _Binding(resource)
        return dataset

    @property
    def _datasets(self) -> Datasets:
        return cast("Datasets", self._binding.of(self))

    def refresh(self) -> Dataset:
        """Retrieve the current record; see `Datasets.retrieve`."""
        return self._datasets.retrieve(self.id)

    def wait(
        self,
        *,
        progress: bool | Callable[[Dataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> Dataset:
        """Wait until the dataset has succeeded; see `Datasets.wait` for arguments and errors."""
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
        """Download all files; see `Datasets.download` for arguments and errors."""
        return self._datasets.download(
            self.id, folder, parallel=parallel, overwrite=overwrite, extract=extract, progress=progress
        )

    def files(self) -> list[DatasetFile]:
        """List the files; see `Datasets.files`."""
        return self._datasets.files(self.id)

    def report(self) -> DatasetReport:
        """Retrieve the report; see `Datasets.report`."""
        return self._datasets.report(self.id)

    def events(self) -> Iterator[DatasetEvent[Dataset]]:
        """Iterate over the changes until the dataset has finished; see `Datasets.events`."""
        return self._datasets.events(self.id)

    def cancel(self) -> Dataset:
        """Stop the dataset if it has not finished; see `Datasets.cancel`."""
        return self._datasets.cancel(self.id)

    def delete(self) -> None:
        """Delete the dataset with its files; see `Datasets.delete`."""
        self._datasets.delete(self.id)

    def to_torch(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        class_names: Sequence[str] | None = None,
        progress: bool | Callable[[DownloadProgress], None] = False,
    ) -> SyntheticDataset:
        """Download the dataset and open it as a `dermis_client.torch.SyntheticDataset`: pip install "dermis-client[torch]".

        Args:
            folder: The folder; by default one with the id of the dataset, in the working directory. Files that are there and
                intact are not downloaded again.
            transform: Makes the item of a PIL image in RGB; by default a float tensor [3, H, W] between 0 and 1.
            class_names: The classes in the order of the labels; by default that of the model.
            progress: Show a progress bar, or call this function with the progress.

        Raises:
            DermisError: PyTorch is not installed; nothing is downloaded then.
            InvalidRequestError: The dataset does not have the format imagefolder.
        """
        require_torch()
        check_format(self.request.format)
        place = default_folder(self.id) if folder is None else folder
        downloaded = self.download(place, progress=progress)
        return downloaded.to_torch(transform=transform, class_names=class_names)

    def to_hf(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: bool | Callable[[DownloadProgress], None] = False,
        **options: Any,
    ) -> Any:
        """Download the dataset and load it with `datasets.load_dataset`: pip install "dermis-client[hf]".

        Args:
            folder: The folder; by default one with the id of the dataset, in the working directory. Files that are there and
                intact are not downloaded again.
            progress: Show a progress bar, or call this function with the progress.
            options: Options of `load_dataset`, such as cache_dir. `split` is "train" by default.

        Returns:
            A `datasets.Dataset` with the columns `image` and `label` (with its class names) and those of metadata.csv.

        Raises:
            DermisError: The library datasets is not installed; nothing is downloaded then.
        """
        require_datasets()
        downloaded = self.download(default_folder(self.id) if folder is None else folder, progress=progress)
        return downloaded.to_hf(**options)

    def _repr_html_(self) -> str:
        """The record in a notebook."""
        return dataset_html(self)


class AsyncDataset(DatasetRecord):
    """A dataset at one moment, with methods that act on it. A record does not change: methods return new records."""

    _binding: _Binding = PrivateAttr(default=_Binding())

    @classmethod
    def _bound(cls, resource: AsyncDatasets, payload: Any) -> AsyncDataset:
        """Parse a record and bind it to the `datasets` of a client."""
        dataset = cls.model_validate(payload)
        dataset._binding = _Binding(resource)
        return dataset

    @property
    def _datasets(self) -> AsyncDatasets:
        return cast("AsyncDatasets", self._binding.of(self))

    async def refresh(self) -> AsyncDataset:
        """Retrieve the current record; see `Datasets.retrieve`."""
        return await self._datasets.retrieve(self.id)

    async def wait(
        self,
        *,
        progress: bool | Callable[[AsyncDataset], None] = False,
        timeout: float | None = None,
        poll_interval: float = 2.0,
        patience: float = 300.0,
    ) -> AsyncDataset:
        """Wait until the dataset has succeeded; see `Datasets.wait` for arguments and errors."""
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
        """Download all files; see `Datasets.download` for arguments and errors."""
        return await self._datasets.download(
            self.id, folder, parallel=parallel, overwrite=overwrite, extract=extract, progress=progress
        )

    async def files(self) -> list[DatasetFile]:
        """List the files; see `Datasets.files`."""
        return await self._datasets.files(self.id)

    async def report(self) -> DatasetReport:
        """Retrieve the report; see `Datasets.report`."""
        return await self._datasets.report(self.id)

    def events(self) -> AsyncIterator[DatasetEvent[AsyncDataset]]:
        """Iterate over the changes until the dataset has finished; see `Datasets.events`."""
        return self._datasets.events(self.id)

    async def cancel(self) -> AsyncDataset:
        """Stop the dataset if it has not finished; see `Datasets.cancel`."""
        return await self._datasets.cancel(self.id)

    async def delete(self) -> None:
        """Delete the dataset with its files; see `Datasets.delete`."""
        await self._datasets.delete(self.id)

    async def to_torch(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        class_names: Sequence[str] | None = None,
        progress: bool | Callable[[DownloadProgress], None] = False,
    ) -> SyntheticDataset:
        """Download the dataset and open it for PyTorch; see `Dataset.to_torch`."""
        require_torch()
        check_format(self.request.format)
        place = default_folder(self.id) if folder is None else folder
        downloaded = await self.download(place, progress=progress)
        return downloaded.to_torch(transform=transform, class_names=class_names)

    async def to_hf(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: bool | Callable[[DownloadProgress], None] = False,
        **options: Any,
    ) -> Any:
        """Download the dataset and load it with the library datasets; see `Dataset.to_hf`."""
        require_datasets()
        downloaded = await self.download(default_folder(self.id) if folder is None else folder, progress=progress)
        return await asyncio.to_thread(downloaded.to_hf, **options)

    def _repr_html_(self) -> str:
        """The record in a notebook."""
        return dataset_html(self)
