"""A page that shows images beside the training images that are nearest to them, for the owner of the training images."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from dermis.html_page import Section, html_page, picture, whole_width
from dermis.imaging import Images

_WIDTH = 256  # width of an image on the page, px, at most if it is smaller itself


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
    """Make the page.

    Args:
        pairs: What is shown, in order.
        checked: The number of images that were compared.
        source: Name of the collection of training images.
        bundle: Name of the bundle.
    """
    introduction = f"""<p>{len(pairs):,} of {checked:,} images, those that are nearest to a training image of
{html.escape(bundle)} first. Left the image, right the nearest image of {html.escape(source)}.</p>
<p class="note">The percentile is the share of the training images whose own nearest neighbour is nearer than this distance. An
image is authentic if it is farther from its nearest training image than that one is from its own nearest neighbour. Images
have the size at which they were compared.</p>"""
    return html_page(
        "Nearest training images",
        [Section("pairs", "Pairs", f'<div class="cards wide">{"".join(map(_article, pairs))}</div>')],
        introduction=introduction,
        warnings=[
            "<strong>This page contains training images.</strong> Handle it like the data of the patients; do not pass it on."
        ],
        interactive=True,
    )


def _article(pair: Pair) -> str:
    verdict = "Authentic" if pair.authentic else "Not authentic"
    changed = "<p>A changed copy, according to the copy detector.</p>" if pair.changed_copy else ""
    elsewhere = (
        ""
        if pair.is_in_index
        else f"<p><strong>The nearest training image is not in this collection</strong>: the shown one has the distance "
        f"{pair.shown_distance:.3f}.</p>"
    )
    suspicious = pair.changed_copy or not pair.authentic
    card, heading = (' alert"', ' class="wrong"') if suspicious else ('"', "")
    return (
        f'<article class="card{card}><h3{heading}>{verdict}</h3>'
        f"<p>Distance {pair.distance:.3f}, percentile {pair.percentile:.1f}</p>{changed}{elsewhere}"
        f'<div class="pair">{_figure(pair.image, pair.name, "checked image")}'
        f"{_figure(pair.training_image, pair.training_name, 'training image')}</div></article>"
    )


def _figure(image: Images, name: str, kind: str) -> str:
    shown = picture(image, f"{kind} {name}", width=whole_width(image.shape[1], _WIDTH))
    return f"<figure>{shown}<figcaption>{html.escape(name)}</figcaption></figure>"
