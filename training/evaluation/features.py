"""Features of real images, kept between runs, and labels of generated images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.features import FeatureExtractor
from training.data.cache import new_array, read_array
from training.data.embedding import embed_array, progress_bar
from training.data.images import DECODER_VERSION, ImageDataset

BATCH = 32


def real_features(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache: Path | None = None,
    *,
    bar: tqdm | None = None,
) -> NDArray[np.float32]:
    """Features [N, dim] of all images of a data set.

    The key in the cache consists of the content of the data set (ids, classes and files), the resolution, and the identity
    of the extractor (its weights and its resizing), that is, of everything that the features depend on.

    Args:
        dataset: The images.
        extractor: The feature space.
        cache: Folder for features.
        bar: Counts the images that are embedded.
    """
    key = hashlib.sha256(
        f"{dataset.sha256}/{dataset.resolution}/{extractor.identity}/{DECODER_VERSION}".encode()
    ).hexdigest()
    file = None if cache is None else cache / f"features-{key[:24]}.npy"
    shape = (len(dataset.labels), extractor.dim)
    bar = progress_bar(len(dataset.labels), "embedding", disable=True) if bar is None else bar
    if file is not None and (kept := read_array(file, shape)) is not None:
        bar.total -= len(kept)  # they take no time and would distort the remaining time of the others
        bar.refresh()
        return kept
    features = embed_array(dataset.images, extractor.extract, bar)
    if file is not None:
        with new_array(file, shape, np.float32) as array:
            array[:] = features
    return features


def labels_in_proportion(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` labels, sorted, with the classes in the proportions of `labels`, so that proportions add to no distance."""
    result: NDArray[np.int64] = np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(int)]
    return result
