"""Results of `client.images.generate_pixels(...)`: the pixels of several images, without an encoder and a decoder of images."""

from __future__ import annotations

import ast
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL import Image
from pydantic import Field

from dermis_client._untrusted import load_json, one_line
from dermis_client.errors import DermisError, IntegrityError
from dermis_client.images import MAX_PIXELS, ImagesResult
from dermis_client.models import Count, ModelRef, ResponseRecord
from dermis_client.synthetic_image import SyntheticImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MEDIA_TYPE = "application/x-npz"
_METADATA, _XMP, _IMAGES = "metadata.json", "images.xmp", "images.npy"
_MAGIC = b"\x93NUMPY\x01\x00"
_LOCAL_HEADER_BYTES = 30
_MAX_METADATA_BYTES = 16 << 20


class PixelSample(ResponseRecord):
    """One image of a PixelsResult.

    Attributes:
        class_name: The requested class.
        seed: With `index`, determines latent and noise.
        index: Index of the image.
        passed: Whether the image meets the condition of `privacy`; None if the request had none.
    """

    class_name: str = Field(alias="class")
    seed: Count
    index: Count
    passed: bool | None = None


class _Metadata(ResponseRecord):
    model: ModelRef
    data: list[PixelSample]


@dataclass(frozen=True)
class PixelsResult:
    """The images of one call as pixels, in order, and the model that generated them.

    Attributes:
        model: The model.
        data: Class, seed and index of each image, and the result of the gate.
        width: Pixels in a row.
        height: Rows of an image.
        content: The pixels, which cannot be changed: the images in order, each row by row, with 3 bytes (RGB) for each pixel.
        xmp: What image files of these images say of their origin, among it that they are synthetic.
    """

    model: ModelRef
    data: Sequence[PixelSample]
    width: int
    height: int
    content: memoryview = field(repr=False)
    xmp: bytes = field(default=b"", repr=False)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def array(self) -> NDArray[np.uint8]:
        """The pixels as uint8 [N, height, width, 3], without a copy, so they cannot be changed. Needs NumPy."""
        try:
            import numpy as np
        except ImportError as error:
            raise DermisError(f"array needs NumPy ({error}): pip install numpy") from error
        return np.frombuffer(self.content, np.uint8).reshape(len(self.data), self.height, self.width, 3)

    def image(self, position: int) -> Image.Image:
        """Return an image in RGB. What is saved of it says in XMP that it is synthetic.

        Raises:
            IndexError: There is no such image.
        """
        size = self.width * self.height * 3
        start = range(len(self.data))[position] * size
        pixels = Image.frombytes("RGB", (self.width, self.height), self.content[start : start + size])
        return SyntheticImage.of(pixels, self.xmp)


def read_pixels(content: bytes) -> PixelsResult:
    """Read a response of the media type `MEDIA_TYPE`.

    Raises:
        IntegrityError: It is incomplete or damaged.
        ValueError: It is not what a service sends; the message says why.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError) as error:
        raise _damaged(str(error)) from error
    metadata = _Metadata.model_validate(load_json(bytes(_member(content, members, _METADATA, _MAX_METADATA_BYTES))))
    xmp = bytes(_member(content, members, _XMP, _MAX_METADATA_BYTES))
    array = _member(content, members, _IMAGES, len(content))
    (number, height, width), pixels = _unpacked(array)
    if number != len(metadata.data):
        raise ValueError(f"there are {number} images, and {len(metadata.data)} classes of images")
    return PixelsResult(metadata.model, metadata.data, width, height, pixels, xmp)


def pixels_of(result: ImagesResult) -> PixelsResult:
    """Decode the image files of a service that sends no pixels.

    Raises:
        IntegrityError: An image cannot be decoded.
        ValueError: The images differ in size, or there are none.
    """
    images = result.images
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images of one size were expected, not of {len(sizes)}")
    data = [
        PixelSample(**{"class": item.class_name}, seed=item.seed, index=item.index, passed=item.passed)
        for item in result
    ]
    (width, height), xmp = sizes.pop(), images[0].info.get("xmp", b"")
    pixels = memoryview(b"".join(image.tobytes() for image in images))
    return PixelsResult(result.model, data, width, height, pixels, xmp)


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(f"the pixels of the images arrived incomplete or damaged ({one_line(reason)})", name=_IMAGES)


def _member(content: bytes, members: Mapping[str, zipfile.ZipInfo], name: str, max_bytes: int) -> memoryview:
    """Return the bytes of a member that is stored without compression, as a part of the archive: a copy takes time.

    Raises:
        IntegrityError: It is incomplete, or its CRC-32 differs.
        ValueError: There is none, or it is compressed.
    """
    info = members.get(name)
    if info is None:
        raise ValueError(f"the archive of pixels has no {name}")
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    if not stored or info.flag_bits & 1 or info.file_size > max_bytes:
        raise ValueError(f"{name} of the archive of pixels is compressed, encrypted or too large")
    head = content[info.header_offset : info.header_offset + _LOCAL_HEADER_BYTES]
    # The header before the content ends with the lengths of the name and of further fields, which follow it.
    start = (
        info.header_offset + len(head) + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    )
    data = memoryview(content)[start : start + info.file_size]
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise _damaged(f"the CRC-32 of {name} differs")
    return data


def _unpacked(array: memoryview) -> tuple[tuple[int, int, int], memoryview]:
    """Return (number, height, width) and the pixels of a .npy file of RGB images, without NumPy."""
    if array[: len(_MAGIC)] != _MAGIC or len(array) < 10:
        raise ValueError(f"{_IMAGES} is no array in version 1.0 of NumPy's format")
    end = 10 + int.from_bytes(array[8:10], "little")
    try:
        header = ast.literal_eval(bytes(array[10:end]).decode("latin-1"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        header = None
    shape = header.get("shape") if isinstance(header, dict) else None
    if not isinstance(shape, tuple) or header != {"descr": "|u1", "fortran_order": False, "shape": shape}:
        raise ValueError(f"{_IMAGES} is no array of uint8 in C order")
    if len(shape) != 4 or shape[3] != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{_IMAGES} has the shape {shape}, not [images, height, width, 3]")
    number, height, width, _ = shape
    if height * width > MAX_PIXELS:
        raise ValueError(f"{_IMAGES} has images of {width} x {height} pixels")
    if len(array) - end != number * height * width * 3:
        raise ValueError(f"{_IMAGES} has {len(array) - end} bytes of pixels, not those of the shape {shape}")
    return (number, height, width), array[end:]
