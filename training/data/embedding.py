"""Embed many images in batches, under a progress bar."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.imaging import Images

Extract = Callable[[Images], NDArray[np.float32]]

CHUNK = 64  # images in one call of the network


def progress_bar(total: int, name: str, *, disable: bool | None = None) -> tqdm:
    """A progress bar that counts images and shows the remaining time.

    Args:
        total: Number of images.
        name: Text before the bar.
        disable: Whether to hide the bar; None hides it where stderr is not a terminal.
    """
    return tqdm(total=total, desc=name, unit="img", disable=disable, smoothing=0.05)


def embed_array(images: Images, extract: Extract, bar: tqdm) -> NDArray[np.float32]:
    """Embed decoded images.

    Args:
        images: [N, H, W, 3], N at least 1; can be a memory map.
        extract: Computes features [n, dim] of n images.
        bar: Counts the images.

    Returns:
        Features [N, dim].
    """
    parts = []
    for start in range(0, len(images), CHUNK):
        parts.append(extract(np.ascontiguousarray(images[start : start + CHUNK])))
        bar.update(len(parts[-1]))
    return np.concatenate(parts)
