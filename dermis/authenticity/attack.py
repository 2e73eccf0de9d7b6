"""Membership inference by distance: disclosure of the training set by generated images.

The attacker, who has only generated images, classifies a real image as a training image if a generated one is near it. Its
score is the negative distance to the nearest generated image. The AUC of training against held-out images is 0.5 for a
generator that discloses nothing, and 1 for one that copies. (The black-box attack of Chen et al., arXiv 1909.03935, section
4.2.)

An index does not say which images are of one patient, so intervals count images as independent, and nothing is concluded
from them. `dermis.privacy` attacks with patients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Floats, Index, import_faiss

MAX_ATTACKED_IMAGES = 10_000  # largest number of training images, and of held-out images, in an attack
MIN_IMAGES = 20  # images of each kind that an attack needs
INTERVAL = "The interval counts images as independent, so it is too narrow if patients have several images"


@dataclass(frozen=True)
class Attack:
    """Result of an attack.

    Attributes:
        auc: AUC of training against held-out images.
        low: Lower end of its 95 % interval, which counts images as independent.
        high: Upper end of this interval.
        members: Number of training images.
        held_out: Number of held-out images.
    """

    auc: float
    low: float
    high: float
    members: int
    held_out: int


def attack(members: Floats, held_out: Floats, *, seed: int = 0) -> Attack:
    """Measure how well distances separate training images from held-out ones.

    The interval is too narrow if patients have several images, as every image is resampled by itself.

    Args:
        members: Distances [M] of training images to the nearest generated image.
        held_out: Distances [H] of held-out images to the nearest generated image.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: There are fewer than 20 of either.
    """
    from dermis.metrics.classification import (  # its package imports torch, which the gateway does not need
        auc,
        bootstrap,
    )

    if min(len(members), len(held_out)) < MIN_IMAGES:
        raise ValueError(f"{len(members)} and {len(held_out)} images; at least {MIN_IMAGES} of each are needed")
    labels = _labels(len(members), len(held_out))
    scores = -np.concatenate([members, held_out]).astype(np.float64)
    weights = _resampled(len(members), len(held_out), seed)
    estimate = bootstrap(labels, scores, {"auc": auc}, seed=seed, weights=weights)["auc"]
    return Attack(estimate.value, estimate.low, estimate.high, len(members), len(held_out))


def _labels(members: int, held_out: int) -> NDArray[np.int64]:
    return np.concatenate([np.ones(members, np.int64), np.zeros(held_out, np.int64)])


@functools.lru_cache(maxsize=1)
def _resampled(members: int, held_out: int, seed: int) -> NDArray[np.uint8]:
    """The replicates of the bootstrap, which are those of every dataset and take more time than all else."""
    from dermis.metrics.classification import REPLICATES, resampled

    return resampled(_labels(members, held_out), None, REPLICATES, seed).astype(np.uint8)


def identifiability(radii: Floats, to_generated: Floats) -> float:
    """Return the share of training images that are nearer to a generated image than to any other training image.

    Yoon et al., "Anonymization through data synthesis using generative adversarial networks (ADS-GAN)", definition 1. It
    grows with the number of generated images; compare sets of the size of the training set.

    Args:
        radii: Distance [N] of each training image to the nearest other training image.
        to_generated: Distance [N] of each training image to the nearest generated image.
    """
    return float((to_generated < radii).mean())


class NearestGenerated:
    """Distances of real images to the nearest generated image, which is searched in parts.

    Args:
        real: Embeddings [M, dim] of the real images.
    """

    def __init__(self, real: Floats) -> None:
        self._real = np.ascontiguousarray(real, np.float32)
        self.distances: Floats = np.full(len(real), np.inf, np.float32)

    def add(self, generated: Floats) -> None:
        """Take embeddings [N, dim] of further generated images into account."""
        if len(generated):
            squared, _ = import_faiss().knn(self._real, np.ascontiguousarray(generated, np.float32), 1)
            self.merge(np.sqrt(np.maximum(squared[:, 0], 0)))

    def merge(self, distances: NDArray[np.floating]) -> None:
        """Take distances [M] to other generated images into account."""
        self.distances = np.minimum(self.distances, distances.astype(np.float32))


def evenly_spaced_indices(count: int, *, most: int = MAX_ATTACKED_IMAGES) -> NDArray[np.int64]:
    """Return the indices of the real images to attack: all, or `most` evenly spaced ones."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


@dataclass(frozen=True)
class Exposure:
    """Disclosure of the training set by a set of generated images."""

    identifiability: float
    """0..1: the share of training images that are nearer to a generated image than to any other training image."""
    attack: Attack | None
    """Membership inference; None if the index has no held-out images."""


def exposure(index: Index, generated: Floats | Iterable[Floats]) -> Exposure:
    """Measure identifiability and the attack.

    At most 10,000 training images and as many held-out ones are used, evenly chosen.

    Args:
        index: The index of the training images.
        generated: Embeddings [N, dim] of generated images in the space of the index, or pieces of them.
    """
    chosen = evenly_spaced_indices(index.description.vectors)
    members, others = NearestGenerated(index.stored(chosen)), None
    if index.held_out is not None and min(len(index.held_out), len(chosen)) >= MIN_IMAGES:
        others = NearestGenerated(index.held_out[evenly_spaced_indices(len(index.held_out))])
    for piece in [generated] if isinstance(generated, np.ndarray) else generated:
        members.add(piece)
        if others is not None:
            others.add(piece)
    result = None if others is None else attack(members.distances, others.distances)
    return Exposure(identifiability(index.radii[chosen], members.distances), result)


def nearest_generated(real: Floats, generated: Iterable[Floats]) -> Floats:
    """Return the distance [M] of each real embedding to its nearest generated embedding.

    Args:
        real: Embeddings [M, dim] of real images.
        generated: Batches [N, dim] of embeddings of generated images.
    """
    nearest = NearestGenerated(real)
    for piece in generated:
        nearest.add(piece)
    return nearest.distances
