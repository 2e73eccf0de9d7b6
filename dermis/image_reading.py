"""Decode untrusted images (uploads, training images, files on the command line) to 8-bit RGB.

Uploads must be PNG, JPEG or WebP. Training images can have every format that Pillow decodes as one still picture. Only the
pixels are kept: no EXIF, no colour profile, no text. The size in the header is checked before anything is decoded.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from dermis.errors import DermisError
from dermis.imaging import Images, centre_square

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 40_000_000
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_FORMAT_NAMES = "PNG, JPEG or WebP"
# Formats of training images: those that Pillow decodes without other packages, with the suffixes below.
TRAINING_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA")
IMAGE_SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".avif", ".tga",
})  # fmt: skip
MAX_TRAINING_PIXELS = 178_956_970  # Pillow's limit; images of cameras have fewer
# A JPEG can have any number of scans, each as costly to decode as the whole image; encoders write about ten.
_MAX_SCANS = 100
# Parts of a file are read one by one in Python. Encoders write few of them: chunks of PNG have more than 1 KiB on average.
_MAX_PARTS = 1000
_BYTES_A_CHUNK = 1024
_MAX_STRAY_BYTES = 1 << 16  # fill bytes or garbage between the segments of a JPEG
_MAX_EXIF_ENTRIES = 1000
_ORIENTATION = 0x0112  # EXIF's tag

ImageErrorKind = Literal["unsupported", "too-large", "unusable"]


class ImageError(DermisError):
    """An image that is refused. The message says why and what to do; the caller adds the name of the image.

    Attributes:
        kind: "unsupported" (another format), "too-large" (pixels) or "unusable" (empty, damaged, animated).
    """

    def __init__(self, kind: ImageErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_image(
    data: bytes,
    *,
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: Collection[str] = tuple(FORMATS),
) -> Images:
    """Decode an image and rotate it by its EXIF orientation.

    With `size` much less memory is needed than for the whole image: at most 12 bytes for each pixel of the file, and 4 for
    most images (RGB, upright).

    1-bit, grey, palette and CMYK images are converted to RGB by Pillow, 16-bit images by their upper byte. Transparency is
    removed without changing colours. Further pictures in a JPEG, as phones add them, are ignored; files of several frames or
    pages are refused.

    Args:
        data: The encoded image.
        size: Side in px of the result, the largest centred square (`dermis.imaging.centre_square`); None for the whole image.
        max_pixels: Larger images are refused before they are decoded.
        formats: Pillow's names of the allowed formats; by default those of uploads.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: The image is refused.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("unusable", "is empty (0 bytes); use the original file")
    kind = _format_of(data)
    if kind is None and len(formats) == len(FORMATS):
        raise ImageError("unsupported", f"is not a {_FORMAT_NAMES} image; convert it to PNG")
    if kind is not None:
        _check_parts(data, kind)
        _check_size(_header_size(data, kind), max_pixels)
    if kind == "JPEG" and data.count(b"\xff\xda") > _MAX_SCANS:
        raise ImageError("unusable", f"is a JPEG of more than {_MAX_SCANS} scans; save it again as a baseline JPEG")
    try:
        with Image.open(io.BytesIO(data), formats=[kind] if kind else list(formats)) as image:
            _check_size(image.size, max_pixels)
            if kind != "JPEG" and (frames := getattr(image, "n_frames", 1)) > 1:
                what = f"has {frames} pages" if image.format == "TIFF" else f"is animated ({frames} frames)"
                raise ImageError("unusable", f"{what}; use one of them as an image of its own")
            image.load()
            rgb = _upright(_to_rgb(image), _orientation(image))
            return np.asarray(rgb if size is None else centre_square(rgb, size))
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise ImageError("too-large", f"has more than {max_pixels:,} pixels; scale it down") from None
    except Exception as error:  # Pillow's plugins have many exceptions
        if kind is None and isinstance(error, UnidentifiedImageError):
            raise ImageError("unsupported", f"is {_content(data)}, not an image that can be read") from None
        if "truncated" in str(error).lower():
            raise ImageError("unusable", "ends early (truncated); use the whole file") from None
        raise ImageError(
            "unusable", f"cannot be decoded as {kind or 'an image'}; it is damaged, save it again"
        ) from None


def read_training_image(data: bytes, size: int | None = None) -> Images:
    """Decode an image with `read_image` in all formats of training images, with a limit of pixels above that of cameras.

    Raises:
        ImageError: The image is refused.
    """
    return read_image(data, size=size, max_pixels=MAX_TRAINING_PIXELS, formats=TRAINING_FORMATS)


