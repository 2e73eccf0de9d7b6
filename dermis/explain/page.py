"""A page of heat maps: one HTML file without other files. It shows the images, so it needs the same protection as they do."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from dermis.bundle.classifier import NOTICE, ClassifierDescription
from dermis.explain.attribution import STEPS, Attribution, Method
from dermis.explain.rendering import (
    SALIENT_PERCENT,
    full_colour,
    heat_map,
    legend,
    per_percent,
    salient_mask,
    salient_view,
    to_png,
)
from dermis.html_page import Section, facts_table, html_page, png_picture, whole_width
from dermis.imaging import Images

_WIDTH = 224  # width of a picture on the page, px, at most if it is smaller itself
_METHODS = {
    "xrai": "XRAI (Kapishnikov et al., arXiv 1906.02825): each region has the mean attribution of its pixels. Regions are "
    "selected by how much they raise the probability of the positive class; the last ones can be narrow strips, which mean "
    "little",
    "integrated-gradients": "Integrated gradients (Sundararajan et al., arXiv 1703.01365), smoothed for the picture, as "
    "single pixels are mostly noise",
}


@dataclass(frozen=True)
class Entry:
    """An image of the page. `label` is the true class, or None if it is not known."""

    name: str
    probability: float
    calibrated: float
    class_name: str
    label: str | None
    attribution: Attribution

    @property
    def wrong(self) -> bool:
        """Whether the classifier gave another class than the label."""
        return self.label is not None and self.label != self.class_name


def heat_map_page(
    description: ClassifierDescription,
    method: Method,
    threshold: tuple[str, float],
    entries: Sequence[Entry],
    total: int,
) -> str:
    """Make the page.

    Args:
        description: The classifier.
        method: The method of the attributions.
        threshold: Name and value of the threshold.
        entries: The images, in the order of the page.
        total: Number of images from which they were chosen.
    """
    name, value = threshold
    positive = html.escape(description.positive_class)
    labelled = [entry for entry in entries if entry.label is not None]
    wrong = sum(entry.wrong for entry in entries)
    mistakes = "Misclassified images come first, sorted by confidence in descending order. "
    order = f"{mistakes if labelled else ''}{'Then come those' if labelled else 'First come those'} nearest to the threshold."
    mistake_count = f" {wrong:,} of the {len(labelled):,} with a known class are misclassified." if labelled else ""
    gap = max((abs(entry.attribution.gap) for entry in entries), default=0.0)
    named = f"{value:.4g}" if name == f"{value:g}" else f"{html.escape(name)}, {value:.4g}"
    bar = _picture(legend(), 256, f"colours from lower to higher probability of {description.positive_class}")
    reading = f"""<p class="legend">lowers the probability of {positive} {bar} raises it</p>
<p class="note">First picture: the input of the classifier. Second: what its parts add to the logit of {positive}. Third: the
{SALIENT_PERCENT:g} % of the area that raise its probability most, or more so that regions are complete. Each picture has its
own scale: 95 % of the area are below full colour, whose value is beside the picture, in logits for each 1 % of the area. A heat
map shows what this network computes. It is no evidence about the lesion, and it does not show that the network is right.</p>
"""
    facts = {
        "classifier": f"{html.escape(description.architecture)}, {description.input.size} px, "
        f"<code>{description.digest[:12]}</code>",
        "threshold": f"{named}, on the calibrated probability of {positive}",
        "method": _METHODS[method],
        "baselines": f"a black and a white image, averaged; {STEPS} steps each. The attributions of an image sum up to its "
        f"logit less that of the baselines, here within {gap:.2g}",
    }
    return html_page(
        "Heat maps",
        [
            Section("reading", "How to read it", reading),
            Section("images", "Images", "".join(_figure(entry, description) for entry in entries)),
        ],
        introduction=f"<p>{len(entries):,} of {total:,} images. {order}{mistake_count}</p>\n{facts_table(facts.items())}",
        warnings=[
            f"<strong>{html.escape(NOTICE)}</strong>",
            "<strong>This page shows the images.</strong> Show it only to people who are allowed to see the images; do not "
            "publish it.",
        ],
        interactive=True,
    )


def _figure(entry: Entry, description: ClassifierDescription) -> str:
    attribution, name = entry.attribution, entry.name
    pictures = (
        (attribution.image, f"{name} as the classifier sees it"),
        (heat_map(attribution), f"heat map of {name}"),
        (salient_view(attribution), f"areas of {name} that raise the probability of {description.positive_class} most"),
    )
    shown = "".join(_picture(picture, whole_width(len(picture), _WIDTH), alt) for picture, alt in pictures)
    label = "" if entry.label is None else f"<br>label {html.escape(entry.label)}"
    wrong = ', <span class="wrong">wrong</span>' if entry.wrong else ""
    scale = per_percent(attribution, full_colour(attribution))
    return f"""<figure>{shown}<figcaption><strong>{html.escape(name)}</strong><br>{html.escape(entry.class_name)}, calibrated
{entry.calibrated:.3f} (probability {entry.probability:.3f}){label}{wrong}<br>
<span class="note">logit {attribution.logit:.2f}, of the baselines {attribution.baseline:.2f}<br>
full colour: &plusmn;{scale:.2g} logits for each 1 % of the area<br>third picture:
{100 * salient_mask(attribution).mean():.0f} % of the area</span></figcaption></figure>
"""


def _picture(image: Images, width: int, alt: str) -> str:
    return png_picture(to_png(image), alt, (width, round(width * image.shape[0] / image.shape[1])))
