"""Counterfactual images: the same images with and without the black corners of a dermatoscope.

This is a direct test besides TCAV: only the corners differ, so they cause every change of the probability. Corners in the
colour of the skin are the control, because they hide as much of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from dermis.artefacts import THRESHOLDS, frame_share
from dermis.imaging import Images

Fill = Literal["black", "skin"]
REPLICATES = 2000
_SOFT = 0.01  # width of the frame's soft edge, as a share of the side


@dataclass(frozen=True)
class Change:
    """Mean change of a number over images, with its 95 % interval over patients, and the share of images in which it rose."""

    images: int
    mean: float
    low: float
    high: float
    rose: float


def corners(size: int, share: float) -> NDArray[np.float32]:
    """Return float32 [size, size]: 1 outside of a centred circle, which is `share` (0 < share < 0.2) of the square."""
    y, x = np.mgrid[:size, :size] + 0.5
    distance = np.hypot(y - size / 2, x - size / 2) / size

    def outside(radius: float) -> float:
        return float((distance > radius).mean()) - share

    radius = brentq(outside, 0.5, 0.71, xtol=1e-4)
    mask: NDArray[np.float32] = np.clip((distance - radius) / _SOFT + 0.5, 0, 1).astype(np.float32)
    return mask


def with_corners(images: Images, share: float, fill: Fill) -> Images:
    """Fill the corners of images uint8 [N, S, S, 3] with black, or with the mean colour of a ring inside them ("skin")."""
    mask = corners(images.shape[1], share)[None, ..., None]
    colour = np.full((len(images), 1, 1, 3), 4.0, np.float32)  # the frames of real images are not quite 0
    if fill == "skin":
        ring = corners(images.shape[1], min(0.19, share + 0.1)) - corners(images.shape[1], share) > 0.5
        colour = images[:, ring].mean(axis=1, dtype=np.float32)[:, None, None]
    painted = images * (1 - mask) + colour * mask
    return np.rint(painted).astype(np.uint8)


def zoomed(images: Images, share: float = 0.7) -> Images:
    """Crop images uint8 [N, S, S, 3] to their middle, `share` of the side, and resize them back.

    A frame remains if its circle has a radius below 0.71 * `share` of the side, or is far from the middle: see `frameless`.
    """
    from PIL import Image

    size = images.shape[1]
    edge = round(size * (1 - share) / 2)
    box = (edge, edge, size - edge, size - edge)
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box=box) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def frameless(images: Images) -> NDArray[np.bool_]:
    """Return which images uint8 [N, S, S, 3] have no frame, by the detector of `dermis data inspect`."""
    return np.array([frame_share(image) < THRESHOLDS["frame"] for image in images], np.bool_)


def change(before: NDArray[np.float64], after: NDArray[np.float64], groups: Sequence[str], seed: int = 0) -> Change:
    """Measure how a number changed over the same images [N]. The interval is by bootstrap over patients (`groups`)."""
    difference = after - before
    _, patient = np.unique(np.array(groups), return_inverse=True)
    total = np.bincount(patient, difference)
    number = np.bincount(patient)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), REPLICATES)
    means = (counts @ total) / (counts @ number)
    low, high = np.quantile(means, (0.025, 0.975))
    rose = float((difference > 0).mean())
    return Change(len(difference), float(difference.mean()), float(low), float(high), rose)
