"""Find copies among training images by their pixels, for the radii of an index."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermis.authenticity.baseline import Copies
from dermis.imaging import decode
from dermis.perceptual_hash import perceptual_hashes
from training.data.duplicates import hash_pairs
from training.data.images import in_threads

HASH_DISTANCE = 6
"""Maximum number of differing bits (of 64) between the hashes of two copies. Copies of 100 images, saved as JPEG 50,
differed in at most 5 bits at full size, and in at most 7 at half the size. Nearest neighbours among 595 different images
differed in at least 14."""
CORRELATION = 0.985
"""Minimum correlation of the pixels (at 32 px) of two copies. Copies that were compressed again reach it (99 of 100 at
JPEG 50); images of different lesions with similar hashes do not."""
MAX_RECOMPRESSED = 256
"""Maximum number of images that are compressed again to measure the distance of a copy to its original."""
_QUALITY, _SIDE = 90, 32


def find_copies(images: NDArray[np.uint8], embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> Copies:
    """Embed copies of some training images that were compressed again, and find pairs with similar hashes.

    Args:
        images: Training images [N, R, R, 3]. Copies are made of up to MAX_RECOMPRESSED of them, at equal intervals.
        embed: Computes features [M, dim] of images uint8 [M, R, R, 3].
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), MAX_RECOMPRESSED)).round().astype(np.int64))
    features = embed(np.stack([recompressed(images[i]) for i in chosen]))
    hashes = np.array(
        list(in_threads(lambda i: perceptual_hashes([images[i]])[0], range(len(images)))), dtype=np.uint64
    )
    pairs = hash_pairs(hashes, HASH_DISTANCE)
    are_copies = [_correlation(images[i], images[j]) >= CORRELATION for i, j in zip(pairs.i, pairs.j, strict=True)]
    return Copies(features, chosen, np.stack([pairs.i, pairs.j], axis=1)[np.array(are_copies, bool)])


def recompressed(image: NDArray[np.uint8], quality: int = _QUALITY) -> NDArray[np.uint8]:
    """An image uint8 [R, R, 3] after it was saved as JPEG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return decode(file.getvalue())


def _correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Pearson's correlation of the pixels of two images at 32 px, after the mean of each channel is subtracted."""
    small = [
        np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
        for image in (a, b)
    ]
    x, y = ((image - image.mean(axis=(0, 1))).ravel() for image in small)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else float(not x.any() and not y.any())
