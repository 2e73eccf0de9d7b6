"""Real images in the order in which a run sees them: an endless sequence of reshuffled epochs, read ahead."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.isic import ImageDataset
from training.gan.config import GanConfig
from training.gan.parallel import ALONE, Ranks


@dataclass(frozen=True)
class Batch:
    """This rank's part of one step's images: uint8 [n, R, R, 3] on its device, labels int64 [n]."""

    images: Tensor
    labels: NDArray[np.int64]


def class_weights(labels: NDArray[np.int64], config: GanConfig) -> NDArray[np.float64]:
    """The chance [N] of every image where a class of n images is shown in proportion to n ** (1 - class_balance)."""
    counts = np.maximum(np.bincount(labels), 1)  # of a class without images, whose weight nobody takes
    weights = (counts.astype(np.float64) ** -config.class_balance)[labels]
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances


def batches(dataset: ImageDataset, config: GanConfig, start: int, ranks: Ranks = ALONE) -> Generator[Batch]:
    """The batches from position `start` (images shown before) on.

    While one is used, a thread reads the next from the memory-mapped array; for CUDA into pinned memory, from which the
    copy to the GPU does not wait for it either. The order depends on the seed and the balance of the classes alone; where
    these are balanced, an epoch is as many independent draws as there are images.
    """
    batch = config.batch
    weights = class_weights(dataset.labels, config) if config.class_balance else None
    order = _Order(len(dataset.labels), config.seed, weights)
    pinned = ranks.device.type == "cuda"

    def read(position: int) -> Batch:
        chosen = ranks.own(order.at(np.arange(position, position + batch)))
        images = torch.from_numpy(np.ascontiguousarray(dataset.images[chosen]))
        return Batch(images.pin_memory() if pinned else images, dataset.labels[chosen])

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(read, start)
        while True:
            start += batch
            now, ahead = ahead.result(), pool.submit(read, start)
            yield Batch(now.images.to(ranks.device, non_blocking=True), now.labels)


class _Order:
    """Which image stands where: each epoch is a permutation, or a sample, that follows from (seed, epoch)."""

    def __init__(self, count: int, seed: int, weights: NDArray[np.float64] | None = None) -> None:
        self.count, self.seed, self.weights = count, seed, weights
        self.epochs: dict[int, NDArray[np.int64]] = {}

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Indices of the images at these ascending positions."""
        epochs, places = np.divmod(positions, self.count)
        needed = {int(epoch) for epoch in epochs}
        self.epochs = {epoch: self._permutation(epoch) for epoch in needed}
        return np.array([self.epochs[int(e)][i] for e, i in zip(epochs, places, strict=True)])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch in self.epochs:
            return self.epochs[epoch]
        rng = np.random.default_rng([self.seed, epoch])
        if self.weights is None:
            return rng.permutation(self.count)
        return rng.choice(self.count, size=self.count, p=self.weights)
