"""A page that shows images beside the training images that are nearest to them, for the owner of the training images."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from dermis.imaging import Images, encode

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 1.5rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; margin: 0 0 .4rem; }
.warning { background: #fdeaea; border-left: .4rem solid #b3261e; padding: .5rem .9rem; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: .8rem; }
article { border: 1px solid #d5dae1; border-radius: .4rem; padding: .6rem .8rem; }
figure { display: inline-block; margin: 0 .5rem 0 0; width: 48%; vertical-align: top; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
img { width: 100%; image-rendering: pixelated; }
.copy { border-color: #b3261e; }
p { margin: .3rem 0; } .note { color: #55606e; font-size: .87rem; max-width: 56rem; }
"""


@dataclass(frozen=True)
class Pair:
    """An image and the training image that is nearest to it.

    Attributes:
        name: Name of the image.
        image: uint8 [R, R, 3].
        training_name: Id of the training image.
        training_image: uint8 [R, R, 3].
        distance: Distance of the image from the nearest training image of the index.
        shown_distance: Distance from the training image that is shown.
        percentile: Share of the training images that have a nearer neighbour, in per cent.
        authentic: Whether the image is authentic.
        changed_copy: Whether the copy detector takes it for a changed copy; None without a detector.
    """

    name: str
    image: Images
    training_name: str
    training_image: Images
    distance: float
    shown_distance: float
    percentile: float
    authentic: bool
    changed_copy: bool | None

    @property
    def is_in_index(self) -> bool:
        """Whether the training image that is shown is as near as the nearest one of the index, up to rounding."""
        return self.shown_distance <= 1.01 * self.distance + 1e-3


def pairs_page(pairs: Sequence[Pair], *, checked: int, source: str, bundle: str) -> str:
    """Make the page. It has no scripts and loads nothing.

    Args:
        pairs: What is shown, in order.
        checked: The number of images that were compared.
        source: Name of the collection of training images.
        bundle: Name of the bundle.
    """
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Nearest training images</title><style>{_STYLE}</style></head><body>
<h1>Nearest training images</h1>
<p class="warning"><strong>This page contains training images.</strong> Handle it like the data of the patients; do not
pass it on.</p>
<p>{len(pairs):,} of {checked:,} images, those that are nearest to a training image of {html.escape(bundle)} first. Left the
image, right the nearest image of {html.escape(source)}.</p>
<p class="note">The percentile is the share of the training images whose own nearest neighbour is nearer than this distance. An
image is authentic if it is farther from its nearest training image than that one is from its own nearest neighbour. Images
have the size at which they were compared.</p>
<div class="pairs">{"".join(map(_article, pairs))}</div>
</body></html>
"""


def _article(pair: Pair) -> str:
    verdict = "authentic" if pair.authentic else "not authentic"
    if pair.changed_copy:
        verdict += ", a changed copy according to the copy detector"
    elsewhere = (
        ""
        if pair.is_in_index
        else f"<p><strong>The nearest training image is not in this collection</strong>: the shown one has the distance "
        f"{pair.shown_distance:.3f}.</p>"
    )
    suspicious = pair.changed_copy or not pair.authentic
    return (
        f"<article{' class=copy' if suspicious else ''}>{_figure(pair.image, pair.name, 'checked image')}"
        f"{_figure(pair.training_image, pair.training_name, 'training image')}"
        f"<p>{verdict}: distance {pair.distance:.3f}, percentile {pair.percentile:.1f}</p>{elsewhere}</article>"
    )


def _figure(image: Images, name: str, kind: str) -> str:
    data = base64.b64encode(encode(image)).decode()
    text = html.escape(name)
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{kind} {text}"><figcaption>{text}</figcaption></figure>'
    )
