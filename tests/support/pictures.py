"""Image files of many kinds, valid and invalid, as users upload them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

rng = np.random.default_rng(0)
# Smooth, so that JPEG keeps it nearly as it is; not symmetric, so that every turn shows.
_y, _x = np.mgrid[0:30, 0:40]
PIXELS = np.stack([_x * 6, _y * 8, (_x + _y) * 3], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """PIXELS as a file."""
    image = Image.fromarray(PIXELS)
    return encoded(image.quantize(256) if mode == "P" else image.convert(mode), kind, **options)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG from its raw parts; `more` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sixteen_bit(colour: int, channels: int) -> bytes:
    """PIXELS as a 16-bit PNG of this colour type, the lower byte random; grey is the red channel."""
    upper = PIXELS[..., [0, 0, 0][:channels] if channels < 3 else [0, 1, 2]]
    if channels in (2, 4):
        upper = np.concatenate([upper[..., : channels - 1], np.full_like(upper[..., :1], 255)], axis=2)
    both = np.stack([upper, rng.integers(0, 256, upper.shape, dtype=np.uint8)], axis=3)
    rows = b"".join(b"\0" + row.tobytes() for row in both)
    return png(40, 30, 16, colour, zlib.compress(rows))


def bomb(side: int = 13_000) -> bytes:
    """A PNG of some 20 kB whose pixels are hundreds of megabytes."""
    squeezed, row = zlib.compressobj(9), bytes(1 + side // 8)
    packed = b"".join(squeezed.compress(row) for _ in range(side))
    return png(side // 8 * 8, side, 1, 0, packed + squeezed.flush())


def with_exif(orientation: int = 1, kind: str = "JPEG") -> bytes:
    """PIXELS stored in this EXIF orientation, with a name and a place."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x013B] = exif[0x010E] = "Jane Q. Patient"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    return encoded(Image.fromarray(PIXELS), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def scans(number: int, image: Image.Image | None = None) -> bytes:
    """A progressive JPEG, of PIXELS if no image is given, that goes on with copies of its last scan."""
    data = encoded(image or Image.fromarray(PIXELS), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * number + b"\xff\xd9"


def many_chunks(number: int, name: bytes = b"tEXt", data: bytes = b"") -> bytes:
    """A PNG of PIXELS after so many chunks."""
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)
    return png(40, 30, 8, 2, zlib.compress(rows), chunk(name, data) * number)


def many_segments(number: int, marker: int = 0xFE, content: bytes = b"") -> bytes:
    """A JPEG with so many segments in front."""
    data = picture("JPEG")
    return data[:2] + (bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content) * number + data[2:]


def many_webp_chunks(number: int) -> bytes:
    """A WebP with so many unknown chunks behind its pixels."""
    body = picture("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")[8:] + (b"XXXX" + bytes(4)) * number
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_entries(number: int) -> bytes:
    """An EXIF block whose directory has so many entries."""
    entries = b"".join(struct.pack(">HHII", 1000 + i, 4, 1, 7) for i in range(number))
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, number) + entries + bytes(4)


def webp_header(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_header(width: int, height: int) -> bytes:
    """A JPEG that says it is so large."""
    data = picture("JPEG")
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(PIXELS, 5 * i, axis=1)) for i in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


# name -> (file, kind of the problem, words of its message)
BAD: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "0 bytes": (lambda: b"", "unusable-image", "is empty"),
    "text": (lambda: b"hello, this is no image", "unsupported-media-type", "convert it to PNG"),
    "a page": (lambda: b"<html><body>404</body></html>", "unsupported-media-type", "is not a PNG, JPEG or WebP"),
    "GIF": (lambda: picture("GIF"), "unsupported-media-type", "is not a PNG, JPEG or WebP"),
    "TIFF": (lambda: picture("TIFF"), "unsupported-media-type", "is not a PNG, JPEG or WebP"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported-media-type", "is not a PNG"),
    "a signature alone": (lambda: b"\x89PNG\r\n\x1a\n", "unusable-image", "damaged"),
    "truncated PNG": (lambda: picture()[:-60], "unusable-image", "truncated"),
    "truncated JPEG": (lambda: picture("JPEG")[:-200], "unusable-image", "truncated"),
    "JPEG of a header": (lambda: picture("JPEG")[:100], "unusable-image", "truncated"),
    "truncated WebP": (lambda: picture("WEBP")[:-20], "unusable-image", "damaged"),
    "damaged PNG": (lambda: png(40, 30, 8, 2, b"\x78\x9cgarbage"), "unusable-image", "damaged"),
    "PNG of no pixels": (lambda: png(0, 30, 8, 2, zlib.compress(b"")), "unusable-image", "damaged"),
    "animated PNG": (lambda: animated("PNG"), "unusable-image", "animated (3 frames)"),
    "animated WebP": (lambda: animated("WEBP"), "unusable-image", "animated (3 frames)"),
    "PNG of 60,000 px": (lambda: png(60000, 60000, 8, 2, b""), "image-too-large", "60,000 x 60,000 px"),
    "JPEG of 60,000 px": (lambda: jpeg_header(60000, 60000), "image-too-large", "60,000 x 60,000 px"),
    "WebP of 60,000 px": (lambda: webp_header(60000, 60000), "image-too-large", "60,000 x 60,000 px"),
    "PNG bomb": (bomb, "image-too-large", "13,000 px"),
    "bomb of text": (
        lambda: png(40, 30, 8, 2, b"", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50_000_000)))),
        "unusable-image",
        "damaged",
    ),
    "PNG of many chunks": (lambda: many_chunks(15_000), "unusable-image", "parts"),
    "PNG of many IDAT": (lambda: many_chunks(15_000, b"IDAT"), "unusable-image", "parts"),
    "JPEG of many segments": (lambda: many_segments(60_000), "unusable-image", "1,000 parts"),
    "JPEG of many EXIF segments": (lambda: many_segments(20_000, 0xE1, b"Exif\0\0ab"), "unusable-image", "1,000 parts"),
    "JPEG of filling": (
        lambda: picture("JPEG").replace(b"\xff\xdb", b"\xff" * 200_000 + b"\xdb", 1),
        "unusable-image",
        "no segment",
    ),
    "JPEG of garbage": (
        lambda: picture("JPEG").replace(b"\xff\xdb", b"x" * 200_000 + b"\xff\xdb", 1),
        "unusable-image",
        "no segment",
    ),
    "WebP of many chunks": (lambda: many_webp_chunks(30_000), "unusable-image", "1,000 parts"),
    "PNG of many EXIF entries": (
        lambda: many_chunks(1, b"eXIf", many_entries(20_000)[6:]),
        "unusable-image",
        "1,000 EXIF entries",
    ),
    "JPEG of many EXIF entries": (
        lambda: many_segments(1, 0xE1, many_entries(5_000)),
        "unusable-image",
        "1,000 EXIF entries",
    ),
    "WebP of many EXIF entries": (
        lambda: picture("WEBP", exif=many_entries(20_000)),
        "unusable-image",
        "1,000 EXIF entries",
    ),
    "JPEG of 1,000 scans": (lambda: scans(1000), "unusable-image", "scans"),
}
