"""One self-contained, interactive page of an embedding: rotate, zoom, colour, search, nearest neighbours.

The page works without a network. Its thumbnails are one WebP picture (sprite) of at most 8,192 px a side: 28,900 images of
48 px, or 65,536 of 32 px.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.bundle.classifier import NOTICE, ClassifierDescription
from dermis.errors import DataError
from dermis.explain.embeddings import GENERATED, Embedded, origin_of_items
from dermis.html_page import page_colours
from dermis.imaging import Images, contact_sheet, encode

SPRITE_SIDE = 8192  # px; all browsers, and TensorBoard, can decode it
NEIGHBOURS = 9
UNKNOWN = "unknown"
QUALITY = 75
_RIGHT, _WRONG = "#8fa3b5", "#d5003c"


def embeddings_page(
    embedded: Embedded,
    positions: NDArray[np.float32],
    similarities: NDArray[np.float32],
    neighbours: NDArray[np.int64],
    description: ClassifierDescription,
    *,
    title: str,
    threshold: float,
    reasons: Sequence[str] | None = None,
) -> str:
    """Make the page.

    Args:
        embedded: The images.
        positions: Positions [N, 3] in the unit ball.
        similarities: Similarities [N, K] to the nearest neighbours, by cosine of features.
        neighbours: Their indices [N, K].
        description: The classifier.
        title: Title of the page.
        threshold: Threshold of the calibrated probability.
        reasons: Why each image is an edge case, "" if it is not one.

    Raises:
        DataError: The thumbnails do not fit into one picture.
    """
    items = embedded.items
    picture = encode(sprite(embedded.thumbnails), "webp", QUALITY, origin_of_items(items))
    real = any(item.kind != GENERATED for item in items)
    predicted = [description.class_at(p, threshold) for p in embedded.calibrated]
    classified = [
        UNKNOWN if not item.class_name else "right" if item.class_name == prediction else "wrong"
        for item, prediction in zip(items, predicted, strict=True)
    ]
    categories = [
        _category("kind", [item.kind for item in items]),
        _category("class", [item.class_name for item in items], description.class_names),
        _category("predicted", predicted, description.class_names),
        _category("classified", classified, colours={"right": _RIGHT, "wrong": _WRONG, UNKNOWN: _RIGHT}),
        _category("source", [item.source for item in items]),
        _category("part", [item.part for item in items]),
    ]
    if reasons is not None:
        categories.append(_category("edge case", [reason or "none" for reason in reasons], colours={"none": _RIGHT}))
    data = {
        "title": title,
        "real": real,
        "warning": (
            "This page shows training images, or images of patients. Show it only to people who are allowed to see the data; "
            "do not publish it or add it to a bundle."
            if real
            else "All images of this page are generated: they show no patient."
        ),
        "notice": f"{NOTICE} Classifier: {description.architecture}, {description.digest[:12]}.",
        "ids": [item.id for item in items],
        "side": int(embedded.thumbnails.shape[1]),
        "columns": _columns(len(items)),
        "sprite": "data:image/webp;base64," + base64.b64encode(picture).decode(),
        "positions": _packed(positions, np.float32),
        "k": int(neighbours.shape[1]),
        "neighbours": _packed(neighbours, np.uint32),
        "similarities": _packed(similarities, np.float32),
        "categories": categories,
        "numbers": [
            {
                "name": "probability",
                "values": _packed(embedded.calibrated, np.float32),
                "low": 0,
                "high": 1,
                "note": f"calibrated, of {description.positive_class}; threshold {threshold:.3g}",
            }
        ],
        "colour": "class",
    }
    template = files("dermis.explain").joinpath("embeddings_page.html").read_text(encoding="utf-8")
    template = template.replace("{{colours}}", page_colours())
    # "<" would let an id end the script element that holds the JSON.
    return template.replace("{{data}}", json.dumps(data).replace("<", "\\u003c"))


def sprite(thumbnails: Images) -> Images:
    """Arrange thumbnails uint8 [N, T, T, 3] in one picture that is nearly square.

    Raises:
        DataError: The picture would be too large.
    """
    count, side = thumbnails.shape[:2]
    columns = _columns(count)
    if columns * side > SPRITE_SIDE:
        fit = (SPRITE_SIDE // side) ** 2
        smaller = SPRITE_SIDE // columns
        raise DataError(
            f"thumbnail: {count:,} images of {side} px do not fit on one page, {fit:,} do; give fewer images or "
            f"--thumbnail {smaller}"
        )
    return contact_sheet(thumbnails, columns, padding=0)


def _columns(count: int) -> int:
    return math.isqrt(count - 1) + 1


def _category(
    name: str, values: Sequence[str], first: Sequence[str] = (), colours: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Encode a column. Labels are in the order of `first`, then of the alphabet, with "unknown" last; codes are uint16 [N]."""
    named = [value or UNKNOWN for value in values]
    present = set(named)
    others = sorted(present - set(first) - {UNKNOWN})
    labels = [label for label in first if label in present] + others + [UNKNOWN] * (UNKNOWN in present)
    if len(labels) > np.iinfo(np.uint16).max:
        raise DataError(f"{name}: {len(labels):,} different values are more than a page can show")
    code = {label: k for k, label in enumerate(labels)}
    category: dict[str, Any] = {
        "name": name,
        "labels": labels,
        "codes": _packed(np.array([code[value] for value in named]), np.uint16),
    }
    if colours is not None:
        palette = iter(("#d55e00", "#cc79a7", "#e69f00", "#009e73", "#56b4e9", "#882255", "#0072b2"))
        category["colours"] = [colours[label] if label in colours else next(palette) for label in labels]
    return category


def _packed(values: NDArray[Any], dtype: type[np.generic]) -> str:
    """Encode numbers in base64 and little-endian, as JavaScript's typed arrays store them."""
    return base64.b64encode(np.ascontiguousarray(values).astype(np.dtype(dtype).newbyteorder("<")).tobytes()).decode()
