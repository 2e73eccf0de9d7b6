"""Features of real images, computed once for a data set and a feature space, and of generated ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.features import FeatureExtractor
from dermis.synthesizer import Synthesizer
from training.data.cache import new_array, read_array
from training.data.isic import ImageDataset

BATCH = 32


def real_features(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    cache: Path | None = None,
    *,
    name: str = "real images",
    progress: bool = True,
) -> NDArray[np.float32]:
    """Features [N, dim] of all images, from the cache if it has them.

    The key is the content of the data set (ids, classes and files), the resolution, and the identity of the extractor
    (its weights and its resizing), so nothing that changes a feature can leave a stale one behind.
    """
    key = hashlib.sha256(f"{dataset.sha256}/{dataset.resolution}/{extractor.identity}".encode()).hexdigest()
    file = None if cache is None else cache / f"features-{key[:24]}.npy"
    shape = (len(dataset.labels), extractor.dim)
    if file is not None and (found := read_array(file, shape)) is not None:
        return found
    starts = tqdm(range(0, len(dataset.labels), BATCH), name, unit="batch", disable=not progress)
    features = extractor.over(dataset.images[i : i + BATCH] for i in starts)
    if file is not None:
        with new_array(file, shape, np.float32) as array:
            array[:] = features
    return features


def generated_features(
    synthesizer: Synthesizer,
    labels: NDArray[np.int64],
    extractor: FeatureExtractor,
    *,
    seed: int = 0,
    truncation_psi: float = 1.0,
) -> NDArray[np.float32]:
    """Features [N, dim] of samples 0 ... N - 1 of the seed, sample i of class labels[i] (zeros if unconditional)."""

    def batches() -> Iterator[NDArray[np.uint8]]:
        for start in tqdm(range(0, len(labels), BATCH), "generated images", unit="batch"):
            indices = list(range(start, min(start + BATCH, len(labels))))
            classes = labels[indices].tolist()
            yield synthesizer.images([seed] * len(indices), indices, classes, truncation_psi=truncation_psi)

    return extractor.over(batches())


def labels_in_proportion(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """`count` labels, sorted, with the classes as they are mixed in `labels`, so that the mix adds to no distance."""
    mixed: NDArray[np.int64] = np.sort(labels)[np.linspace(0, len(labels) - 1, count).round().astype(int)]
    return mixed
