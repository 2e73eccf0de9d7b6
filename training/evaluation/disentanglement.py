"""What a direction does: how far does it move what it is for, and how far everything else?

Latents are moved by plus and minus the same strength, and the images' attributes read before and after. Effects are in standard
deviations of each attribute over the unmoved images, so that they can be compared; of identity in the mean distance between two
different images, so that 1 means as different as a stranger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """What is read off N images."""

    attributes: Mapping[str, Floats]
    """By name, [N]: scores of detectors, logits of a classifier."""
    features: Floats
    """[N, D], by which images are recognised."""


@dataclass(frozen=True)
class Effect:
    """What one direction does at one strength."""

    direction: str
    strength: float
    moves: Mapping[str, float]
    """By attribute: mean change from -strength to +strength, halved, in its standard deviations."""
    identity: float
    """Mean cosine distance of a moved image from the unmoved one, over that between two different unmoved images."""

    def purity(self, attribute: str) -> float:
        """0..1: the share of this attribute in all that moves (in absolute value); 0 if nothing does."""
        total = sum(abs(move) for move in self.moves.values())
        return abs(self.moves[attribute]) / total if total else 0.0


@dataclass(frozen=True)
class Removal:
    """What one direction does to images that have something, such as a frame."""

    direction: str
    strength: float
    gone: float
    """Share of images that no longer have it."""
    moves: Mapping[str, float]
    """By attribute: mean change in standard deviations over unselected images."""
    identity: float


def effect(direction: str, strength: float, base: Readings, minus: Readings, plus: Readings) -> Effect:
    """The effect of a direction from readings of the same latents: unmoved, at -strength and at +strength."""
    spread = spreads(base)
    moves = {
        name: float((plus.attributes[name] - minus.attributes[name]).mean() / 2 / spread[name]) if spread[name] else 0.0
        for name in base.attributes
    }
    strangers = stranger_distance(base.features)
    moved = [_cosine(base.features, each.features).mean() for each in (minus, plus)]
    return Effect(direction, strength, moves, float(np.mean(moved) / strangers) if strangers else 0.0)


def removal(
    direction: str,
    strength: float,
    attribute: str,
    threshold: float,
    before: Readings,
    after: Readings,
    spread: Mapping[str, float],
    strangers: float,
) -> Removal:
    """What a move does to images that have `attribute`: at least at `threshold`. spread and strangers are of usual images."""
    moves = {
        name: float((after.attributes[name] - before.attributes[name]).mean() / spread[name]) if spread[name] else 0.0
        for name in before.attributes
    }
    gone = float((after.attributes[attribute] < threshold).mean())
    identity = float(_cosine(before.features, after.features).mean() / strangers) if strangers else 0.0
    return Removal(direction, strength, gone, moves, identity)


def spreads(base: Readings) -> dict[str, float]:
    """Standard deviation of each attribute."""
    return {name: float(values.std()) for name, values in base.attributes.items()}


def stranger_distance(features: Floats) -> float:
    """Mean cosine distance of two different images: of each and the one after it."""
    return float(_cosine(features, np.roll(features, 1, axis=0)).mean())


def _cosine(a: Floats, b: Floats) -> Floats:
    found: Floats = 1 - (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1) + 1e-12)
    return found
