"""Random views of images, on which a copy detector is trained."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.copy_network import REGIONS
from dermis.authenticity.transformations import (
    JOINS,
    Transformation,
    blur,
    compress,
    crop,
    grey,
    paint_hair,
    paint_ruler,
    recolour,
    relight,
    shrink,
    turned,
)
from dermis.imaging import Images

_JOINED = 3  # every third view is joined from two images


@dataclass(frozen=True)
class Views:
    """Views of N training images.

    Attributes:
        pixels: uint8 [N, R, R, 3].
        targets: int64 [N, 5]: number of the training image in each of the regions of the network.
        weights: float32 [N, 5]: 1 where the region shows one image, 0 where it shows parts of two.
        second: int64 [N]: number of the second image in the whole view; -1 if there is none.
    """

    pixels: Images
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    second: NDArray[np.int64]


def view_of(image: Images, rng: np.random.Generator) -> Images:
    """Return a random view of an image uint8 [R, R, 3]: an orientation and a random selection of transformations."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    image = turned(image, int(rng.integers(0, 4)))
    chances: list[tuple[float, Transformation]] = [
        (0.7, partial(crop, share=rng.uniform(0.75, 1.0))),
        (0.25, shrink),
        (0.5, recolour),
        (0.5, relight),
        (0.25, blur),
        (0.4, partial(compress, quality=int(rng.integers(20, 60)))),
        (0.35, grey),
        (0.3, paint_hair),
        (0.2, paint_ruler),
    ]
    selected = [transformation for chance, transformation in chances if rng.random() < chance]
    for number in rng.permutation(len(selected)):
        image = selected[number](image, rng)
    return np.ascontiguousarray(image)


def views_of(images: Images, numbers: NDArray[np.int64], rng: np.random.Generator) -> Views:
    """Return a random view of each of some training images. A third of the views is joined with that of the next image.

    Args:
        images: Training images uint8 [M, R, R, 3].
        numbers: Numbers [N] of the images.
        rng: Random generator.
    """
    pixels = [view_of(images[number], rng) for number in numbers]
    targets = np.repeat(numbers[:, None], len(REGIONS), axis=1)
    weights = np.ones(targets.shape, np.float32)
    second = np.full(len(numbers), -1)
    joins = list(JOINS.values())
    for row in range(0, len(numbers), _JOINED):
        other = (row + 1) % len(numbers)
        left_right = joins[rng.integers(len(joins))](pixels[row], pixels[other])
        vertical = rng.random() < 0.5
        pixels[row] = np.ascontiguousarray(left_right.transpose(1, 0, 2) if vertical else left_right)
        second[row] = numbers[other]
        first_half, other_half = ("upper", "lower") if vertical else ("left", "right")
        weights[row, 1:] = 0
        weights[row, [REGIONS.index(first_half), REGIONS.index(other_half)]] = 1
        targets[row, REGIONS.index(other_half)] = numbers[other]
    return Views(np.stack(pixels), targets, weights, second)
