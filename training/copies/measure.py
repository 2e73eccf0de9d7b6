"""Measure a copy detector: the share of changed copies that it finds, and the share of other images that it calls copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.transformations import JOINS, TRANSFORMATIONS, combined, turned
from dermis.authenticity.verdict import COPY
from dermis.imaging import Images

Score = Callable[[Images], NDArray[np.float32]]
"""Images uint8 [N, R, R, 3] -> scores [N]."""

COMBINED = "two of these, drawn at random"
UNCHANGED = "unchanged"


def changed_copies(images: Images, others: Images, count: int, seed: int) -> Iterator[tuple[str, Images]]:
    """Yield every kind of change by name, with changed copies uint8 [count, R, R, 3] of randomly drawn images.

    An image is joined with another one of `images`, of which either can be recognised, and with one of `others`.

    Args:
        images: Images uint8 [N, R, R, 3] that are to be recognised.
        others: Images uint8 [M, R, R, 3] that are not.
        count: Copies of each kind.
        seed: Seed of everything random. The copies of one kind do not depend on the other kinds.
    """
    drawn = np.random.default_rng([seed, 0]).choice(len(images), min(count, len(images)), replace=False)
    yield UNCHANGED, images[drawn]
    functions = {**TRANSFORMATIONS, COMBINED: combined}
    for number, (name, function) in enumerate(functions.items(), 1):
        rng = np.random.default_rng([seed, number])
        yield name, np.stack([np.ascontiguousarray(function(images[k], rng)) for k in drawn])
    joined = [
        *((f"{name}, of two training images", join, images) for name, join in JOINS.items()),
        *((f"{name} with a new image", join, others) for name, join in JOINS.items()),
    ]
    for number, (name, join, partners) in enumerate(joined, 1 + len(functions)):
        rng = np.random.default_rng([seed, number])
        chosen = rng.choice(len(partners), len(drawn))
        turns = rng.integers(0, 4, len(drawn))
        copies = [
            turned(join(images[k], partners[other]), int(turn))
            for k, other, turn in zip(drawn, chosen, turns, strict=True)
        ]
        yield name, np.stack(copies)


def measure(score: Score, known: Images, others: Images, *, count: int, seed: int = 0) -> Mapping[str, Any]:
    """Measure a detector.

    Args:
        score: Scores of the detector.
        known: Images uint8 [N, R, R, 3] among its references.
        others: Real images uint8 [M, R, R, 3] that are not.
        count: Copies of each kind of change.
        seed: Seed of the changes.

    Returns:
        Numbers of images, the share of false alarms, and the share of found copies by kind of change.
    """
    false_alarms = float((score(others) >= COPY).mean())
    found = {
        name: round(float((score(copies) >= COPY).mean()), 4)
        for name, copies in changed_copies(known, others, count, seed)
    }
    return {
        "images": min(count, len(known)),
        "others": len(others),
        "false_alarms": round(false_alarms, 4),
        "found": found,
    }
