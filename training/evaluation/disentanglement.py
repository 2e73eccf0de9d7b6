"""Measure disentanglement: which attributes a direction changes, and which directions remove an attribute.

The same latents are measured before and after a move, so all changes are paired. Changes of an attribute are in units of
its standard deviation over unedited samples. Random directions are the controls: they show the effect of any move of the
same length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.artefacts import wilson_interval
from dermis.bundle.directions import Direction
from dermis.directions.edit import Edit, apply_edits

Floats = NDArray[np.float64]
Ws = NDArray[np.float32]

MIN_STANDARD_ERRORS = 2.0  # smaller shifts do not count
MIN_REMOVED_SHARE = 0.9  # share of the images in which an attribute must disappear for a move to count as a removal


@dataclass(frozen=True)
class Measurements:
    """Measurements of N images."""

    attributes: Mapping[str, Floats]  # key: attribute; values: float64 [N]
    features: NDArray[np.float32]  # [N, D]; D is 0 without a classifier


Measure = Callable[[Ws], Measurements]
"""Measures the images of style vectors [N, num_ws, w_dim]."""


@dataclass(frozen=True)
class Units:
    """Units of changes, from unedited samples."""

    deviations: Mapping[str, float]  # key: attribute; value: its standard deviation, 0 if it is the same in all samples
    identity: float  # mean cosine distance between the features of two different samples; 0 without features


@dataclass(frozen=True)
class Shift:
    """Change of one attribute, in standard deviations."""

    value: float  # (plus - minus) / 2
    error: float  # standard error of `value`
    plus: float
    minus: float

    @property
    def significant(self) -> bool:
        """Whether the shift is more than twice its standard error."""
        return abs(self.value) > MIN_STANDARD_ERRORS * self.error


@dataclass(frozen=True)
class Effect:
    """Changes along a direction, at plus and minus a strength."""

    direction: str
    strength: float
    shifts: Mapping[str, Shift]  # key: attribute
    identity: float | None  # 0: the same image; 1: as different as another sample

    @property
    def most_moved(self) -> str | None:
        """The attribute with the largest significant shift; None if no shift is significant."""
        significant = [name for name, shift in self.shifts.items() if shift.significant]
        return max(significant, key=lambda name: abs(self.shifts[name].value), default=None)

    def share(self, attribute: str) -> float | None:
        """Share of one attribute in the shifts of all: 1 if it alone changes; None if no attribute changes."""
        total = sum(abs(shift.value) for shift in self.shifts.values())
        return abs(self.shifts[attribute].value) / total if total and attribute in self.shifts else None


@dataclass(frozen=True)
class Removal:
    """Effect of a move on images that have an attribute."""

    direction: str
    strength: float
    removed: int  # images that no longer have the attribute
    images: int
    low: float  # 95 % interval of `share`, by Wilson
    high: float
    # The next two names are keys of the JSON file of `dermis directions measure`.
    chosen_by: float  # `share` in the half of the images by which the best move is chosen
    confirmed: float  # `share` in the other half, an estimate without the bias of the choice
    others: Mapping[str, float]  # mean change of every other attribute, in standard deviations
    identity: float | None

    @property
    def share(self) -> float:
        """Share of the images that no longer have the attribute."""
        return self.removed / self.images


def units_of(measurements: Measurements) -> Units:
    """Compute the units of changes from the measurements of at least two unedited samples."""
    features = _unit(measurements.features)
    count, identity = len(features), 0.0
    if features.shape[1]:
        total = features.sum(axis=0)
        # The mean over all pairs of different samples.
        identity = float(1 - (total @ total - count) / (count * (count - 1)))
    return Units({name: float(np.std(values, ddof=1)) for name, values in measurements.attributes.items()}, identity)


def measure_effects(
    ws: Ws, directions: Sequence[Direction], strength: float, before: Measurements, units: Units, measure: Measure
) -> Iterator[Effect]:
    """Measure the effect of each direction.

    Attributes that are the same in every unedited sample have no unit and are left out.

    Args:
        ws: Style vectors [N, num_ws, w_dim], N at least 2.
        directions: The directions.
        strength: Strength of the moves; each direction is applied with +strength and -strength.
        before: Measurements of the images of `ws`.
        units: Units of the changes.
        measure: Measures the images of moved style vectors.

    Yields:
        The effect of each direction, as soon as it is measured.
    """
    for direction in directions:
        plus, minus = (measure(_moved(ws, direction, sign * strength)) for sign in (1, -1))
        shifts = {}
        for name, deviation in units.deviations.items():
            if deviation > 0:
                up = (plus.attributes[name] - before.attributes[name]) / deviation
                down = (minus.attributes[name] - before.attributes[name]) / deviation
                half = (up - down) / 2
                error = float(half.std(ddof=1) / len(half) ** 0.5)
                shifts[name] = Shift(float(half.mean()), error, float(up.mean()), float(down.mean()))
        distances = [_identity_change(before, after, units) for after in (plus, minus)]
        identity = None if distances[0] is None or distances[1] is None else (distances[0] + distances[1]) / 2
        yield Effect(direction.name, strength, shifts, identity)


def measure_removals(
    ws: Ws,
    attribute: str,
    threshold: float,
    directions: Sequence[Direction],
    strengths: Sequence[float],
    before: Measurements,
    units: Units,
    measure: Measure,
) -> Iterator[Removal]:
    """Measure how often each direction and strength removes an attribute.

    Args:
        ws: Style vectors [N, num_ws, w_dim] of images whose attribute is at least the threshold, N at least 2.
        attribute: The attribute.
        threshold: Smallest value of images that have the attribute.
        directions: The directions.
        strengths: Strengths of the moves; each is applied with each direction.
        before: Measurements of the images of `ws`.
        units: Units of the changes.
        measure: Measures the images of moved style vectors.

    Yields:
        The result of each move, as soon as it is measured.

    Raises:
        ValueError: There are fewer than two images, or one does not have the attribute.
    """
    if len(ws) < 2 or (before.attributes[attribute] < threshold).any():
        raise ValueError(f"needs two images or more, all with the attribute {attribute}")
    for direction in directions:
        for strength in strengths:
            after = measure(_moved(ws, direction, strength))
            removed = after.attributes[attribute] < threshold
            low, high = wilson_interval(int(removed.sum()), len(removed))
            others = {
                name: float((after.attributes[name] - before.attributes[name]).mean() / deviation)
                for name, deviation in units.deviations.items()
                if name != attribute and deviation > 0
            }
            yield Removal(
                direction.name,
                strength,
                int(removed.sum()),
                len(removed),
                low,
                high,
                float(removed[::2].mean()),
                float(removed[1::2].mean()),
                others,
                _identity_change(before, after, units),
            )


def best_removal(removals: Sequence[Removal]) -> Removal:
    """Choose the best move by the first half of the measurements (`chosen_by`).

    Among the moves with a share of at least 90 %, the best is the one that changes the images least otherwise: by identity
    if it is known, or by the other attributes. Without such a move it is the one with the largest share.
    """

    def side_effect(removal: Removal) -> float:
        return removal.identity if removal.identity is not None else sum(map(abs, removal.others.values()))

    if enough := [removal for removal in removals if removal.chosen_by >= MIN_REMOVED_SHARE]:
        return min(enough, key=side_effect)
    return max(removals, key=lambda removal: (removal.chosen_by, -side_effect(removal)))


def random_directions(w: Ws, labels: NDArray[np.int64], count: int, *, num_ws: int, seed: int) -> list[Direction]:
    """Draw random directions, the controls of a measurement.

    They are normally distributed with the covariance of w within classes, so that a step along them moves an image about
    as far as a step along a fitted direction.

    Args:
        w: [N, w_dim].
        labels: Class of each row of w, [N].
        count: Number of directions.
        num_ws: Number of style vectors of the generator; the directions change all of them.
        seed: Seed of the random numbers.

    Returns:
        Directions with the method "random", named random-1, random-2, ...
    """
    rng = np.random.default_rng(seed)
    centred = w.astype(np.float64)
    for label in np.unique(labels):
        centred[labels == label] -= centred[labels == label].mean(axis=0)
    directions = []
    for i in range(count):
        sample = rng.normal(size=len(w)) @ centred  # normal, with the covariance of w
        vector = (sample / np.linalg.norm(sample)).astype(np.float32)
        directions.append(Direction(f"random-{i + 1}", vector, (0, num_ws), float((centred @ vector).std()), "random"))
    return directions


def _moved(ws: Ws, direction: Direction, strength: float) -> Ws:
    return apply_edits(ws, [Edit(direction.name, strength)], {direction.name: direction})


def _identity_change(before: Measurements, after: Measurements, units: Units) -> float | None:
    """Mean cosine distance between the same samples before and after, relative to that of two different samples."""
    if not units.identity:
        return None
    cosine = (_unit(before.features) * _unit(after.features)).sum(axis=1)
    return float((1 - cosine).mean() / units.identity)


def _unit(features: NDArray[np.float32]) -> Floats:
    exact = features.astype(np.float64)
    scaled: Floats = exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    return scaled
