"""Encode and decode 8-bit RGB images, and arrange images on a sheet."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dermis.image_metadata import ImageOrigin, gif_with_xmp, png_texts, xmp_packet

if TYPE_CHECKING:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

ImageFormat = Literal["png", "jpeg", "webp"]
Images = npt.NDArray[np.uint8]

MEDIA_TYPES: Mapping[ImageFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
SUFFIXES: Mapping[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

# zlib's run-length strategy matches only runs. On dermoscopy of 64 and 256 px its result is as small as level 6 of the
# default strategy, in a fifth of the time, and its bytes do not depend on the match finder of the zlib build.
_PNG_OPTIONS = {"compress_level": 1, "compress_type": 3}


def encode(
    image: Images, image_format: ImageFormat = "png", quality: int = 95, origin: ImageOrigin | None = None
) -> bytes:
    """Encode an image. The same image and origin always give the same bytes.

    Args:
        image: uint8 [H, W, 3], or [H, W, 1], which is encoded as grey RGB.
        image_format: "png", "jpeg" or "webp".
        quality: 1..100, for JPEG and WebP.
        origin: What the file says of the image; None for images that no generator made.
    """
    from PIL import Image

    options: dict[str, Any] = dict(_PNG_OPTIONS)
    if image_format == "jpeg":
        options = {"quality": quality, "subsampling": 0}  # 4:4:4, because colour matters in dermoscopy
    elif image_format == "webp":
        options = {"quality": quality, "method": 2}
    if origin is not None:
        if image_format == "png":
            options["pnginfo"] = _png_info(origin)
        else:
            options["xmp"] = xmp_packet(origin)
    if image.shape[2] == 1:
        image = image.repeat(3, axis=2)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def _png_info(origin: ImageOrigin) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp_packet(origin).decode())
    for keyword, text in png_texts(origin).items():
        info.add_text(keyword, text)
    return info


def animation(frames: Images, frame_ms: int, origin: ImageOrigin | None = None) -> bytes:
    """Encode frames as an endless GIF with at most 256 colours for each frame. Bytes are always the same.

    Args:
        frames: uint8 [N, H, W, 3].
        frame_ms: Duration of a frame in milliseconds.
        origin: What the file says of its frames; None for frames that no generator made.
    """
    from PIL import Image

    pictures = [Image.fromarray(frame).quantize(256) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, "GIF", save_all=True, append_images=pictures[1:], duration=frame_ms, loop=0, optimize=False, disposal=1
    )
    return buffer.getvalue() if origin is None else gif_with_xmp(buffer.getvalue(), origin)


def decode(data: bytes) -> Images:
    """Decode an image that dermis wrote to uint8 [H, W, 3]. It has no limits, so it is not for uploads."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """Crop an RGB image to its largest centred square and resize it to `size` px with Pillow's antialiased Lanczos filter."""
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.resize((size, size), Resampling.LANCZOS, box=(left, top, left + side, top + side))


def contact_sheet(images: Images, columns: int = 8, padding: int = 2, background: int = 255) -> Images:
    """Arrange images on a sheet, row by row. The last row is filled with background.

    Args:
        images: uint8 [N, H, W, 3].
        columns: Images in a row. With fewer images the sheet is narrower.
        padding: Pixels between and around the images.
        background: Grey value of the background.

    Raises:
        ValueError: There is no image or no column.
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
    """Reduce an image uint8 [H, W, 3] so that its longer side has at most `size` pixels."""
    from PIL import Image

    if max(image.shape[:2]) <= size:
        return image
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small)
