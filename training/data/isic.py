"""Read and decode training images in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from training.data.images import ImageDataset, load_images
from training.data.sources import ReadOptions, read_source


def load_isic(
    folder: Path,
    resolution: int,
    *,
    cache: Path | None = None,
    progress: bool = True,
    **options: Unpack[ReadOptions],
) -> ImageDataset:
    """Call `read_source` with the options, and `load_images` with the result."""
    return load_images(read_source(folder, **options), resolution, cache=cache, progress=progress)
