"""Comparing images with the training images of a model, for the routes that do it while the caller waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dermis.authenticity.index import Nearest
from dermis.bundle import Bundle
from dermis.bundle.index import IndexDescription
from dermis.classifier.preprocess import batch
from dermis.errors import RequestError
from dermis.imaging import Images, as_rgb
from services.gateway.dependencies import Context, limited_time
from services.inference.pixels import Comparison
from services.inference.samples import Image


def comparisons(images: int) -> dict[str, int]:
    """What comparing images needs of quotas. They stay counted if the comparison fails."""
    return {"authenticity_per_minute": images, "authenticity_per_day": images}


async def inputs_of(context: Context, images: Sequence[Image], index: IndexDescription) -> Images:
    """Generated images at the size of the network of an index, uint8 [N, R, R, 3]. They are resized in a thread."""
    return await context.image_threads.run(lambda: batch(as_rgb(np.stack(images)), index.resolution))


async def nearest_of(context: Context, bundle: Bundle, inputs: Images, comparison: Comparison) -> Nearest:
    """The comparison of images with the training images, within the limit of time.

    Raises:
        ProblemError: It takes too long.
    """
    async with limited_time(context, "the comparison is busy; try again"):
        return await context.inference.authenticity.nearest(bundle, inputs, comparison)


def index_of(bundle: Bundle, field: str = "model") -> IndexDescription:
    """The index of a bundle.

    Args:
        bundle: The bundle.
        field: The field of the request that needs the index.

    Raises:
        RequestError: It has none.
    """
    if bundle.authenticity is None:
        raise RequestError(field, f"{bundle.name} has no index; /v1/models shows which models have one", "no-index")
    return bundle.authenticity
