"""Tests of the previews of running projections: few, small, and with the distances so far."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dermis.imaging import encode
from dermis.projection.projector import ProjectionState
from services.inference.projections import PREVIEW_DISTANCES, PREVIEW_PIXELS, ProjectionPreview, _Previews


class Clock:
    """Time that passes only when an image is made: 5 ms for each."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def state(steps: int, clock: Clock, side: int = 8, numbers: tuple[int, ...] = (0, 1)) -> ProjectionState:
    def images() -> np.ndarray:
        clock.seconds += 0.005 * len(numbers)
        return np.full((len(numbers), side, side, 3), steps % 256, np.uint8)

    return ProjectionState(numbers, [steps] * len(numbers), [100 / steps + number for number in numbers], images)


def run(steps: int, seconds_of_a_step: float, side: int = 8) -> tuple[list[list[ProjectionPreview]], float]:
    """The previews of a projection, and the share of the time that making them took."""
    clock, sent = Clock(), []
    previews = _Previews(steps, encode, sent.append, clock)
    for step in range(1, steps + 1):
        clock.seconds += seconds_of_a_step
        previews(state(step, clock, side))
    return sent, 1 - steps * seconds_of_a_step / clock.seconds


def test_previews_take_a_hundredth_of_the_time_at_most() -> None:
    for seconds in (0.001, 0.02, 0.3):
        sent, share = run(2000, seconds)
        assert sent and share <= 0.011 + 0.01 / (2000 * seconds)  # the first one is made at once


def test_previews_have_the_current_image_and_evenly_spaced_distances() -> None:
    sent, _ = run(1000, 0.1)
    last = sent[-1][1]
    assert last.number == 1 and len(last.distances) <= PREVIEW_DISTANCES
    steps = [step for step, _ in last.distances]
    assert steps[0] == 1 and steps[-1] == last.step and max(np.diff(steps)) <= 11
    assert all(distance == 100 / step + 1 for step, distance in last.distances)
    pixels = np.asarray(Image.open(io.BytesIO(last.image)))
    assert (pixels == last.step % 256).all()


def test_large_images_are_reduced() -> None:
    sent, _ = run(1, 0.1, side=2 * PREVIEW_PIXELS)
    assert Image.open(io.BytesIO(sent[0][0].image)).size == (PREVIEW_PIXELS, PREVIEW_PIXELS)
