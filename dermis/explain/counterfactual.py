"""What changes if only the frame changes? The same images with and without the dermatoscope's black corners.

A direct test beside TCAV: nothing but the corners differs, so what the probability does is due to them. Corners filled with
skin are the control, as they hide as much of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from dermis.imaging import Images

Fill = Literal["black", "skin"]
REPLICATES = 2000
_SOFT = 0.01  # of the side: width of the frame's edge


@dataclass(frozen=True)
class Change:
    """Mean change of something over images, with its 95 % interval over patients, and the share of images that rose."""

    images: int
    mean: float
    low: float
    high: float
    rose: float


def corners(size: int, share: float) -> NDArray[np.float32]:
    """float32 [size, size]: 1 outside the centred circle that leaves `share` (0 < share < 0.2) of the square, 0 inside."""
    y, x = np.mgrid[:size, :size] + 0.5
    distance = np.hypot(y - size / 2, x - size / 2) / size

    def outside(radius: float) -> float:
        return float((distance > radius).mean()) - share

    radius = brentq(outside, 0.5, 0.71, xtol=1e-4)
    mask: NDArray[np.float32] = np.clip((distance - radius) / _SOFT + 0.5, 0, 1).astype(np.float32)
    return mask


def with_corners(images: Images, share: float, fill: Fill) -> Images:
    """Images uint8 [N, S, S, 3] whose corners are black, or of the mean colour of a ring inside them ("skin")."""
    mask = corners(images.shape[1], share)[None, ..., None]
    colour = np.full((len(images), 1, 1, 3), 4.0, np.float32)  # the frames of real images are not quite 0
    if fill == "skin":
        ring = corners(images.shape[1], min(0.19, share + 0.1)) - corners(images.shape[1], share) > 0.5
        colour = images[:, ring].mean(axis=1, dtype=np.float32)[:, None, None]
    painted = images * (1 - mask) + colour * mask
    return np.rint(painted).astype(np.uint8)


def zoomed(images: Images, share: float = 0.7) -> Images:
    """The middle of images uint8 [N, S, S, 3], `share` of the side, at the old size: without the corners."""
    from PIL import Image

    size = images.shape[1]
    edge = round(size * (1 - share) / 2)
    box = (edge, edge, size - edge, size - edge)
    drawn = [Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box=box) for image in images]
    return np.stack([np.asarray(image) for image in drawn])


def change(before: NDArray[np.float64], after: NDArray[np.float64], groups: Sequence[str], seed: int = 0) -> Change:
    """How a number changed over the same images. The interval is by bootstrap: patients are drawn with replacement."""
    difference = after - before
    _, patient = np.unique(np.array(groups), return_inverse=True)
    total = np.bincount(patient, difference)
    number = np.bincount(patient)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(total), np.full(len(total), 1 / len(total)), REPLICATES)
    means = (drawn @ total) / (drawn @ number)
    low, high = np.quantile(means, (0.025, 0.975))
    rose = float((difference > 0).mean())
    return Change(len(difference), float(difference.mean()), float(low), float(high), rose)
