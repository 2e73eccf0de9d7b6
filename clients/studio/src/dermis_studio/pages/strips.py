"""A series of images of the page Explore: a strip, a film that is played from its images, and files of both without loss."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence
from html import escape

from dermis_client import EditedImage
from dermis_client.images import sheet
from PIL import Image

from dermis_studio import markup
from dermis_studio.samples import DETAIL_PIXELS, png

FRAME_MILLISECONDS = 140
_GAP = 2  # pixels between the images of the strip


def drawn(images: Sequence[EditedImage], name: str) -> str:
    """Return a series of images as HTML: beside each other, as a film, and as files.

    Args:
        images: The images of a sweep or an interpolation, in order.
        name: What changes from one image to the next.
    """
    pictures = [image.image for image in images]
    width, height = pictures[0].size
    words = [f"{image.strength or 0:+.2f}" for image in images]
    urls = [markup.data_url(image.content, image.media_type) for image in images]
    shown, file_name = escape(name), re.sub(r"[^\w.+-]+", "-", name)
    cells = "".join(
        f'<figure><img class="ds-pixels" src="{url}" width="{width}" height="{height}" alt="{shown} {each}">'
        f"<figcaption>{each}</figcaption></figure>"
        for url, each in zip(urls, words, strict=True)
    )
    files = (
        ("strip (PNG)", f"{file_name}.png", png(sheet(pictures, len(pictures), _GAP)), "image/png"),
        ("film (WebP)", f"{file_name}.webp", film(pictures), "image/webp"),
        ("images (zip)", f"{file_name}.zip", archive(images), "application/zip"),
    )
    links = "".join(
        f'<a class="ds-button" download="{saved}" href="{markup.data_url(content, kind)}">Save {what}</a>'
        for what, saved, content, kind in files
    )
    return (
        f'<div data-ds-series><div class="ds-strip" tabindex="0" role="group" aria-label="Strip of {shown}">{cells}</div>'
        f'<p class="ds-muted">{width} x {height} px, shown 1:1.</p>{_player(urls[0], (width, height), len(images), shown)}'
        f'<div class="ds-actions">{links}</div>'
        '<p class="ds-muted">All of them are saved without loss: the film and the strip have the colours of the images, '
        "the zip has the files as the service made them.</p></div>"
    )


def _player(first: str, size: tuple[int, int], count: int, name: str) -> str:
    """The film; `studio.js` shows the images of the strip in it. It does not move before it is started."""
    factor = max(1, DETAIL_PIXELS // max(size))
    width, height = factor * size[0], factor * size[1]
    how = "shown 1:1" if factor == 1 else f"enlarged {factor} times (nearest)"
    return (
        f'<figure class="ds-figure ds-player" data-ds-film="{FRAME_MILLISECONDS}" style="width:{width}px"><div>'
        f'<img class="ds-pixels" src="{first}" width="{width}" height="{height}" alt="Film of {name}"></div><figcaption>'
        '<button type="button" class="ds-button" data-ds-play aria-pressed="false">Play film</button>'
        f'<label class="ds-opacity">Image <input type="range" min="1" max="{count}" value="1" data-ds-frame>'
        f"<output>1 of {count}</output></label><span>{how}</span></figcaption></figure>"
    )


def film(pictures: Sequence[Image.Image]) -> bytes:
    """Return a film of images, there and back, as an animated WebP without loss.

    A GIF has 256 colours for each image, which changes the tones of skin.
    """
    content = io.BytesIO()
    frames = [*pictures, *pictures[-2:0:-1]]
    frames[0].save(
        content,
        "WEBP",
        save_all=True,
        append_images=frames[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
        lossless=True,
        quality=50,  # of a lossless file: how much time its compression may take
        method=0,
    )
    return content.getvalue()


def archive(images: Sequence[EditedImage]) -> bytes:
    """Return the files of images as a zip, in their order."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as files:
        for position, image in enumerate(images):
            name = zipfile.ZipInfo(f"{position:02d}_{image.file_name}")  # with a fixed time
            files.writestr(name, image.content)
    return content.getvalue()
