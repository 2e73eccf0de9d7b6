"""Synthetic images as data sets of PyTorch, for `torch.utils.data.DataLoader`: `pip install "dermis-client[torch]"`.

`SyntheticIterable` generates images while a model trains. `SyntheticDataset` reads a dataset that was downloaded.

Example:
    ```python
    from torch.utils.data import DataLoader
    from dermis_client.torch import SyntheticIterable

    stream = SyntheticIterable({"benign": 0.5, "malignant": 0.5}, samples=10_000, seed=7)
    for images, labels in DataLoader(stream, batch_size=64, num_workers=2):
        ...
    ```
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import random
import threading
import time
import warnings
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, SupportsIndex, TypeVar, get_args

from PIL import Image

from dermis_client._client import DermisClient
from dermis_client.errors import APIStatusError, IntegrityError, InvalidRequestError
from dermis_client.folders import ARCHIVE, METADATA
from dermis_client.images import ImagesResult, decode
from dermis_client.params import GateCondition, GateParams
from dermis_client.pixels import PixelsResult

try:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch.utils.data import Dataset, IterableDataset, get_worker_info
except ImportError as error:
    raise ImportError('dermis_client.torch needs PyTorch and NumPy: pip install "dermis-client[torch]"') from error

Sample = tuple[Any, int]
Transform = Callable[[Image.Image], Any]
OnReject = Literal["drop", "resample"]
T = TypeVar("T")
logger = logging.getLogger("dermis_client")
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_MAX_PREFETCH = 64
_BUSY = frozenset({429, 503})  # with Retry-After: a limit is reached, or the service is busy
_LEAST_WAIT = 0.5  # seconds
_DIGEST_DIGITS = 15  # first digits of a bundle's digest, as many as an int64 holds
_OF_FILES = frozenset({"image_format", "image_quality", "provenance"})  # options that only image files have
_MAX_TRIES = 16
_STRIDE = 1 << 34  # from the index of a sample to that of its next candidate, as in datasets


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return an image as float32 [3, H, W] between 0 and 1, as `ToTensor` of torchvision does."""
    return _scaled(np.asarray(image.convert("RGB")))


