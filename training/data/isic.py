"""From a path to decoded training images in one call."""

from __future__ import annotations

from pathlib import Path

from training.data.images import ImageDataset, load_images
from training.data.sources import read_source

__all__ = ["ImageDataset", "load_isic"]


def load_isic(
    folder: Path,
    resolution: int,
    *,
    class_column: str | None = None,
    binary: bool = False,
    metadata: Path | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> ImageDataset:
    """`read_source` and `load_images`: any of the layouts that `read_source` knows, an ISIC folder first of all."""
    source = read_source(folder, metadata=metadata, class_column=class_column, binary=binary)
    return load_images(source, resolution, cache=cache, progress=progress)
