"""Generated images as data sets of PyTorch, from a bundle on this machine and without a service.

Example:
    ```python
    from torch.utils.data import DataLoader
    from dermis.dataset.torch import GeneratedDataset

    data = GeneratedDataset("bundles/demo", {"benign": 3, "malignant": 1}, samples=10_000, seed=7)
    for images, labels in DataLoader(data, batch_size=64):
        ...
    ```

The samples are those of `dermis_client.torch.SyntheticIterable` with the same classes, seed and chunk: the same images bit for
bit, on the same kind of processor or GPU, and in the same order if one process reads them.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from dermis.bundle import open_bundle
from dermis.dataset.plan import latent_index
from dermis.dataset.privacy import pass_gate
from dermis.dataset.request import MAX_GATE_TRIES, GateOptions, classes_of
from dermis.directions.edit import Edit, bundle_offset
from dermis.errors import RequestError, escape
from dermis.imaging import Images
from dermis.latents import MAX_SEED
from dermis.network_config import NoiseMode

if TYPE_CHECKING:
    from dermis.authenticity.checker import Checker
    from dermis.synthesizer import Synthesizer

GeneratedSample = tuple[Any, int]
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_DIGEST_DIGITS = 15  # first digits of a bundle's digest, as in the states of `dermis_client.torch`


def to_float_tensor(image: Images) -> torch.Tensor:
    """Return an image uint8 [H, W, 3] as float32 [3, H, W] between 0 and 1, as `ToTensor` of torchvision does."""
    # NumPy computes in this thread. The threads of torch would wait actively for more work, on the cores of the generator.
    return torch.from_numpy(np.divide(image.transpose(2, 0, 1), np.float32(255), dtype=np.float32, order="C"))


class GeneratedDataset(IterableDataset[GeneratedSample]):
    """A stream of images that a bundle generates, and their labels. Sample i depends on (bundle, seed, i) and the options.

    Ranks of a distributed training, and the workers of a DataLoader, generate different chunks: together they give each
    sample once, for any number of workers. A generator is fastest in one process, which uses all processors or the GPU: prefer
    `num_workers=0`, or 1 to generate while the model trains. Workers need
    `multiprocessing_context="spawn"` with a GPU, and after this process has generated images.

    An epoch has `samples` samples, and the next epoch has new ones after `set_epoch(1)`. `state_dict` and `load_state_dict`
    continue an interrupted epoch: of this object, if it is iterated in its own process, or through torchdata's
    StatefulDataLoader, which calls them in each worker. A state of `SyntheticIterable` can be loaded too, and the reverse.

    With a gate, samples that are too near to a training image are left out or replaced, as in a dataset with `on_reject` "drop"
    or "resample". The bundle needs an index of its training images.

    Args:
        bundle: Folder or fsspec URL of a bundle, or the name of an installed one.
        classes: Share of each class, such as {"benign": 3, "malignant": 1}, in the order of the labels 0, 1, ....
        samples: Number of samples of an epoch, of all ranks together; None for a stream without an end.
        seed: 0 to 2**63 - 1.
        first_index: Index of the first sample.
        chunk: Samples that are generated together. The order of the samples depends on it, the set does not.
        transform: Makes the item of an image, uint8 [H, W, 3]; by default `to_float_tensor`.
        truncation_psi: 1 keeps the full variety, 0 gives the mean image.
        truncation_cutoff: Number of style vectors that are truncated; None for all.
        noise_mode: "random", "const" or "none".
        edits: Strengths of edits by the name of the direction.
        gate: None; "authentic": the distance to the nearest training image must be larger than the distance of that one to its
            nearest other training image; or "min_distance": it must be at least a percentile of these distances.
        percentile: That percentile, 0 to 100.
        detect_copies: With a gate, refuse also what the bundle's copy detector finds, if it has one.
        on_reject: What to do with refused samples. "drop": leave them out. "resample": generate the image of another latent
            in their place, with the same label.
        tries: For "resample": images that may be refused before a sample is left out, 1 to 16.
        device: "auto", or a name of torch.
        rank: Number of this process; by default that of torch.distributed.
        world_size: Number of processes.

    Raises:
        RequestError: An argument is not valid, or the bundle has no such class or direction, or no index for the gate.
        BundleError: The bundle cannot be opened.
    """

    def __init__(
        self,
        bundle: str | Path,
        classes: Mapping[str, float],
        *,
        samples: int | None = None,
        seed: int = 0,
        first_index: int = 0,
        chunk: int = 32,
        transform: Callable[[Images], Any] | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "random",
        edits: Mapping[str, float] | None = None,
        gate: Literal["authentic", "min_distance"] | None = None,
        percentile: float = 1.0,
        detect_copies: bool = True,
        on_reject: Literal["drop", "resample"] = "drop",
        tries: int = 8,
        device: str = "auto",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self._bundle = open_bundle(bundle)
        shares = [float(share) for share in classes.values()]
        if not shares or not all(math.isfinite(share) and share >= 0 for share in shares) or sum(shares) <= 0:
            raise RequestError("classes", "give the share of each class, at least 0, and more than 0 in all")
        names = classes_of(self._bundle)
        if unknown := [name for name in classes if name not in names]:
            raise RequestError(
                f"classes.{escape(unknown[0])}", f"is none of the bundle's classes: {', '.join(names)}", "unknown-class"
            )
        for name, value, least in (("samples", samples, 1), ("chunk", chunk, 1), ("first_index", first_index, 0)):
            if value is not None and value < least:
                raise RequestError(name, f"must be at least {least}")
        if not 0 <= seed <= MAX_SEED:
            raise RequestError("seed", f"must be 0 to {MAX_SEED}")
        if not (math.isfinite(truncation_psi) and 0 <= truncation_psi <= 2):
            raise RequestError("truncation_psi", "must be 0 to 2")
        if noise_mode not in get_args(NoiseMode):
            raise RequestError("noise_mode", f'"{escape(noise_mode)}" is none of {", ".join(get_args(NoiseMode))}')
        if gate not in (None, "authentic", "min_distance"):
            raise RequestError("gate", f'"{escape(gate)}" is none of authentic, min_distance')
        if not (math.isfinite(percentile) and 0 <= percentile <= 100):
            raise RequestError("percentile", "must be 0 to 100")
        if on_reject not in ("drop", "resample"):
            raise RequestError("on_reject", f'"{escape(on_reject)}" is none of drop, resample')
        if not 1 <= tries <= MAX_GATE_TRIES:
            raise RequestError("tries", f"must be 1 to {MAX_GATE_TRIES}")
        if gate is not None and self._bundle.authenticity is None:
            raise RequestError(
                "gate", "the bundle has no index of its training images; make one with dermis index build", "no-index"
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        self._world_size = (
            world_size if world_size is not None else torch.distributed.get_world_size() if distributed else 1
        )
        if not 0 <= self._rank < self._world_size:
            raise RequestError("rank", "must be at least 0 and below world_size")
        self.class_names = tuple(classes)
        self._numbers = [names.index(name) for name in classes]
        self._limits = [sum(shares[: position + 1]) / sum(shares) for position in range(len(shares))]
        self._samples, self._seed, self._first_index, self._chunk = samples, seed, first_index, chunk
        self._transform = transform or to_float_tensor
        moves = [Edit(name, strength, None) for name, strength in (edits or {}).items()]
        self._offset = bundle_offset(self._bundle, moves) if moves else None
        self._options: dict[str, Any] = {
            "truncation_psi": truncation_psi,
            "truncation_cutoff": truncation_cutoff,
            "noise_mode": noise_mode,
        }
        self._gate = (
            None if gate is None else GateOptions(gate=gate, percentile=float(percentile), detect_copies=detect_copies)
        )
        self._tries = tries if on_reject == "resample" else 1
        self._device = device
        self._synthesizer: tuple[int, Synthesizer] | None = None
        self._checker: Checker | None = None
        # In shared memory, so that workers that persist between epochs see it, and this process sees that there are some.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._iterated_by_workers = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._done, self._position = 0, 0  # chunks of this worker that were given, and samples of the next one
        self._loaded = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the samples of the next iteration: epoch e continues where epoch e - 1 ends.

        Raises:
            RequestError: It is negative, or the stream has no end.
        """
        if epoch < 0 or (epoch and self._samples is None):
            raise RequestError("epoch", "must be at least 0, and needs `samples`, the length of an epoch")
        self._epoch.fill_(epoch)

    def state_dict(self) -> dict[str, int]:
        """Return the position in this epoch and the beginning of the bundle's digest, for `load_state_dict`.

        Raises:
            RequestError: Workers of a DataLoader iterate, so that this process does not know the position.
        """
        if get_worker_info() is None and self._iterated_by_workers.item():
            raise RequestError(
                "num_workers",
                "the workers of the DataLoader iterate, so this process does not know their position: use torchdata's "
                "StatefulDataLoader and its state_dict, or num_workers=0",
            )
        position = {"epoch": int(self._epoch.item()), "chunks": self._done, "offset": self._position}
        return {**position, "digest": self._digest}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a position of `state_dict`, with the next iteration, at the same number of workers and ranks.

        Raises:
            RequestError: The state is of another bundle, or is not one.
        """
        try:
            epoch, chunks, offset = (int(state[name]) for name in ("epoch", "chunks", "offset"))
        except (KeyError, TypeError, ValueError):
            raise RequestError("state", "is not a state of this class") from None
        if state.get("digest", 0) not in (0, self._digest):
            raise RequestError("state", f"is of another bundle than {self._bundle.location}; open the one of the state")
        if min(epoch, chunks, offset) < 0:
            raise RequestError("state", "has a negative position")
        self._epoch.fill_(epoch)
        self._done, self._position = chunks, offset
        self._loaded = True

    @property
    def _digest(self) -> int:
        return int(self._bundle.digest[:_DIGEST_DIGITS], 16)

    def __len__(self) -> int:
        """Return the number of samples of an epoch at this rank.

        Raises:
            TypeError: The stream has no end, or a gate.
        """
        if self._samples is None or self._gate is not None:
            raise TypeError("a stream without an end, or with a gate, has no length")
        whole, rest = divmod(self._samples, self._chunk)
        own = self._chunk * len(range(self._rank, whole, self._world_size))
        return own + (rest if whole % self._world_size == self._rank else 0)

    def __iter__(self) -> Iterator[GeneratedSample]:
        """Yield (item, label) of the samples of this rank and worker."""
        if not self._loaded:
            self._done = self._position = 0
        self._loaded = False
        worker = get_worker_info()
        self._iterated_by_workers.fill_(worker is not None)
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        begin = self._first_index + int(self._epoch.item()) * (self._samples or 0)
        while True:
            start = ((number + self._done * workers) * self._world_size + self._rank) * self._chunk
            size = self._chunk if self._samples is None else min(self._chunk, self._samples - start)
            if size <= 0:
                return
            for image, label in self._generate(begin + start, size)[self._position :]:
                self._position += 1
                yield self._transform(image), label
            self._done += 1
            self._position = 0

    def _generate(self, start: int, size: int) -> list[tuple[Images, int]]:
        """Generate a chunk: the images that pass the gate and their labels, in the order of the stream."""
        labels = sorted(
            self._label(start + position) for position in range(size)
        )  # class by class, as the service answers
        images: list[Images | None] = [None] * size
        pending = np.arange(size)
        for attempt in range(self._tries):
            indices = [latent_index(start + position, attempt) for position in pending.tolist()]
            candidates = self._synthesizer_here().images(
                [self._seed] * len(indices),
                indices,
                [self._numbers[labels[position]] for position in pending],
                offset=self._offset,
                **self._options,
            )
            if candidates.shape[-1] == 1:
                candidates = np.repeat(candidates, 3, axis=-1)
            accepted = np.ones(len(pending), bool)
            if self._gate is not None:
                accepted = pass_gate(self._checker_here(), candidates, self._gate)
            for place in np.flatnonzero(accepted):
                images[pending[place]] = candidates[place]
            pending = pending[~accepted]
            if not len(pending):
                break
        samples = [(image, label) for image, label in zip(images, labels, strict=True) if image is not None]
        random.Random(f"{self._seed} {start}").shuffle(samples)
        return samples

    def _label(self, index: int) -> int:
        """The class of a sample: a sequence that has the shares of the classes in every section, not only on average.

        It is the additive recurrence of the golden ratio, as in `dermis_client.torch`.
        """
        start = random.Random(self._seed).random()
        value = ((index * int(_GOLDEN_RATIO * 2**53) + int(start * 2**53)) % 2**53) / 2**53
        return next((label for label, limit in enumerate(self._limits) if value < limit), len(self._limits) - 1)

    def _synthesizer_here(self) -> Synthesizer:
        """The generator of this process: a forked worker cannot use the threads of its parent."""
        if self._synthesizer is not None and self._synthesizer[0] != os.getpid():
            # Its threads do not exist in a forked process, and the locks that they held are never released.
            raise RequestError(
                "num_workers",
                "the main process has already generated images, so a forked worker cannot: give DataLoader "
                'multiprocessing_context="spawn", or num_workers=0',
            )
        if self._synthesizer is None:
            from dermis.synthesizer import Synthesizer

            self._synthesizer = os.getpid(), Synthesizer(self._bundle, device=self._device)
        return self._synthesizer[1]

    def _checker_here(self) -> Checker:
        """The comparison with the training images in this process, after `_synthesizer_here`."""
        if self._checker is None:
            from dermis.authenticity.checker import Checker

            self._checker = Checker(self._bundle, device=self._device)
        return self._checker

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_synthesizer": None, "_checker": None}
