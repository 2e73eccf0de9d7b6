"""Prepare images for a classifier, in the same way for training, ONNX, services and datasets.

For a Pillow image (`dermis.image_reading`) use `dermis.imaging.centre_square`, which this module uses too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dermis.imaging import Images, centre_square


def to_input(image: Images, size: int) -> Images:
    """Crop an image to its largest centred square and resize it with Pillow's antialiased Lanczos filter.

    The pixels are those of `dermis data prepare`. An image of the right size is returned unchanged.

    Args:
        image: uint8 [H, W, 3].
        size: Side S of the result, px.

    Returns:
        uint8 [S, S, 3].
    """
    from PIL import Image

    if image.shape[2] != 3:
        raise ValueError(f"{image.shape[2]} channels; a classifier sees RGB")
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(centre_square(Image.fromarray(image), size), dtype=np.uint8)


def batch(images: Sequence[Images] | Images, size: int) -> Images:
    """Apply `to_input` to images of any sizes; uint8 [N, S, S, 3]."""
    if not len(images):
        return np.empty((0, size, size, 3), np.uint8)
    return np.stack([to_input(image, size) for image in images])
