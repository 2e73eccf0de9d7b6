"""The format between gateway and explainer: one image in, one picture out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle

if TYPE_CHECKING:
    from dermis.explain.attribution import Explainer, Method

MEDIA_TYPE = "image/png"


@dataclass(frozen=True)
class HeatMap:
    """A picture, PNG, and the size of an attribution that has full colour, in logits for each 1 % of the area."""

    content: bytes
    scale: float


Explain = Callable[[Bundle, "Method", NDArray[np.uint8]], Awaitable[HeatMap]]
"""(bundle with a classifier, method, uint8 [S, S, 3]) -> its heat map."""


def make(
    explainer: Explainer, method: Method, image: NDArray[np.uint8], check: Callable[[], None] = lambda: None
) -> Mapping[str, Any]:
    """The fields of a HeatMap. `check` is called between steps; an exception from it gives the work up."""
    from dermis.explain.rendering import LEAST_SIDE, full_colour, heat_map, per_percent, to_png

    attribution = explainer.attribute(image, method, check=check)
    picture = heat_map(attribution, max(LEAST_SIDE, len(attribution.image)))
    return {"content": to_png(picture), "scale": per_percent(attribution, full_colour(attribution))}
