"""Results of `client.images.generate(...)`, and functions to decode and arrange images."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from pydantic import Base64Bytes, Field

from dermis_client import _notebook
from dermis_client._files import check_sha256, write_atomically
from dermis_client._untrusted import one_line
from dermis_client.errors import DermisError, IntegrityError
from dermis_client.models import Count, ModelRef, ResponseRecord
from dermis_client.synthetic_image import SyntheticImage, xmp_of_sheet

__all__ = ["MAX_PIXELS", "GeneratedImage", "ImagesResult", "SyntheticImage", "decode", "sheet", "xmp_of_sheet"]
MAX_PIXELS = 200_000_000  # maximum size of an image or a sheet; 0.6 GB in memory
_FORMATS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


def decode(content: bytes, name: str) -> Image.Image:
    """Decode an image file of a service to RGB. Its `save` writes the XMP of the file.

    Args:
        content: PNG, JPEG or WebP.
        name: Name of the file in the error message.

    Raises:
        IntegrityError: It cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"])
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        return SyntheticImage.of(image.convert("RGB"))
    # SyntaxError: raised by Pillow for a broken PNG.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise IntegrityError(f"{name}: cannot be decoded ({one_line(str(error))})", name=name) from error


def sheet(images: Sequence[Image.Image], columns: int, gap: int) -> Image.Image:
    """Arrange images row by row on a white sheet. Its `save` writes XMP which says that it is synthetic.

    Args:
        images: The images.
        columns: Images in a row.
        gap: Pixels between images.

    Raises:
        DermisError: There are no images, or the sheet is too large.
    """
    if not images:
        raise DermisError("there are no images to arrange")
    if columns < 1 or gap < 0:
        raise DermisError("columns: must be at least 1, gap at least 0")
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    if size[0] * size[1] > MAX_PIXELS:
        raise DermisError(f"a sheet of {size[0]} x {size[1]} pixels is too large; save the images separately")
    result = Image.new("RGB", size, "white")
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        result.paste(image, (column * (width + gap), row * (height + gap)))
    return SyntheticImage.of(result, xmp_of_sheet(images))


class GeneratedImage(ResponseRecord):
    """One generated image.

    Attributes:
        class_name: The requested class.
        seed: With `index`, determines latent and noise.
        index: Index of the image.
        media_type: Media type of the content.
        sha256: SHA-256 of the content, in hex.
        canonical_sha256: That of the content without its signed manifest (C2PA), which the same request gives again; None if
            the image is not signed.
        passed: Whether the image meets the condition of `privacy`; None if the request had none.
        content: The encoded image file.
    """

    class_name: str = Field(alias="class")
    seed: Count
    index: Count
    media_type: str
    sha256: str
    canonical_sha256: str | None = None
    passed: bool | None = None
    content: Base64Bytes = Field(alias="b64", repr=False)

    @property
    def image(self) -> Image.Image:
        """The image in RGB, decoded at every access. Saving it keeps its XMP."""
        return decode(self.content, f"image {self.index}")

    @property
    def file_name(self) -> str:
        """A name of class, seed and index, such as malignant_1_00000000.png."""
        name = re.sub(r"[^A-Za-z0-9-]+", "-", self.class_name)[:80].strip("-") or "image"
        return f"{name}_{self.seed}_{self.index:08d}.{_FORMATS.get(self.media_type, 'bin')}"

    def check(self) -> None:
        """Compare the content with the SHA-256 that the service sent.

        Raises:
            IntegrityError: They differ.
        """
        check_sha256(self.content, self.sha256, f"image {self.index}", str(self.index))

    def _repr_html_(self) -> str:
        """The image in a notebook, at most 128 px large."""
        return _notebook.image_html(self.image, f"{self.class_name}, seed {self.seed}, index {self.index}, synthetic")


class ImagesResult(ResponseRecord):
    """The images of one call, in order, and the model that generated them: a sequence of GeneratedImage."""

    model: ModelRef
    data: list[GeneratedImage]

    def __iter__(self) -> Iterator[GeneratedImage]:  # type: ignore[override]  # pydantic's own iterates over fields
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, position: int) -> GeneratedImage:
        return self.data[position]

    @property
    def images(self) -> list[Image.Image]:
        """All images, decoded."""
        return [item.image for item in self.data]

    def grid(self, columns: int | None = None, *, gap: int = 2) -> Image.Image:
        """Arrange the images on a contact sheet, row by row.

        Args:
            columns: Images in a row; by default the sheet is nearly square.
            gap: Pixels between images.

        Returns:
            The sheet in RGB. Saving it writes XMP which says that it is synthetic.

        Raises:
            DermisError: There are no images, or the sheet is too large.
            IntegrityError: An image cannot be decoded.
        """
        width = math.ceil(math.sqrt(len(self.data))) if columns is None else columns
        return sheet(self.images, width, gap)

    def _repr_html_(self) -> str:
        """The first images in a notebook, on one sheet."""
        return _notebook.sheet_html(
            [lambda item=item: item.image for item in self.data],  # type: ignore[misc]
            lambda images: sheet(images, 8, 2),
            f"{len(self.data):,} synthetic images of {self.model.name}",
        )

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every image file, unchanged, under its `file_name`.

        Args:
            folder: The folder, which is created.

        Returns:
            The paths.

        Raises:
            DownloadError: A file cannot be written.
        """
        root = Path(folder)
        paths = [root / item.file_name for item in self.data]
        for path, item in zip(paths, self.data, strict=True):
            write_atomically(path, item.content)
        return paths
