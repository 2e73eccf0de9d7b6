"""Detection of changed copies: training images that were mirrored, cropped, recoloured, painted over or joined.

detector = CopyDetector("bundles/demo")
detector.scores(images) >= COPY  # uint8 [N, R, R, 3]

The network gives a descriptor of the image and of each of its halves (`dermis.authenticity.copy_network`). The margin of a
descriptor is its cosine similarity to the most similar training image, minus half the mean of its similarities to those of
ranks 11 to 20. The subtraction is the score normalisation of Pizzi et al. (arXiv 2202.10261, section 3.4), with the training
images themselves as background: an ordinary image, which is similar to many training images, gets a small margin. The score of
an image is the larger one of the margin of the whole image and the largest margin of its halves, each divided by its threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Floats, products_of_matrices, search
from dermis.authenticity.verdict import FALSE_ALARMS
from dermis.bundle import find_part
from dermis.bundle.copies import COPIES_PART, REFERENCES, WEIGHTS, open_copies_folder
from dermis.bundle.index import Kind
from dermis.cpus import available_cpus
from dermis.errors import BundleError
from dermis.imaging import Images
from dermis.tensor_files import read_array

if TYPE_CHECKING:
    from dermis.authenticity.copy_network import CopyNetwork
    from dermis.bundle import Bundle

Describe = Callable[[Images], Floats]
"""Square images uint8 [N, R, R, 3] -> descriptors float32 [N, regions, dim]."""

BACKGROUND = slice(10, 20)
"""Ranks, from 0, of the training images that give the background similarity. A lesion with ten images has a margin, too."""
BACKGROUND_WEIGHT = 0.5
"""Share of the background similarity that is subtracted. 0.5 to 0.75 found most copies of dermoscopic images; 0 and 1 fewer."""
MIN_REFERENCES = BACKGROUND.stop
_SHARE_OF_WHOLE = 0.7  # of the false alarms; the rest is left to the halves
_STEPS = 127  # of the stored numbers in 0..1
_LEAST_LENGTH = _STEPS / 2  # of a stored descriptor; rounding changes the length of one by much less
_SCORE_DECIMALS = 3
_BATCH = 32


class CopySearch:
    """Margins of descriptors against the descriptors of the training images. Safe to call from several threads.

    Args:
        references: int8 [R, dim], in steps of 1/127.
        threads: CPU cores to use.
    """

    def __init__(self, references: NDArray[np.int8], threads: int) -> None:
        from dermis.authenticity.build import EXACT, GRAPH, new_index  # imports scipy, which the gateway does not need

        vectors = references.astype(np.float32)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1.0)
        count = len(vectors)
        kind: Kind = "flat" if count <= EXACT else "hnsw" if count <= GRAPH else "ivf"
        self._index = new_index(kind, vectors.shape[1], "float", count)
        with products_of_matrices():
            self._index.train(vectors)
            self._index.add(vectors)
        self._threads = threads

    def margins(self, descriptors: Floats) -> Floats:
        """Return the margins [N, regions] of descriptors [N, regions, dim]."""
        rows = np.ascontiguousarray(descriptors.reshape(-1, descriptors.shape[-1]))
        squared, _ = search(self._index, rows, BACKGROUND.stop, self._threads)
        similarities = 1 - squared / 2  # of vectors of length 1
        margins = similarities[:, 0] - BACKGROUND_WEIGHT * similarities[:, BACKGROUND].mean(axis=1)
        by_region: Floats = margins.reshape(descriptors.shape[0], descriptors.shape[1])
        return by_region


def margins_of(describe: Describe, search: CopySearch, images: Images) -> Floats:
    """Return the margins [N, regions] of square images uint8 [N, R, R, 3], N at least 1, which are described in batches."""
    parts = [search.margins(describe(images[start : start + _BATCH])) for start in range(0, len(images), _BATCH)]
    return np.concatenate(parts)


def scores_of(margins: Floats, whole_threshold: float, half_threshold: float) -> Floats:
    """Return the scores [N] of margins [N, regions], rounded to three decimals."""
    whole, halves = margins[:, 0] / whole_threshold, margins[:, 1:].max(axis=1) / half_threshold
    scores: Floats = np.round(np.maximum(whole, halves), _SCORE_DECIMALS).astype(np.float32)
    return scores


def calibrate(margins: Floats, false_alarms: float = FALSE_ALARMS) -> tuple[float, float]:
    """Choose thresholds so that this share of other images is called a copy.

    Args:
        margins: Margins [N, regions] of real images that are not among the training images.
        false_alarms: Share of these images that may have a score of at least 1.

    Returns:
        The thresholds of the whole image and of its halves.
    """
    whole, halves = margins[:, 0], margins[:, 1:].max(axis=1)
    first = float(np.quantile(whole, 1 - _SHARE_OF_WHOLE * false_alarms))
    second = float(np.quantile(halves, 1 - (1 - _SHARE_OF_WHOLE) * false_alarms))
    scale = float(np.quantile(np.maximum(whole / first, halves / second), 1 - false_alarms, method="higher"))
    scale += 10.0**-_SCORE_DECIMALS  # scores are rounded
    return first * scale, second * scale


def describer(network: CopyNetwork, size: int, *, device: str = "cpu", threads: int | None = None) -> Describe:
    """Make the function that computes descriptors, with OpenVINO on a CPU if it is installed.

    Args:
        network: The network.
        size: Side in px to which images are resized.
        device: "auto", "cpu" or a CUDA device.
        threads: CPU cores to use; None for all that this process can use.
    """
    import torch

    from dermis.authenticity.copy_network import REGIONS
    from dermis.devices import resolve_device
    from dermis.features import bicubic, resize_matrix, torch_extract
    from dermis.features_openvino import Extract, OpenvinoFeatures, have_openvino

    target = resolve_device(device)
    network = network.to(target).eval()
    half = torch.full((3, 1, 1), 127.5)
    extract: Extract = torch_extract(
        lambda images: network(bicubic(images, (size, size)).clamp(0, 255) / 127.5 - 1), target
    )
    if target.type == "cpu" and have_openvino():
        matrix = partial(resize_matrix, bicubic)
        extract = OpenvinoFeatures(network, (size, size), matrix, half, half, extract, threads=threads)
    shape = (len(REGIONS), network.projection.out_features)
    return lambda images: extract(images).reshape(len(images), *shape)


def references_of(describe: Describe, images: Images) -> NDArray[np.int8]:
    """Compute the stored descriptors int8 [N, dim] of training images uint8 [N, R, R, 3].

    A stored descriptor is the mean of the descriptors of the eight views of an image that mirroring and quarter turns give.
    """
    parts = []
    for start in range(0, len(images), _BATCH):
        rows = images[start : start + _BATCH]
        turned = [np.rot90(rows, turns, axes=(1, 2)) for turns in range(4)]
        views = [view for each in turned for view in (each, each[:, :, ::-1])]
        total = np.sum([describe(np.ascontiguousarray(view))[:, 0] for view in views], axis=0)
        parts.append(np.round(total / np.linalg.norm(total, axis=1, keepdims=True) * _STEPS).astype(np.int8))
    return np.concatenate(parts)


class CopyDetector:
    """A loaded copy detector. Safe to call from several threads. The score of an image does not depend on other images.

    Args:
        source: A bundle, or the folder or fsspec URL of a bundle or of a copy detector.
        device: "auto", "cpu" or a CUDA device.
        threads: CPU cores to use; None for all that this process can use.

    Raises:
        BundleError: There is no copy detector, or it is damaged.
    """

    def __init__(self, source: Bundle | str | Path, *, device: str = "auto", threads: int | None = None) -> None:
        from dermis.authenticity.copy_network import network_from

        where = find_copies(source)
        folder, self.description, _ = open_copies_folder(where)
        known = None if isinstance(source, str | Path) else source.copies
        if known is not None and known.digest != self.description.digest:
            raise BundleError(f"{where}: was changed since the bundle was opened; try again")
        weights = folder.read(WEIGHTS, self.description.files[WEIGHTS])
        network = network_from(weights, self.description.dim, f"{where}/{WEIGHTS}")
        references = folder.read(REFERENCES, self.description.files[REFERENCES])
        shape = (self.description.references, self.description.dim)
        stored: NDArray[np.int8] = read_array(references, f"{where}/{REFERENCES}", shape, ("|i1",))
        if self.description.references < MIN_REFERENCES:
            raise BundleError(
                f"{where}: has {self.description.references} references; at least {MIN_REFERENCES} are needed"
            )
        if (np.linalg.norm(stored.astype(np.float32), axis=1) < _LEAST_LENGTH).any():
            raise BundleError(
                f"{where}/{REFERENCES}: has descriptors whose length is not near {_STEPS}; train it again"
            )
        self._describe = describer(network, self.description.size, device=device, threads=threads)
        self._search = CopySearch(stored, threads or available_cpus())

    @property
    def identity(self) -> Mapping[str, str]:
        """The detector: scores depend on it, the libraries, the images and the kind of machine."""
        return {"copies": self.description.digest}

    def scores(self, images: Images) -> Floats:
        """Compute scores float32 [N] of square images uint8 [N, R, R, 3]; an image is a copy from 1.0 on."""
        if not len(images):
            return np.empty(0, np.float32)
        margins = margins_of(self._describe, self._search, images)
        return scores_of(margins, self.description.whole_threshold, self.description.half_threshold)


def find_copies(source: Bundle | str | Path) -> str:
    """Return the folder of the copy detector of a bundle, or of one outside of a bundle.

    Raises:
        BundleError: The bundle has no copy detector.
    """
    return find_part(source, COPIES_PART, "has no copy detector; train one: dermis train copy-detector")
