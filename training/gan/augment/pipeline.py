"""All transforms, in the order of the paper's figure of the pipeline."""

from __future__ import annotations

from torch import Tensor

from training.gan.augment.colour import apply_colour, random_colour
from training.gan.augment.config import AugmentConfig
from training.gan.augment.corruption import add_noise, amplify_bands, cut_out, random_gains
from training.gan.augment.geometry import random_transform, warp


def augment(images: Tensor, p: float, config: AugmentConfig) -> Tensor:
    """Transform images at random.

    Transforms that are off draw no random numbers. All random numbers except the noise are drawn on the CPU, so that
    nothing waits for a GPU.

    Args:
        images: Float [N, 3, R, R], about -1 to 1.
        p: Strength in [0, 1]. 0 returns the images unchanged.
        config: The transforms.
    """
    if p <= 0:
        return images
    n, size = images.shape[0], images.shape[-1]
    transform = random_transform(n, size, p, config)
    if transform is not None:
        images = warp(images, transform)
    colour = random_colour(n, p, config)
    if colour is not None:
        images = apply_colour(images, colour)
    if config.filter:
        images = amplify_bands(images, random_gains(n, p, config))
    if config.noise:
        images = add_noise(images, p, config)
    if config.cutout:
        images = cut_out(images, p, config)
    return images
