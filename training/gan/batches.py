"""Real images in the order in which a run sees them: an endless sequence of shuffled epochs, read in advance."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.images import ImageDataset
from training.distributed import ALONE, Ranks
from training.gan.config import GanConfig


@dataclass(frozen=True)
class Batch:
    """This rank's part of the images of one step: uint8 [n, R, R, 3] on its device, labels int64 [n]."""

    images: Tensor
    labels: NDArray[np.int64]


def class_weights(labels: NDArray[np.int64], config: GanConfig) -> NDArray[np.float64]:
    """Probability [N] of every image if a class of n images is shown in proportion to n ** (1 - class_balance)."""
    counts = np.maximum(np.bincount(labels), 1)  # 1 for a class without images, whose weight is not used
    weights = (counts.astype(np.float64) ** -config.class_balance)[labels]
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


def batches(dataset: ImageDataset, config: GanConfig, start: int, ranks: Ranks = ALONE) -> Generator[Batch]:
    """Yield batches, starting after `start` images.

    While a batch is used, a thread reads the next one from the memory-mapped array. For CUDA it is read into pinned memory,
    from which it is copied to the GPU asynchronously. The order depends on the seed and on `class_balance` alone. With
    `class_balance`, an epoch consists of as many independent draws as there are images.
    """
    batch = config.batch
    weights = class_weights(dataset.labels, config) if config.class_balance else None
    order = _Order(len(dataset.labels), config.seed, weights)
    pinned = ranks.device.type == "cuda"

    def read(position: int) -> Batch:
        chosen = ranks.rank_part(order.at(np.arange(position, position + batch)))
        images = torch.from_numpy(np.ascontiguousarray(dataset.images[chosen]))
        return Batch(images.pin_memory() if pinned else images, dataset.labels[chosen])

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(read, start)
        while True:
            start += batch
            now, ahead = ahead.result(), pool.submit(read, start)
            yield Batch(now.images.to(ranks.device, non_blocking=True), now.labels)


class _Order:
    """The order of the images: each epoch is a permutation, or a sample, that follows from (seed, epoch)."""

    def __init__(self, count: int, seed: int, weights: NDArray[np.float64] | None = None) -> None:
        self.count, self.seed, self.weights = count, seed, weights
        self.epochs: dict[int, NDArray[np.int64]] = {}

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the images at these ascending positions."""
        epochs, offsets = np.divmod(positions, self.count)
        needed = {int(epoch) for epoch in epochs}
        self.epochs = {epoch: self._permutation(epoch) for epoch in needed}
        return np.array([self.epochs[int(e)][i] for e, i in zip(epochs, offsets, strict=True)])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self.epochs:
            return self.epochs[epoch]
        rng = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            return rng.permutation(self.count)
        return rng.choice(self.count, size=self.count, p=self.weights)
