"""Heat maps for the routes, within a time limit: a heat map takes seconds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle
from dermis.errors import RequestError
from dermis.explain.attribution import Method
from services.inference.client import ExplainerClient
from services.inference.connection import time_limit
from services.inference.heat_maps import EncodedHeatMap
from services.problems import ProblemError
from services.settings import Settings

_BUSY = {"Retry-After": "10"}


class HeatMaps:
    """Calls the explainer. Use it on one event loop."""

    def __init__(self, settings: Settings, explainer: ExplainerClient) -> None:
        self._settings, self._explainer = settings, explainer

    def check_enabled(self) -> None:
        """Refuse calls if heat maps are switched off.

        Raises:
            RequestError: If they are.
        """
        if self._settings.max_heat_map_images == 0:
            raise RequestError("heat_map", "this service makes no heat maps; leave heat_map out")

    async def make(self, bundle: Bundle, method: Method, images: NDArray[np.uint8]) -> list[EncodedHeatMap]:
        """Make heat maps, one after the other.

        When the time is over or the caller is cancelled, the call of the explainer is cancelled, which ends the computation.

        Args:
            bundle: A bundle with a classifier.
            method: The method of attribution.
            images: uint8 [N, S, S, 3] at the size of the classifier.

        Raises:
            ProblemError: If the heat maps take too long.
        """
        pictures: list[EncodedHeatMap] = []
        seconds = self._settings.heat_map_timeout_seconds
        try:
            async with time_limit(seconds):
                for image in images:
                    pictures.append(await self._explainer.heat_map(bundle, method, image))
        except TimeoutError:
            if len(images) == 1:
                detail = f"the heat map was not ready in {seconds:g} s; the service is busy, try again later"
            else:
                detail = f"{len(pictures)} of {len(images)} heat maps were ready in {seconds:g} s; send fewer images in a call"
            raise ProblemError("overloaded", detail, headers=_BUSY) from None
        return pictures