def is_image_header(header: bytes) -> bool:
    """Whether a file is an image by its first 16 or more bytes, whatever its name is."""
    return _format_of(header) is not None or header.startswith(
        (b"II*\0", b"MM\0*", b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  ")
    )


def _content(data: bytes) -> str:
    """Describe data that is not an image, for an error message."""
    start = data[:200].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<")):
        return "a web page (HTML or XML)"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull`)"
    if data[:4] == b"%PDF":
        return "a PDF"
    if data[128:132] == b"DICM":
        return "a DICOM file"
    if data[4:8] == b"ftyp":
        return "a HEIC image or a video"
    if data[:4] == b"PK\3\4" or data[:2] == b"\x1f\x8b":
        return "an archive"
    return "text" if all(byte >= 32 or byte in b"\t\r\n" for byte in data[:200]) else "data of an unknown kind"


def _format_of(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def _check_size(size: tuple[int, int] | None, max_pixels: int) -> None:
    if size is not None and size[0] * size[1] > max_pixels:
        message = f"is {size[0]:,} x {size[1]:,} px; at most {max_pixels:,} pixels are read: scale it down"
        raise ImageError("too-large", message)


def _header_size(data: bytes, kind: str) -> tuple[int, int] | None:
    """Return width and height in the header; None if there are none, which the decoder will report.

    They are read here because Pillow allocates the whole canvas of a WebP when it opens the file.
    """
    if kind == "PNG":
        return _number(data[16:20]), _number(data[20:24])
    if kind == "JPEG":
        return _jpeg_size(data)
    if data[12:16] == b"VP8X":
        return _number(data[24:27], "little") + 1, _number(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = _number(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return _number(data[26:28], "little") & 0x3FFF, _number(data[28:30], "little") & 0x3FFF


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return the size in the first frame header (SOF; ITU T.81, annex B)."""
    for marker, start, end in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and end - start >= 5:
            return _number(data[start + 3 : start + 5]), _number(data[start + 1 : start + 3])
    return None


def pixels_of_header(data: bytes) -> int:
    """Return the number of pixels that the header of an uploaded image states; 0 if `read_image` refuses the header."""
    kind = _format_of(data)
    if kind is None:
        return 0
    try:
        _check_parts(data, kind)
        size = _header_size(data, kind)
    except ImageError:
        return 0
    return 0 if size is None else size[0] * size[1]


def _check_parts(data: bytes, kind: str) -> None:
    """Raise ImageError if the file has so many parts that reading them would take longer than decoding the pixels."""
    parts: Iterator[tuple[bytes | int, int, int]] = iter(())
    if kind == "PNG":
        parts = _png_chunks(data)
    elif kind == "JPEG":
        parts = _jpeg_segments(data)
    elif kind == "WEBP":
        parts = _webp_chunks(data)
    most = _MAX_PARTS + (len(data) // _BYTES_A_CHUNK if kind == "PNG" else 0)
    for count, (name, start, end) in enumerate(parts, 1):
        if count > most:
            raise ImageError("unusable", f"consists of more than {most:,} parts; save it again without metadata")
        if name in (b"eXIf", b"EXIF") or (name == 0xE1 and data[start : start + 4] == b"Exif"):
            _check_exif(data[start:end])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the content of each chunk up to IEND."""
    place = 8
    while place + 12 <= len(data):
        name, start = data[place + 4 : place + 8], place + 8
        place = start + _number(data[place : place + 4]) + 4  # a checksum follows
        yield name, start, min(place - 4, len(data))
        if name == b"IEND":
            return


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and end of the content of each chunk."""
    place = 12
    while place + 8 <= len(data):
        start, size = place + 8, _number(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], start, min(start + size, len(data))
        place = start + size + size % 2


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment up to the first scan. Raises ImageError if too much is between them."""
    place, stray = 2, 0
    while place + 4 <= len(data):
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0x00, 0xFF):  # decoders skip garbage and fill bytes one by one
            place, stray = place + 1, stray + 1
            if stray > _MAX_STRAY_BYTES:
                raise ImageError("unusable", "has too many bytes that belong to no segment; save it again")
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            yield marker, place + 2, place + 2
            place += 2
        elif marker == 0xD9:
            return
        else:
            start, place = place + 4, place + 2 + max(2, _number(data[place + 2 : place + 4]))
            yield marker, start, min(place, len(data))
            if marker == 0xDA:
                return


def _check_exif(block: bytes) -> None:
    """Raise ImageError if the first directory of an EXIF block has too many entries."""
    block = block.removeprefix(b"Exif\0\0").removeprefix(b"Exif\0\0")
    order: Literal["big", "little"] = "little" if block.startswith(b"II") else "big"
    place = _number(block[4:8], order)
    entries = min(_number(block[place : place + 2], order), (len(block) - place - 2) // 12)
    if entries > _MAX_EXIF_ENTRIES:
        raise ImageError(
            "unusable", f"has more than {_MAX_EXIF_ENTRIES:,} EXIF entries; save it again without metadata"
        )


def _number(data: bytes, order: Literal["big", "little"] = "big") -> int:
    return int.from_bytes(data, order)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip values of up to 65535 at 255
        from PIL import Image

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):  # 32 bits, whose range is not known
        raise ImageError("unusable", "has 32 bits a channel; save it with 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF is often damaged, which is not a reason to refuse the picture
        return 1
    return orientation if isinstance(orientation, int) else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
