"""How records and images look in a notebook: small pieces of HTML that contain everything and fetch nothing.

All text is escaped, as names come from the service. Images are decoded and encoded again, never passed on as they are.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dermis_client._untrusted import one_line

if TYPE_CHECKING:
    from PIL import Image

    from dermis_client.models import DatasetRecord

SHOWN = 24  # images of a result
SIDE = 128  # largest side of an image, px
_CLASSES = 8  # classes of a dataset that are listed


def text(value: object, limit: int = 120) -> str:
    """Return a value as escaped HTML of one line."""
    return html.escape(one_line(str(value), limit))


def picture(image: Image.Image, alt: str) -> str:
    """Return an image as an <img> element whose data it contains: JPEG, with the XMP of a `SyntheticImage`."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="{text(alt)}">'


def thumbnail(image: Image.Image) -> Image.Image:
    """Return an image whose sides have at most SIDE px."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return small


def image_html(image: Image.Image, caption: str) -> str:
    """Return an image with a line of text below it."""
    return f"<figure>{picture(thumbnail(image), caption)}<figcaption>{text(caption)}</figcaption></figure>"


def sheet_html(
    images: Sequence[Callable[[], Image.Image]],
    arrange: Callable[[Sequence[Image.Image]], Image.Image],
    caption: str,
    columns: int = 1,
) -> str:
    """Return the first images of a result on one sheet.

    Args:
        images: Decodes each of them.
        arrange: Makes a sheet of the images that are shown.
        caption: The line of text below it.
        columns: Images of a row, which are shown together.
    """
    if not images:
        return f"<p>{text(caption)}</p>"
    shown = images[: columns * max(SHOWN // columns, 1)][: 4 * SHOWN]
    more = f" (the first {len(shown)} are shown)" if len(images) > len(shown) else ""
    sheet = arrange([thumbnail(decode()) for decode in shown])
    return f"<figure>{picture(sheet, caption)}<figcaption>{text(caption + more, 200)}</figcaption></figure>"


def dataset_html(record: DatasetRecord) -> str:
    """Return a dataset as a small table."""
    request = record.request
    counts = dict(request.classes)
    classes = ", ".join(f"{count:,} {one_line(name, 40)}" for name, count in list(counts.items())[:_CLASSES])
    if len(counts) > _CLASSES:
        classes += f" and {len(counts) - _CLASSES} more classes"
    progress = record.progress
    rows: dict[str, object] = {
        "dataset": record.id,
        "state": record.state,
        "images": f"{progress.samples_done:,} of {sum(counts.values()):,}",
        "classes": classes,
        "model": record.model.name if record.model is not None else request.model,
        "seed": request.seed,
        "format": request.format,
    }
    if record.error is not None:
        rows["error"] = record.error.detail or record.error.title
    return table(rows)


def table(rows: Mapping[str, object]) -> str:
    """Return names and values as a table."""
    body = "".join(
        f'<tr><th style="text-align:left">{text(name)}</th><td style="text-align:left">{text(value, 600)}</td></tr>'
        for name, value in rows.items()
    )
    return f"<table>{body}</table>"
