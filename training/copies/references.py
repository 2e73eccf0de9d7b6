"""Descriptors of the training images that a copy detector recognises, and the order of the numbers in a descriptor."""

from __future__ import annotations

import copy

import numpy as np
import torch

from dermis.authenticity.copy_detector import Describe, mean_descriptors
from dermis.authenticity.copy_network import CopyNetwork
from dermis.authenticity.copy_references import References, normalised
from dermis.authenticity.index import Floats
from dermis.authenticity.transformations import Transformation, crop, grey, turned
from dermis.imaging import Images
from training.copies.views import view_of

VIEWS = 12
"""Random views of each of two kinds that a reference is the mean of, besides the eight orientations in colour and in grey."""
_BATCH = 32


def references_of(describe: Describe, images: Images, seed: int) -> References:
    """Describe training images.

    The descriptor of a whole image is the mean of three: of the eight orientations in colour and in grey, of random crops, of
    which every second one is grey, and of random views as in the training. That of a half is the mean of the orientations.

    Args:
        describe: Computes descriptors.
        images: uint8 [N, R, R, 3].
        seed: Seed of the random views.
    """
    rng = np.random.default_rng([seed, 3])
    whole, halves = [], []
    for start in range(0, len(images), _BATCH):
        rows = images[start : start + _BATCH]
        colour = mean_descriptors(describe, rows)
        without = mean_descriptors(describe, np.stack([grey(row, rng) for row in rows]))
        views = [_mean_of(describe, rows, view, rng) for view in (cropped, view_of)]
        oriented = normalised(colour.whole + without.whole)
        whole.append(normalised(oriented + views[0] + views[1]))
        halves.append(normalised(colour.halves + without.halves))
    return References(np.concatenate(whole), np.concatenate(halves))


def cropped(image: Images, rng: np.random.Generator) -> Images:
    """Crop an image to 75 to 100 % of its side in a random orientation, in colour or in grey."""
    view = turned(image[:, ::-1] if rng.random() < 0.5 else image, int(rng.integers(0, 4)))
    view = crop(view, rng, share=rng.uniform(0.75, 1.0))
    return np.ascontiguousarray(grey(view, rng) if rng.random() < 0.5 else view)


def with_ordered_descriptors(network: CopyNetwork, describe: Describe, images: Images) -> CopyNetwork:
    """Return a network whose descriptors are rotated so that their first numbers have the largest variance.

    Similarities of whole descriptors do not change.

    Args:
        network: The network.
        describe: Computes its descriptors.
        images: uint8 [N, R, R, 3]. The axes are the principal ones of the descriptors of these images and their halves.
    """
    rows = [describe(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
    vectors = np.concatenate(rows).reshape(-1, network.projection.out_features).astype(np.float64)
    _, axes = np.linalg.eigh(vectors.T @ vectors)
    rotation = torch.from_numpy(axes[:, ::-1].T.copy())
    ordered = copy.deepcopy(network)
    projection = ordered.projection
    with torch.no_grad():
        projection.weight.copy_(rotation @ projection.weight.double())
        projection.bias.copy_(rotation @ projection.bias.double())
    return ordered


def _mean_of(describe: Describe, rows: Images, view: Transformation, rng: np.random.Generator) -> Floats:
    total = sum(
        (describe(np.stack([view(row, rng) for row in rows]))[:, 0] for _ in range(VIEWS)),
        start=np.float32(0),
    )
    return normalised(np.asarray(total, np.float32))
