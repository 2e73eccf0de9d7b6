"""From any image to the pixels that a classifier sees, the same for training, ONNX, services and datasets.

Whoever still has a Pillow image (`dermis.image_reading`) calls `dermis.imaging.centre_square`, which does the work here too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dermis.imaging import Images, centre_square


def to_input(image: Images, size: int) -> Images:
    """uint8 [S, S, 3] of uint8 [H, W, 3]: the largest centred square, resized with Pillow's antialiased Lanczos filter.

    The same pixels as `dermis data prepare` makes. An image of the right size stays as it is.
    """
    from PIL import Image

    if image.shape[2] != 3:
        raise ValueError(f"{image.shape[2]} channels; a classifier sees RGB")
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(centre_square(Image.fromarray(image), size), dtype=np.uint8)


def batch(images: Sequence[Images] | Images, size: int) -> Images:
    """uint8 [N, S, S, 3] of images of any sizes."""
    if not len(images):
        return np.empty((0, size, size, 3), np.uint8)
    return np.stack([to_input(image, size) for image in images])