def _scaled(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """Pixels uint8 [H, W, 3] as float32 [3, H, W] between 0 and 1.

    NumPy computes in the calling thread. torch would use further threads even for a small image, and they wait actively for
    more work: of a generator on the same machine they take more time than the whole stream needs.
    """
    return torch.from_numpy(np.divide(pixels.transpose(2, 0, 1), np.float32(255), dtype=np.float32, order="C"))


@dataclass(frozen=True)
class _Chunk:
    """The samples of one call. name: for messages; digest: that of the bundle; samples: what makes an item, and its label."""

    name: str
    digest: str
    samples: list[tuple[Callable[[], Any], int]]


def _other_bundle(expected: str, actual: str, name: str) -> IntegrityError:
    return IntegrityError(
        f"{name}: the service has changed from the bundle {expected[:12]}... to {actual[:12]}..., and samples of two bundles "
        "are not mixed; serve the earlier one again, or make a new stream",
        name=name,
        expected=expected,
        actual=actual,
    )


class SyntheticIterable(IterableDataset[Sample]):
    """A stream of generated images and their labels. Sample i depends on (model, seed, i) and the options alone.

    Each call of the service generates a chunk of `chunk` samples. Ranks of a distributed training, and the workers of a
    DataLoader, generate different chunks: together they give each sample once, for any number of workers. Calls that run
    ahead keep the generator busy while the model trains.

    An epoch has `samples` samples, and the next epoch has new ones after `set_epoch(1)`; without it, each iteration gives
    the same samples. `state_dict` and `load_state_dict` continue an interrupted epoch: of this object, if it is iterated
    in its own process, or through torchdata's StatefulDataLoader, which calls them in each worker.

    All samples are of one bundle: that of the first chunk, or of the state that was loaded. If the service changes to
    another bundle, such as during an update, iterating ends with IntegrityError. Make a new stream to use the new bundle.

    Args:
        classes: Share of each class, such as {"benign": 3, "malignant": 1}, in the order of the labels 0, 1, ....
        samples: Number of samples of an epoch, of all ranks together; None for a stream without an end.
        seed: 0 to 2**63 - 1.
        first_index: Index of the first sample.
        chunk: Samples of one call, at most what the service generates in one call.
        prefetch: Calls of each worker that run at the same time, ahead of the training.
        transform: Makes the item of a PIL image in RGB; by default float32 [3, H, W] between 0 and 1, as `to_tensor`.
        gate: The condition on each sample, for a model with an index of its training images. "authentic": the distance to the
            nearest training image must be larger than the distance of that one to its nearest other training image.
            "min_distance": it must be at least a percentile of these distances. None: no sample is compared.
        percentile: That percentile, 0 to 100.
        detect_copies: With a gate, refuse also what the copy detector of the model finds, if it has one.
        on_reject: What to do with refused samples. "drop": leave them out. "resample": send the image of another latent
            in their place, with the same label, as a dataset does.
        tries: For "resample": images that may be refused before a sample is left out, 1 to 16.
        only_authentic: Deprecated: give gate="authentic".
        busy_timeout: Seconds for which a call is repeated while the service refuses it because it is busy or a limit is reached
            (503 or 429 with Retry-After), beyond the retries of the client. A slow generator refuses calls that would wait
            for long, so that they come in turn. Other errors are not repeated.
        client: Makes the client in each worker; by default DermisClient, with the address and the key of the environment.
            For other settings, give functools.partial(DermisClient, "https://...").
        rank: Number of this process; by default that of torch.distributed.
        world_size: Number of processes.
        options: Further options of `client.images.generate`, such as model, truncation_psi or edits. With one of image_format,
            image_quality and provenance the service sends image files, which are smaller, instead of pixels.

    Raises:
        InvalidRequestError: An argument is not valid.
    """

    def __init__(
        self,
        classes: Mapping[str, float],
        *,
        samples: int | None = None,
        seed: SupportsIndex = 0,
        first_index: int = 0,
        chunk: int = 32,
        prefetch: int = 3,
        transform: Transform | None = None,
        gate: GateCondition | None = None,
        percentile: float = 1.0,
        detect_copies: bool = True,
        on_reject: OnReject = "drop",
        tries: int = 8,
        only_authentic: bool = False,
        busy_timeout: float = 600.0,
        client: Callable[[], DermisClient] = DermisClient,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        shares = [float(share) for share in classes.values()]
        if not shares or not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
            raise InvalidRequestError("classes: give the share of each class, at least 0, and more than 0 in all")
        for name, value, least in (("samples", samples, 1), ("chunk", chunk, 1), ("first_index", first_index, 0)):
            if value is not None and value < least:
                raise InvalidRequestError(f"{name}: must be at least {least}")
        if only_authentic:
            warnings.warn('only_authentic is deprecated: give gate="authentic"', DeprecationWarning, stacklevel=2)
            if gate not in (None, "authentic"):
                raise InvalidRequestError(f'only_authentic: contradicts gate="{gate}"; leave it out')
            gate = "authentic"
        if "privacy" in options:
            raise InvalidRequestError("privacy: give gate, percentile and detect_copies as arguments of their own")
        self._privacy = _gate_params(gate, percentile, detect_copies)
        self._tries = _checked_tries(on_reject, tries)
        if not 1 <= prefetch <= _MAX_PREFETCH:
            raise InvalidRequestError(f"prefetch: must be 1 to {_MAX_PREFETCH}")
        if not (math.isfinite(busy_timeout) and busy_timeout >= 0):
            raise InvalidRequestError("busy_timeout: must be a number of seconds, at least 0")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self._world_size = (
            world_size if world_size is not None else torch.distributed.get_world_size() if distributed else 1
        )
        if not 0 <= self._rank < self._world_size:
            raise InvalidRequestError("rank: must be at least 0 and below world_size")
        self.class_names = tuple(classes)
        self._limits = [sum(shares[: position + 1]) / sum(shares) for position in range(len(shares))]
        self._samples, self._seed, self._first_index, self._chunk = samples, int(seed), first_index, chunk
        self._first_value = int(random.Random(self._seed).random() * 2**53)
        self._prefetch, self._transform = prefetch, transform
        self._client, self._options, self._busy_timeout = client, options, float(busy_timeout)
        # In shared memory, so that workers that persist between epochs see it.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        # The beginning of the digest of the bundle, in which workers agree; 0 before the first chunk.
        self._digest = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._iterated_by_workers = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._done, self._offset = 0, 0  # chunks of this worker that were given, and samples of the next one
        self._loaded = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the samples of the next iteration: epoch e continues where epoch e - 1 ends.

        Raises:
            InvalidRequestError: It is negative, or the stream has no end.
        """
        if epoch < 0 or (epoch and self._samples is None):
            raise InvalidRequestError("epoch: must be at least 0, and needs `samples`, the length of an epoch")
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the position in this epoch and the beginning of the bundle's digest, for `load_state_dict`.

        Raises:
            InvalidRequestError: Workers of a DataLoader iterate, so that this process does not know the position.
        """
        if get_worker_info() is None and self._iterated_by_workers.item():
            raise InvalidRequestError(
                "num_workers: the workers of the DataLoader iterate, so this process does not know their position: use "
                "torchdata's StatefulDataLoader and its state_dict, or num_workers=0"
            )
        position = {"epoch": int(self._epoch.item()), "chunks": self._done, "offset": self._offset}
        return {**position, "digest": int(self._digest.item())}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a position of `state_dict`, with the next iteration, at the same number of workers and ranks.

        The samples that follow must be of the same bundle. A state of an earlier version does not name it.
        """
        self._epoch.fill_(state["epoch"])
        self._digest.fill_(state.get("digest", 0))
        self._done, self._offset = int(state["chunks"]), int(state["offset"])
        self._loaded = True

    def __len__(self) -> int:
        """Return the number of samples of an epoch at this rank.

        Raises:
            TypeError: The stream has no end, or a gate.
        """
        if self._samples is None or self._privacy is not None:
            raise TypeError("a stream without an end, or with a gate, has no length")
        whole, rest = divmod(self._samples, self._chunk)
        own = sum(self._chunk for number in range(self._rank, whole, self._world_size))
        return own + (rest if whole % self._world_size == self._rank else 0)

    def __iter__(self) -> Iterator[Sample]:
        """Yield (item, label) of the samples of this rank and worker.

        Raises:
            IntegrityError: The service has changed to another bundle.
            DermisError: The service cannot be reached, refuses a call, or is busy for longer than `busy_timeout`.
        """
        if not self._loaded:
            self._done = self._offset = 0
        self._loaded = False
        worker = get_worker_info()
        self._iterated_by_workers.fill_(worker is not None)
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        chunks = self._chunks(number, workers)
        stopped = threading.Event()
        with self._client() as opened, ThreadPoolExecutor(self._prefetch) as pool:
            client = opened._stopped_by(stopped) if isinstance(opened, DermisClient) else opened
            running: deque[Future[_Chunk]] = deque()

            def call_ahead() -> None:
                for start, size in islice(chunks, self._prefetch - len(running)):
                    running.append(pool.submit(self._generate, client, start, size, stopped))

            try:
                call_ahead()
                while running:
                    chunk = running.popleft().result()
                    call_ahead()
                    yield from self._items(chunk)
            finally:
                stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)

    def _items(self, chunk: _Chunk) -> Iterator[Sample]:
        self._check_bundle(chunk)
        for make_item, label in chunk.samples[self._offset :]:
            self._offset += 1
            yield make_item(), label
        self._done += 1
        self._offset = 0

    def _chunks(self, worker: int, workers: int) -> Iterator[tuple[int, int]]:
        """Yield (first index, size) of the chunks of a worker that have not been given."""
        begin = self._first_index + int(self._epoch.item()) * (self._samples or 0)
        position = self._done
        while True:
            # Independent of the number of workers, a rank has the same chunks.
            start = ((worker + position * workers) * self._world_size + self._rank) * self._chunk
            size = self._chunk if self._samples is None else min(self._chunk, self._samples - start)
            if size <= 0:
                return
            yield begin + start, size
            position += 1

    def _check_bundle(self, chunk: _Chunk) -> None:
        """Raise IntegrityError unless a chunk is of the bundle of the earlier ones."""
        try:
            digest = int(chunk.digest[:_DIGEST_DIGITS], 16)
        except ValueError:
            raise IntegrityError("the service has sent a digest of its model that is none", name=chunk.name) from None
        known = int(self._digest.item())
        if known == 0:
            self._digest.fill_(digest)
        elif known != digest:
            raise _other_bundle(f"{known:0{_DIGEST_DIGITS}x}", chunk.digest, chunk.name)

    def _generate(self, client: DermisClient, start: int, size: int, stopped: threading.Event) -> _Chunk:
        name = f"images {start} to {start + size - 1}"
        labels = sorted(
            self._label(start + position) for position in range(size)
        )  # class by class, as the service answers
        items: list[Callable[[], Any] | None] = [None] * size
        digest, pending = "", list(range(size))
        for attempt in range(self._tries):
            refused: list[int] = []
            for positions in _runs(pending):
                result = self._call(
                    client,
                    [labels[position] for position in positions],
                    start + positions[0] + attempt * _STRIDE,
                    stopped,
                )
                if digest and result.model.digest != digest:
                    raise _other_bundle(digest, result.model.digest, name)
                digest = result.model.digest
                results = [sample.passed for sample in result.data]
                for position, item, passed in zip(positions, self._items_of(result), results, strict=True):
                    if self._privacy is None or passed:
                        items[position] = item
                    else:
                        refused.append(position)
            pending = refused
            if not pending:
                break
        samples = [(item, label) for item, label in zip(items, labels, strict=True) if item is not None]
        random.Random(f"{self._seed} {start}").shuffle(samples)
        return _Chunk(name, digest, samples)

    def _call(
        self, client: DermisClient, labels: Sequence[int], start: int, stopped: threading.Event
    ) -> ImagesResult | PixelsResult:
        """Generate the images of consecutive indices. labels: their labels, ascending."""
        counts = Counter(labels)
        classes = {self.class_names[label]: counts[label] for label in sorted(counts)}
        as_files = any(self._options.get(option) is not None for option in _OF_FILES)
        generate: Callable[..., ImagesResult | PixelsResult] = (
            client.images.generate if as_files else client.images.generate_pixels
        )
        options = self._options if self._privacy is None else {**self._options, "privacy": self._privacy}
        result = self._repeat_while_busy(
            lambda: generate(classes, seed=self._seed, start_index=start, **options), stopped
        )
        name = f"images {start} to {start + len(labels) - 1}"
        if [item.class_name for item in result.data] != [self.class_names[label] for label in labels]:
            raise IntegrityError("the service has sent other classes than those that were requested", name=name)
        if self._privacy is not None and any(item.passed is None for item in result.data):
            raise IntegrityError("the service has sent images without the results of the gate", name=name)
        return result

    def _items_of(self, result: ImagesResult | PixelsResult) -> list[Callable[[], Any]]:
        """Return what makes the item of each image, in the thread of the training: a transform may not be safe in others."""
        transform = self._transform or to_tensor
        if isinstance(result, ImagesResult):
            return [partial(transform, image) for image in result.images]
        if self._transform is None:
            return [partial(_scaled, pixels) for pixels in result.array]

        def item(position: int) -> Any:
            return transform(result.image(position))

        return [partial(item, position) for position in range(len(result))]

    def _repeat_while_busy(self, call: Callable[[], T], stopped: threading.Event) -> T:
        """Call the service, again while it is busy, until `busy_timeout` has passed or the iteration has stopped."""
        deadline = time.monotonic() + self._busy_timeout
        jitter = random.Random()  # not that of the training
        while True:
            try:
                return call()
            except APIStatusError as error:
                if error.status_code not in _BUSY or error.retry_after is None:
                    raise
                wait = max(error.retry_after, _LEAST_WAIT) * (1 + jitter.random() / 4)
                if time.monotonic() + wait > deadline:
                    raise
                logger.info("the service is busy; the call is repeated in %.1f s: %s", wait, error)
                if stopped.wait(wait):
                    raise

    def _label(self, index: int) -> int:
        """The class of a sample: a sequence that has the shares of the classes in every section, not only on average.

        It is the additive recurrence of the golden ratio, which has a low discrepancy, from a start that the seed gives.
        """
        # Whole numbers, because the product of a large index and the ratio has no digits left after its point.
        step = int(_GOLDEN_RATIO * 2**53)
        value = ((index * step + self._first_value) % 2**53) / 2**53
        return next((label for label, limit in enumerate(self._limits) if value < limit), len(self._limits) - 1)


def _gate_params(gate: GateCondition | None, percentile: float, detect_copies: bool) -> GateParams | None:
    if gate is not None and gate not in get_args(GateCondition):
        raise InvalidRequestError(f"gate: {gate!r} is none of {', '.join(get_args(GateCondition))}")
    if not (math.isfinite(percentile) and 0 <= percentile <= 100):
        raise InvalidRequestError("percentile: must be 0 to 100")
    if gate is None:
        return None
    return {"gate": gate, "percentile": float(percentile), "detect_copies": bool(detect_copies)}


def _checked_tries(on_reject: OnReject, tries: int) -> int:
    """Return the number of images that may be refused before a sample is left out."""
    if on_reject not in get_args(OnReject):
        raise InvalidRequestError(f"on_reject: {on_reject!r} is none of {', '.join(get_args(OnReject))}")
    if not 1 <= tries <= _MAX_TRIES:
        raise InvalidRequestError(f"tries: must be 1 to {_MAX_TRIES}")
    return tries if on_reject == "resample" else 1


def _runs(positions: Sequence[int]) -> Iterator[list[int]]:
    """Divide ascending numbers into runs of consecutive ones."""
    run: list[int] = []
    for position in positions:
        if run and position != run[-1] + 1:
            yield run
            run = []
        run.append(position)
    if run:
        yield run


class SyntheticDataset(Dataset[Sample]):
    """The images and labels of a downloaded dataset of the format imagefolder, read from its images.zip.

    Example:
        ```python
        with DermisClient() as client:
            dataset = client.datasets.create({"benign": 500, "malignant": 500}, privacy={"gate": "authentic"}).wait()
            dataset.download("lesions")
        data = SyntheticDataset("lesions")
        ```

    Args:
        folder: The folder of the dataset, or the images.zip itself.
        transform: Makes the item of a PIL image in RGB; by default `to_tensor`.
        class_names: The classes in the order of the labels 0, 1, ...; by default those of the dataset in the model's order.

    Raises:
        IntegrityError: The archive is missing or damaged, or has an image that its table does not list.
        InvalidRequestError: `class_names` lacks a class of the dataset.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        transform: Transform | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        path = Path(folder)
        self._path = path if path.is_file() else path / ARCHIVE
        self._transform = transform or to_tensor
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        try:
            with zipfile.ZipFile(self._path) as archive:
                text = archive.read(METADATA).decode()
                table = list(csv.DictReader(io.StringIO(text, newline="")))
                self._names = [row["file_name"] for row in table]
                self._classes = [row["target"] for row in table]
                order = {row["target"]: int(row["label"]) for row in table}
                missing = sorted(set(self._names) - set(archive.namelist()))
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, csv.Error) as error:
            raise IntegrityError(
                f"{self._path} cannot be read as the {ARCHIVE} of a dataset ({error})", name=ARCHIVE
            ) from error
        if missing:
            raise IntegrityError(f"{self._path} has no image {missing[0]}, which its {METADATA} lists", name=missing[0])
        self.class_names = tuple(sorted(order, key=order.__getitem__) if class_names is None else class_names)
        self._labels = {name: label for label, name in enumerate(self.class_names)}
        absent = sorted(order.keys() - self._labels.keys())
        if absent:
            raise InvalidRequestError(f"class_names: the dataset has the class {absent[0]!r} too")

    @property
    def labels(self) -> list[int]:
        """The label of each image, for instance for a WeightedRandomSampler."""
        return [self._labels[name] for name in self._classes]

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, position: int) -> Sample:
        name = self._names[position]
        try:
            content = self._open().read(name)
        except (OSError, zipfile.BadZipFile) as error:
            raise IntegrityError(f"{self._path}: {name} cannot be read ({error})", name=name) from error
        return self._transform(decode(content, name)), self._labels[self._classes[position]]

    def _open(self) -> zipfile.ZipFile:
        """The archive, opened once in each process: processes must not share the position in a file."""
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self._path)
        return self._archive[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}
