"""The points of the page Map, and how they are sent to the browser, where `assets/embedding_map.js` draws them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dermis_client import EmbeddingMap
from dermis_client.embeddings import Embedding
from dermis_client.synthetic_image import SyntheticImage, xmp_of_sheet
from PIL import Image

from dermis_studio import markup
from dermis_studio.samples import SampleRef, words_of

THUMBNAIL_PIXELS = 64
_COLUMNS = 20  # of the sheet of thumbnails
_PICTURES = (
    f"The pictures are reduced to {THUMBNAIL_PIXELS} px (Lanczos) and are JPEG files of quality 92, so pixels differ slightly; "
    "other pages show the exact image."
)
GENERATED, PROJECTED, OWN = "generated", "projected", "your image"
NOT_KNOWN, NOT_COMPARED = "not known", "not compared"


@dataclass(frozen=True)
class Point:
    """An image on the map.

    Attributes:
        words: What it is.
        source: One of the sources above.
        class_name: Class that it was generated with; "not known" for other images.
        embedding: Where it is, and its verdict.
        thumbnail: The image, at most `THUMBNAIL_PIXELS` large; None if it may not be shown.
        query: The query of other pages that start from it.
        pages: Those pages: path and name.
    """

    words: str
    source: str
    class_name: str
    embedding: Embedding
    thumbnail: Image.Image | None = None
    query: str = ""
    pages: Sequence[tuple[str, str]] = ()


def of_sample(sample: SampleRef, embedding: Embedding, pages: Sequence[tuple[str, str]]) -> Point:
    """Return the point of a generated image."""
    picture = None if embedding.image is None else thumbnail(embedding.image.image)
    return Point(sample.words, GENERATED, sample.class_name, embedding, picture, sample.query, pages)


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image whose longer side has `THUMBNAIL_PIXELS`."""
    factor = THUMBNAIL_PIXELS / max(image.size)
    size = (max(1, round(factor * image.width)), max(1, round(factor * image.height)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def element(known: EmbeddingMap, points: Sequence[Point], chosen: int | None = None) -> str:
    """Return the map as HTML.

    Args:
        known: The map of the model.
        points: The images on it.
        chosen: The image that is chosen at first.
    """
    return (
        f'<ds-embedding-map data-map="{markup.attribute(data(known, points, chosen))}"></ds-embedding-map>'
        f'<p class="ds-muted">{training_words(known)} {_PICTURES}</p>'
    )


def training_words(known: EmbeddingMap) -> str:
    """Say how the training images are shown."""
    training = known.training
    shown = sum(cube.images for cube in training.cubes)
    if training.positions is not None:
        return (
            f"{markup.counted(len(training.positions), 'training image is', 'training images are')} shown as small dots, "
            "because the operator of the service has switched their positions on. Do not pass this page on."
        )
    if not training.cubes:
        return (
            f"{markup.counted(training.counted, 'training image is', 'training images are')} not shown: the operator of the "
            f"service has switched that off, or no part of the map has {training.smallest} of them."
        )
    total = markup.counted(training.counted, "training image")
    return (
        f"Circles: cubes of the map with at least {markup.counted(training.smallest, 'training image')}, together about "
        f"{shown:,} of {total}; "
        "the larger the circle, the more images. Single training images are not shown, because their places could tell who is "
        "among them."
    )


def data(known: EmbeddingMap, points: Sequence[Point], chosen: int | None = None) -> dict[str, Any]:
    """Return what the browser draws."""
    training = known.training
    return {
        "points": [_row(point) for point in points],
        "cubes": [[*cube.centre, cube.images] for cube in training.cubes],
        "side": training.side,
        "positions": training.positions or [],
        "explained": known.explained,
        "sheet": _sheet([point.thumbnail for point in points]),
        "columns": _COLUMNS,
        "pixels": THUMBNAIL_PIXELS,
        "chosen": chosen,
    }


def _row(point: Point) -> dict[str, Any]:
    verdict = point.embedding.verdict
    row: dict[str, Any] = {
        "id": point.words,
        "source": point.source,
        "class": point.class_name,
        "verdict": NOT_COMPARED,
        "at": [round(value, 4) for value in point.embedding.position],
        "picture": point.thumbnail is not None,
        "links": [[f"{path}?{point.query}", name] for path, name in point.pages],
    }
    if verdict is not None:
        row["verdict"] = words_of(verdict.authentic, verdict.percentile, verdict.copy_detected)[0]
        row |= {"distance": verdict.distance, "percentile": verdict.percentile}
    return row


def _sheet(pictures: Sequence[Image.Image | None]) -> str | None:
    """Return all thumbnails as one image, in the order of the points."""
    if not any(picture is not None for picture in pictures):
        return None
    rows = -(-len(pictures) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * THUMBNAIL_PIXELS, rows * THUMBNAIL_PIXELS))
    for number, picture in enumerate(pictures):
        if picture is not None:
            row, column = divmod(number, _COLUMNS)
            left = column * THUMBNAIL_PIXELS + (THUMBNAIL_PIXELS - picture.width) // 2
            top = row * THUMBNAIL_PIXELS + (THUMBNAIL_PIXELS - picture.height) // 2
            sheet.paste(picture, (left, top))
    synthetic = [picture for picture in pictures if isinstance(picture, SyntheticImage)]
    if synthetic:
        real = any(picture is not None and not isinstance(picture, SyntheticImage) for picture in pictures)
        sheet = SyntheticImage.of(sheet, xmp_of_sheet(synthetic, with_real=real))
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=92, subsampling=0)
    return markup.data_url(content.getvalue(), "image/jpeg")
