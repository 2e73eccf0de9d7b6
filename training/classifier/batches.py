"""Training images in the order of an epoch, and their augmentation by rotations and flips."""

from __future__ import annotations

import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dermis.errors import TrainingError
from training.classifier.config import ClassifierConfig
from training.distributed import Ranks


@dataclass(frozen=True)
class TrainingSet:
    """Real and synthetic images as one sequence: consecutive arrays uint8 [n, S, S, 3], and labels int64 [N] of all."""

    arrays: tuple[NDArray[np.uint8], ...]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def positive_share(self) -> float:
        return float(self.labels.mean())

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Read the images with these indices: uint8 [n, S, S, 3]."""
        ends = np.cumsum([len(array) for array in self.arrays])
        owner = np.searchsorted(ends, indices, side="right")
        images = np.empty((len(indices), *self.arrays[0].shape[1:]), np.uint8)
        for k, array in enumerate(self.arrays):
            images[owner == k] = array[indices[owner == k] - (ends[k] - len(array))]
        return images


def epoch_order(labels: NDArray[np.int64], config: ClassifierConfig, epoch: int, ranks: Ranks) -> NDArray[np.int64]:
    """Indices of the images of each step [steps, batch], which follow from the seed and the number of the epoch.

    An epoch shows every image once, except the remainder that does not fill a batch. With `balance` "sampling" each class is
    half of it: some images of the larger class are not in this epoch, and those of the smaller class are repeated.

    Raises:
        TrainingError: There are fewer images than a batch needs, or a batch cannot be divided among the processes.
    """
    if config.batch % ranks.count:
        raise TrainingError(f"batch: {config.batch} must be a multiple of the {ranks.count} processes")
    rng = np.random.default_rng([config.seed, epoch])
    count = min(config.epoch_images or len(labels), len(labels))
    if count < config.batch:
        raise TrainingError(f"batch: {config.batch} is more than the {count} training images of an epoch")
    if config.balance == "sampling":
        half = math.ceil(count / 2)
        halves = [_repeated(np.flatnonzero(labels == k), half, rng) for k in (0, 1)]
        order = rng.permutation(np.concatenate(halves))[:count]
    else:
        order = rng.permutation(len(labels))[:count]
    return order[: count // config.batch * config.batch].reshape(-1, config.batch)


def read_ahead(
    training: TrainingSet, order: NDArray[np.int64], ranks: Ranks
) -> Generator[tuple[NDArray[np.int64], Tensor]]:
    """Yield this process's part of each step, read in advance: indices [n] and images uint8 [n, S, S, 3] on its device."""
    pinned = ranks.device.type == "cuda"

    def read(step: int) -> tuple[NDArray[np.int64], Tensor]:
        chosen = ranks.rank_part(order[step])
        images = torch.from_numpy(training.read(chosen))
        return chosen, images.pin_memory() if pinned else images

    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        ahead = pool.submit(read, 0) if len(order) else None
        for step in range(len(order)):
            assert ahead is not None
            chosen, images = ahead.result()
            ahead = pool.submit(read, step + 1) if step + 1 < len(order) else None
            yield chosen, images.to(ranks.device, non_blocking=True)


def to_float(images: Tensor) -> Tensor:
    """uint8 [n, S, S, 3] as float [n, 3, S, S] in 0..255, in the channels-last layout, which is fast in convolutions."""
    return images.permute(0, 3, 1, 2).float()  # NHWC in memory is channels-last


def rotated_and_flipped(images: Tensor, rotation: float, flips: bool) -> Tensor:
    """Rotate and flip each image at random, since a lesion has no upright position.

    Corners from outside of the image are filled by reflection. The interpolation is bicubic, because a bilinear one would
    show the network softer images than it will see later.

    Args:
        images: Float [n, 3, S, S].
        rotation: Largest angle in degrees; angles are uniform in -rotation..rotation.
        flips: Whether to flip half of the images.
    """
    n, device = len(images), images.device
    angle = ((torch.rand(n) * 2 - 1) * math.radians(rotation)).to(device)
    horizontal = torch.ones(n, device=device)
    if flips:  # one flip and a rotation by any angle give every flip; otherwise both flips are needed
        horizontal = 1 - 2 * torch.randint(2, (n,)).to(device).float()
    vertical = torch.ones(n, device=device)
    if flips and rotation < 180:
        vertical = 1 - 2 * torch.randint(2, (n,)).to(device).float()
    if rotation == 0:
        images = torch.where((horizontal < 0)[:, None, None, None], images.flip(3), images)
        return torch.where((vertical < 0)[:, None, None, None], images.flip(2), images)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    top = torch.stack([cos * horizontal, -sin * vertical, zero], dim=1)
    bottom = torch.stack([sin * horizontal, cos * vertical, zero], dim=1)
    grid = F.affine_grid(torch.stack([top, bottom], dim=1), list(images.shape), align_corners=False)
    resampled = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    return resampled.clamp(0, 255)


def _repeated(indices: NDArray[np.int64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `count` of the indices, none of them again before all have been drawn."""
    rounds = math.ceil(count / len(indices))
    return np.concatenate([rng.permutation(indices) for _ in range(rounds)])[:count]
