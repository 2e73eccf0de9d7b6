"""How much of what a direction changes is what it is meant to change; and which directions take something away.

The same latents are looked at before and after a move, so every change is paired. Attributes come in units of their own
standard deviation over unedited samples. Directions drawn at random are the control: what any move of that length does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.bundle.directions import Direction
from dermis.directions.edit import Edit, apply_edits
from training.data.artefacts import wilson_interval

Floats = NDArray[np.float64]
Ws = NDArray[np.float32]

CLEAR = 2.0  # standard errors that a shift must be from nothing to be called one
ENOUGH = 0.9  # share of the images from which something must vanish for a move to count as removing it


@dataclass(frozen=True)
class Readings:
    """What is seen in N images: float64 [N] by attribute, and features float32 [N, D] (D is 0 without a classifier)."""

    attributes: Mapping[str, Floats]
    features: NDArray[np.float32]


Look = Callable[[Ws], Readings]
"""Draws style vectors [N, num_ws, w_dim] and reads the images."""


@dataclass(frozen=True)
class Units:
    """Standard deviation of each attribute over unedited samples (0: always the same), and what a change of identity is
    compared with: the mean cosine distance between two different samples (0: without features)."""

    deviations: Mapping[str, float]
    identity: float


@dataclass(frozen=True)
class Shift:
    """Change of one attribute, in standard deviations. value: half of plus less minus; error: its standard error."""

    value: float
    error: float
    plus: float
    minus: float

    @property
    def clear(self) -> bool:
        """Whether it is more than chance: twice its standard error."""
        return abs(self.value) > CLEAR * self.error


@dataclass(frozen=True)
class Effect:
    """What a direction does at plus and minus a strength. identity: 0 the same image, 1 as far as another sample."""

    direction: str
    strength: float
    shifts: Mapping[str, Shift]
    identity: float | None

    @property
    def most_moved(self) -> str | None:
        """The attribute with the greatest clear shift, if any is clear."""
        clear = [name for name, shift in self.shifts.items() if shift.clear]
        return max(clear, key=lambda name: abs(self.shifts[name].value), default=None)

    def share(self, attribute: str) -> float | None:
        """Of all that the attributes move, how much is this one: 1 perfectly disentangled; None if nothing moves."""
        total = sum(abs(shift.value) for shift in self.shifts.values())
        return abs(self.shifts[attribute].value) / total if total and attribute in self.shifts else None


@dataclass(frozen=True)
class Removal:
    """What a move does to images that have something. share: of them, those that have it no longer; 95 % by Wilson.

    others: mean change of every other attribute, in standard deviations. confirmed: the share among the half of the
    images by which the best move is not chosen.
    """

    direction: str
    strength: float
    removed: int
    images: int
    low: float
    high: float
    chosen_by: float
    confirmed: float
    others: Mapping[str, float]
    identity: float | None

    @property
    def share(self) -> float:
        return self.removed / self.images


def units_of(readings: Readings) -> Units:
    """Of unedited samples, at least two."""
    features = _unit(readings.features)
    count, identity = len(features), 0.0
    if features.shape[1]:
        total = features.sum(axis=0)
        identity = float(
            1 - (total @ total - count) / (count * (count - 1))
        )  # mean over all pairs of different samples
    return Units({name: float(np.std(values, ddof=1)) for name, values in readings.attributes.items()}, identity)


def measure_effects(
    ws: Ws, directions: Sequence[Direction], strength: float, before: Readings, units: Units, look: Look
) -> Iterator[Effect]:
    """An effect for each direction, as each is measured. `before` is what is seen in ws [N, num_ws, w_dim], N >= 2.

    Attributes that are the same in every unedited sample have no unit and are left out.
    """
    for direction in directions:
        plus, minus = (look(_moved(ws, direction, sign * strength)) for sign in (1, -1))
        shifts = {}
        for name, deviation in units.deviations.items():
            if deviation > 0:
                up = (plus.attributes[name] - before.attributes[name]) / deviation
                down = (minus.attributes[name] - before.attributes[name]) / deviation
                half = (up - down) / 2
                error = float(half.std(ddof=1) / len(half) ** 0.5)
                shifts[name] = Shift(float(half.mean()), error, float(up.mean()), float(down.mean()))
        apart = [_apart(before, after, units) for after in (plus, minus)]
        identity = None if apart[0] is None or apart[1] is None else (apart[0] + apart[1]) / 2
        yield Effect(direction.name, strength, shifts, identity)


def measure_removals(
    ws: Ws,
    attribute: str,
    threshold: float,
    directions: Sequence[Direction],
    strengths: Sequence[float],
    before: Readings,
    units: Units,
    look: Look,
) -> Iterator[Removal]:
    """What every direction and strength does to ws [N, num_ws, w_dim] of images whose attribute is at least the threshold.

    ValueError if there are fewer than two, or one does not have it.
    """
    if len(ws) < 2 or (before.attributes[attribute] < threshold).any():
        raise ValueError(f"needs two images or more, all with the attribute {attribute}")
    for direction in directions:
        for strength in strengths:
            after = look(_moved(ws, direction, strength))
            gone = after.attributes[attribute] < threshold
            low, high = wilson_interval(int(gone.sum()), len(gone))
            others = {
                name: float((after.attributes[name] - before.attributes[name]).mean() / deviation)
                for name, deviation in units.deviations.items()
                if name != attribute and deviation > 0
            }
            yield Removal(
                direction.name,
                strength,
                int(gone.sum()),
                len(gone),
                low,
                high,
                float(gone[::2].mean()),
                float(gone[1::2].mean()),
                others,
                _apart(before, after, units),
            )


def best_removal(removals: Sequence[Removal]) -> Removal:
    """Of the moves that remove it from 90 % of every second image, the one that changes least else; if there is none, the
    one that removes most. Least: in identity, where that is known, else in the other attributes."""

    def price(removal: Removal) -> float:
        return removal.identity if removal.identity is not None else sum(map(abs, removal.others.values()))

    if enough := [removal for removal in removals if removal.chosen_by >= ENOUGH]:
        return min(enough, key=price)
    return max(removals, key=lambda removal: (removal.chosen_by, -price(removal)))


def random_directions(w: Ws, labels: NDArray[np.int64], count: int, *, num_ws: int, seed: int) -> list[Direction]:
    """Controls: unit vectors that are drawn as w [N, w_dim] itself is spread within its classes, and so are about as long a
    way for an image as the directions that were found.

    Their method says "ganspace", as a file knows no word for them; they are never written to one.
    """
    rng = np.random.default_rng(seed)
    centred = w.astype(np.float64)
    for label in np.unique(labels):
        centred[labels == label] -= centred[labels == label].mean(axis=0)
    found = []
    for place in range(count):
        drawn = rng.normal(size=len(w)) @ centred  # normal, with the covariance of w
        vector = (drawn / np.linalg.norm(drawn)).astype(np.float32)
        found.append(Direction(f"random-{place + 1}", vector, (0, num_ws), float((centred @ vector).std()), "ganspace"))
    return found


def _moved(ws: Ws, direction: Direction, strength: float) -> Ws:
    return apply_edits(ws, [Edit(direction.name, strength)], {direction.name: direction})


def _apart(before: Readings, after: Readings, units: Units) -> float | None:
    """Mean cosine distance of the same samples before and after, in units of two different samples."""
    if not units.identity:
        return None
    cosine = (_unit(before.features) * _unit(after.features)).sum(axis=1)
    return float((1 - cosine).mean() / units.identity)


def _unit(features: NDArray[np.float32]) -> Floats:
    exact = features.astype(np.float64)
    scaled: Floats = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    return scaled
