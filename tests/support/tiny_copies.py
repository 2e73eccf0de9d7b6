"""A copy detector of procedural lesions, made by one training step from the weights of ImageNet."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from dermis.imaging import Images
from lesions import lesion
from training.copies.config import CopiesConfig
from training.copies.run import TrainedCopyDetector, train_copy_detector
from training.data.images import ImageDataset

SIDE = 48
KNOWN, OTHERS = 100, 200


@cache
def lesion_images(first: int, count: int) -> Images:
    """Lesions of these seeds, uint8 [count, 48, 48, 3]."""
    return np.stack([lesion(seed, SIDE) for seed in range(first, first + count)])


def dataset(images: Images, name: str) -> ImageDataset:
    """A data set of images that come from no file."""
    names = tuple(f"{name}{number}" for number in range(len(images)))
    return ImageDataset(images, np.zeros(len(images), np.int64), ("any",), names, name, (), names)


def make_detector(out: Path, known: Images, **options: int) -> TrainedCopyDetector:
    """Train a detector of `known`, with 200 other lesions for the threshold."""
    others = dataset(lesion_images(10_000, OTHERS), "other")
    config = CopiesConfig(**{"steps": 1, "batch": 8, "size": SIDE, **options})
    trained = train_copy_detector(
        dataset(known, "known"), others, config, out, measured=20, device="cpu", progress_bar=False
    )
    assert trained is not None
    return trained
