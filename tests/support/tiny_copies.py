"""A copy detector of random colour fields, made by one training step from the weights of ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from scipy import ndimage

from dermis.imaging import Images
from training.copies.config import CopiesConfig
from training.copies.run import TrainedCopyDetector, train_copy_detector
from training.data.images import ImageDataset

SIDE = 48
KNOWN, OTHERS = 100, 200


@cache
def colour_fields(first: int, count: int) -> Images:
    """Smooth random colours of these seeds, uint8 [count, 48, 48, 3]. Every image is distinct at first sight."""
    fields = np.stack(
        [np.random.default_rng(seed).normal(size=(SIDE, SIDE, 3)) for seed in range(first, first + count)]
    )
    smooth = ndimage.gaussian_filter(fields, (0, 4, 4, 0), mode="wrap")
    images: Images = np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    return images


def dataset(images: Images, name: str) -> ImageDataset:
    """A data set of images that come from no file."""
    names = tuple(f"{name}{number}" for number in range(len(images)))
    return ImageDataset(images, np.zeros(len(images), np.int64), ("any",), names, name, (), names)


def make_detector(
    out: Path, known: Images, *, resume: bool = False, loggers: Sequence[str] = (), **options: int
) -> TrainedCopyDetector:
    """Train a detector of `known`, with 200 other images for the threshold."""
    others = dataset(colour_fields(10_000, OTHERS), "other")
    config = CopiesConfig(**{"steps": 1, "batch": 8, "size": SIDE, **options})
    trained = train_copy_detector(
        dataset(known, "known"),
        others,
        config,
        out,
        measured=20,
        device="cpu",
        resume=resume,
        loggers=loggers,
        progress_bar=False,
    )
    assert trained is not None
    return trained


def shared_detector(factory: pytest.TempPathFactory) -> Path:
    """The folder of a detector of the known images, which all test processes share. Tests must not change it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folders of the other processes are here too
    place = root / "copy-detector"
    with FileLock(root / "copy-detector.lock"):
        if not place.is_dir():
            made = make_detector(root / "copy-detector-run", colour_fields(0, KNOWN)).folder
            made.rename(place)
    return place
