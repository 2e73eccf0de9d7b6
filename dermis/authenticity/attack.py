"""What an attacker learns who holds the generated images: who was in the training set?

Membership inference by distance: a real image is taken for a training image if a generated one is near to it. Its score is
the negative distance to the nearest generated image; the AUC of training against held-out images is 0.5 for a generator that
tells nothing, and 1 for one that copies. (The black-box attack of Chen et al., arXiv 1909.03935, section 4.2.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Floats, Index, import_faiss

MOST = 10_000  # real images of either kind that are attacked
FEWEST = 20


@dataclass(frozen=True)
class Attack:
    """auc, low and high: of telling training from held-out images, with its 95 % interval."""

    auc: float
    low: float
    high: float
    members: int
    held_out: int

    @property
    def succeeds(self) -> bool:
        """Whether the attack is better than guessing beyond chance."""
        return self.low > 0.5


def attack(members: Floats, held_out: Floats, *, seed: int = 0) -> Attack:
    """The attack, from distances [M] of training and [H] of held-out images to their nearest generated ones.

    ValueError if there are fewer than 20 of either.
    """
    from dermis.metrics.classification import auc, bootstrap  # its package loads torch, which the gateway does without

    if min(len(members), len(held_out)) < FEWEST:
        raise ValueError(f"{len(members)} and {len(held_out)} images; at least {FEWEST} of each are needed")
    labels = np.concatenate([np.ones(len(members), np.int64), np.zeros(len(held_out), np.int64)])
    scores = -np.concatenate([members, held_out]).astype(np.float64)
    estimate = bootstrap(labels, scores, {"auc": auc}, seed=seed)["auc"]
    return Attack(estimate.value, estimate.low, estimate.high, len(members), len(held_out))


def identifiability(radii: Floats, to_generated: Floats) -> float:
    """The share of training images that are nearer to a generated image than to any other training image.

    Yoon et al., "Anonymization through data synthesis using generative adversarial networks (ADS-GAN)", definition 1; both
    [N]. The more generated images, the larger it is; compare sets of the size of the training set.
    """
    return float((to_generated < radii).mean())


class NearestGenerated:
    """The distance of each of some real images to the nearest of all generated ones, which come in pieces."""

    def __init__(self, real: Floats) -> None:
        self._real = np.ascontiguousarray(real, np.float32)
        self.distances: Floats = np.full(len(real), np.inf, np.float32)

    def add(self, generated: Floats) -> None:
        """Generated images' embeddings [N, dim], in the space of the real ones."""
        if len(generated):
            squared, _ = import_faiss().knn(self._real, np.ascontiguousarray(generated, np.float32), 1)
            self.merge(np.sqrt(np.maximum(squared[:, 0], 0)))

    def merge(self, distances: NDArray[np.floating]) -> None:
        """Distances [M] that another piece of work has found."""
        self.distances = np.minimum(self.distances, distances.astype(np.float32))


def attacked(count: int, *, most: int = MOST) -> NDArray[np.int64]:
    """Numbers of the real images that are attacked: all, or so many evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


@dataclass(frozen=True)
class Exposure:
    """What a set of generated images tells of the training set."""

    identifiability: float
    """0..1: the share of training images that are nearer to a generated image than to any other training image."""
    attack: Attack | None
    """Membership inference; None where the index has no held-out images."""


def exposure(index: Index, generated: Floats) -> Exposure:
    """Identifiability and the attack, of generated images' embeddings [N, dim] in the index's space.

    Of at most 10,000 training images and as many held-out ones, evenly chosen.
    """
    chosen = attacked(index.description.vectors)
    members = nearest_generated(index.stored(chosen), [generated])
    found = None
    if index.held_out is not None and min(len(index.held_out), len(chosen)) >= FEWEST:
        others = index.held_out[attacked(len(index.held_out))]
        found = attack(members, nearest_generated(others, [generated]))
    return Exposure(identifiability(index.radii[chosen], members), found)


def nearest_generated(real: Floats, generated: Iterable[Floats]) -> Floats:
    """Distances [M] of real embeddings [M, dim] to the nearest generated ones."""
    found = NearestGenerated(real)
    for piece in generated:
        found.add(piece)
    return found.distances
