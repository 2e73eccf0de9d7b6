"""The format between the explainer and its client: one image in, one heat map out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dermis.explain.attribution import Explainer, Method

MEDIA_TYPE = "image/png"


@dataclass(frozen=True)
class EncodedHeatMap:
    """A heat map.

    Attributes:
        content: The picture, PNG.
        scale: The attribution that has full colour, in logits for each 1 % of the area.
    """

    content: bytes
    scale: float


def make(
    explainer: Explainer, method: Method, image: NDArray[np.uint8], check: Callable[[], None] = lambda: None
) -> Mapping[str, Any]:
    """Make a heat map.

    Args:
        explainer: The explainer.
        method: The method of attribution.
        image: uint8 [S, S, 3] at the size of the classifier.
        check: Called between steps; an exception that it raises ends the computation.

    Returns:
        The fields of an `EncodedHeatMap`.
    """
    from dermis.explain.rendering import MIN_SIDE, full_colour, heat_map, per_percent, to_png

    attribution = explainer.attribute(image, method, check=check)
    picture = heat_map(attribution, max(MIN_SIDE, len(attribution.image)))
    return {"content": to_png(picture), "scale": per_percent(attribution, full_colour(attribution))}
