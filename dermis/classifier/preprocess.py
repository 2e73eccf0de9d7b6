"""From any image to the pixels that a classifier sees. Training, ONNX, services and datasets all go through here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dermis.imaging import Images


def to_input(image: Images, size: int) -> Images:
    """uint8 [S, S, 3] of uint8 [H, W, 3]: the largest centred square, resized with PIL's antialiased Lanczos filter.

    The same pixels as `dermis data prepare` makes. An image of the right size stays as it is.
    """
    from PIL import Image

    height, width, channels = image.shape
    if channels != 3:
        raise ValueError(f"{channels} channels; a classifier sees RGB")
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS, box=box), dtype=np.uint8)


def batch(images: Sequence[Images] | Images, size: int) -> Images:
    """uint8 [N, S, S, 3] of images of any sizes."""
    if not len(images):
        return np.empty((0, size, size, 3), np.uint8)
    return np.stack([to_input(image, size) for image in images])
