"""What `client.images.generate(...)` returns: images with the latents' coordinates that made them."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from pydantic import Base64Bytes, Field

from dermis_client._foreign import one_line
from dermis_client._writing import write_whole
from dermis_client.errors import DermisError, IntegrityError
from dermis_client.models import Answer, Count, ModelRef

MOST_PIXELS = 200_000_000  # of an image or a sheet: 0.6 GB in memory
_FORMATS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}


def decode(content: bytes, name: str) -> Image.Image:
    """An image file of a service, RGB. Raises IntegrityError, which calls the file `name`."""
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG", "JPEG", "WEBP"])
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        return image.convert("RGB")
    # SyntaxError: Pillow's word for a broken PNG.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise IntegrityError(f"{name}: cannot be decoded ({one_line(str(error))})", name=name) from error


def sheet(pictures: Sequence[Image.Image], across: int, gap: int) -> Image.Image:
    """Pictures row by row, `across` in each, `gap` pixels between them. Raises DermisError if that is nothing or huge."""
    if not pictures:
        raise DermisError("there are no images to lay out")
    if across < 1 or gap < 0:
        raise DermisError("columns: must be at least 1, gap at least 0")
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    down = math.ceil(len(pictures) / across)
    size = (across * (width + gap) - gap, down * (height + gap) - gap)
    if size[0] * size[1] > MOST_PIXELS:
        raise DermisError(f"a sheet of {size[0]} x {size[1]} pixels is too large; save the images one by one")
    laid = Image.new("RGB", size, "white")
    for position, picture in enumerate(pictures):
        row, column = divmod(position, across)
        laid.paste(picture, (column * (width + gap), row * (height + gap)))
    return laid


class GeneratedImage(Answer):
    """One image. Its latent follows from (seed, index); class_name is what it was asked to show."""

    class_name: str = Field(alias="class")
    seed: Count
    index: Count
    media_type: str
    sha256: str
    content: Base64Bytes = Field(alias="b64", repr=False)  # the encoded file, as it would be written to disk

    @property
    def image(self) -> Image.Image:
        """The image, RGB, decoded anew at every access."""
        return decode(self.content, f"image {self.index}")

    @property
    def file_name(self) -> str:
        """A name that tells class, seed and index, such as malignant_1_00000000.png."""
        name = re.sub(r"[^A-Za-z0-9-]+", "-", self.class_name)[:80].strip("-") or "image"
        return f"{name}_{self.seed}_{self.index:08d}.{_FORMATS.get(self.media_type, 'bin')}"

    def check(self) -> None:
        """Raise IntegrityError unless the content has the SHA-256 that the service named."""
        actual = hashlib.sha256(self.content).hexdigest()
        if actual != self.sha256:
            raise IntegrityError(
                f"image {self.index}: arrived with SHA-256 {actual[:12]}..., expected {self.sha256[:12]}...",
                name=str(self.index),
                expected=self.sha256,
                actual=actual,
            )


class ImagesResult(Answer):
    """The images of one call, in order, and the model that made them. A sequence of GeneratedImage."""

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
        """A contact sheet, row by row, near square unless `columns` is given; gap in pixels between images."""
        across = math.ceil(math.sqrt(len(self.data))) if columns is None else columns
        return sheet(self.images, across, gap)

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write every image as it came, under its file_name; returns the paths. Raises DownloadError."""
        root = Path(folder)
        paths = [root / item.file_name for item in self.data]
        for path, item in zip(paths, self.data, strict=True):
            write_whole(path, item.content)
        return paths
