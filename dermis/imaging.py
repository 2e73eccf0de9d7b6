"""Encode and decode 8-bit RGB images, and lay many out on one sheet."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

ImageFormat = Literal["png", "jpeg", "webp"]
Images = npt.NDArray[np.uint8]

MEDIA_TYPES: Mapping[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: Mapping[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

# zlib's run-length strategy looks for no matches beyond runs: on dermoscopy at 64 and 256 px it is as small as level 6
# of the default strategy, at a fifth of its time, and gives the same bytes whichever match finder zlib was built with.
_PNG_OPTIONS = {"compress_level": 1, "compress_type": 3}


def encode(image: Images, image_format: ImageFormat = "png", quality: int = 95) -> bytes:
    """uint8 [H, W, 3] (or [H, W, 1], made grey RGB) as a file's bytes: the same ones every time.

    `quality` (1..100) is for JPEG and WebP.
    """
    from PIL import Image

    options: dict[str, Any] = _PNG_OPTIONS
    if image_format == "jpeg":
        options = {"quality": quality, "subsampling": 0}  # 4:4:4, as colour is what dermoscopy is about
    elif image_format == "webp":
        options = {"quality": quality, "method": 2}
    if image.shape[2] == 1:
        image = image.repeat(3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def animation(frames: Images, frame_ms: int) -> bytes:
    """uint8 [N, H, W, 3] as a GIF that loops for ever: at most 256 colours a frame, the same bytes every time."""
    from PIL import Image

    pictures = [Image.fromarray(frame).quantize(256) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=frame_ms, loop=0, optimize=False, disposal=1
    )
    return buffer.getvalue()


def decode(data: bytes) -> Images:
    """uint8 [H, W, 3] of an image that dermis wrote. Not for uploads: it knows no limits."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """An RGB image's largest centred square at `size` px, by Pillow's antialiased Lanczos filter; as it is if it is that."""
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Resampling.LANCZOS, box=(left, top, left + side, top + side))


def contact_sheet(images: Images, columns: int = 8, padding: int = 2, background: int = 255) -> Images:
    """uint8 [N, H, W, 3] as one sheet, row by row, with `padding` pixels between and around the images.

    Fewer images than `columns` make a narrower sheet; the last row is filled up with background.
    """
    number, height, width, channels = images.shape
    if number == 0 or columns < 1:
        raise ValueError("a contact sheet needs at least one image and one column")
    columns = min(columns, number)
    rows = -(-number // columns)
    cells = np.full((rows * columns, height + padding, width + padding, channels), background, np.uint8)
    cells[:number, padding:, padding:] = images
    grid = cells.reshape(rows, columns, height + padding, width + padding, channels).swapaxes(1, 2)
    sheet = np.ascontiguousarray(grid.reshape(rows * (height + padding), columns * (width + padding), channels))
    return np.pad(sheet, ((0, padding), (0, padding), (0, 0)), constant_values=background)


def as_rgb(images: Images) -> Images:
    """Images [N, H, W, 1] or [N, H, W, 3] as RGB [N, H, W, 3]."""
    return images.repeat(3, axis=3) if images.shape[3] == 1 else images


def thumbnail(image: Images, size: int) -> Images:
    """uint8 [H, W, 3] with its longer side at most `size` pixels."""
    from PIL import Image

    if max(image.shape[:2]) <= size:
        return image
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small)
