"""Find copies among training images by their pixels, for the radii of an index."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dermis.authenticity.baseline import Copies
from training.data.duplicates import hash_pairs, perceptual_hashes
from training.data.images import in_threads

HASH_DISTANCE = 6
"""Of 64 bits. Copies of 100 images, re-compressed at full size to JPEG 50, differed in at most 5, at half the size in at
most 7; of 595 different images of the shared collection no nearest neighbours differ in fewer than 14."""
CORRELATION = 0.985
"""Of the two images' pixels at 32 px. Re-compressed copies reach it (at JPEG 50: 99 of 100 do), drawn pictures of different
lesions with nearly the same hash do not."""
MEASURED = 256
"""Images that are re-compressed to learn how far a copy is from its original."""
_QUALITY, _SIDE = 90, 32


def find_copies(images: NDArray[np.uint8], embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]]) -> Copies:
    """Embeddings of evenly chosen, re-compressed images of images [N, R, R, 3], and pairs with nearly the same hash.

    embed: uint8 [M, R, R, 3] -> features [M, dim].
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), MEASURED)).round().astype(np.int64))
    features = embed(np.stack([recompressed(images[i]) for i in chosen]))
    hashes = np.array(
        list(in_threads(lambda i: perceptual_hashes([images[i]])[0], range(len(images)))), dtype=np.uint64
    )
    pairs = hash_pairs(hashes, HASH_DISTANCE)
    alike = [_correlation(images[i], images[j]) >= CORRELATION for i, j in zip(pairs.i, pairs.j, strict=True)]
    return Copies(features, chosen, np.stack([pairs.i, pairs.j], axis=1)[np.array(alike, bool)])


def recompressed(image: NDArray[np.uint8], quality: int = _QUALITY) -> NDArray[np.uint8]:
    """uint8 [R, R, 3] as it comes back from a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as again:
        return np.asarray(again.convert("RGB"))


def _correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Pearson's, of the pixels of two images at 32 px, the mean of each channel taken away."""
    small = [
        np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX), dtype=np.float64)
        for image in (a, b)
    ]
    x, y = ((image - image.mean(axis=(0, 1))).ravel() for image in small)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else float(not x.any() and not y.any())
