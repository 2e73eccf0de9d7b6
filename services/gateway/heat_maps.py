"""Heat maps for the routes: few calls at a time, each within a time limit, as they take seconds an image."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle
from dermis.errors import RequestError
from dermis.explain.attribution import Method
from services.gateway.problems import ProblemError
from services.heat_maps import Explain, HeatMap
from services.settings import Settings

_BUSY = {"Retry-After": "10"}


class HeatMaps:
    """Asks the explainer for heat maps. Use it on one event loop."""

    def __init__(self, settings: Settings, explain: Explain) -> None:
        self._settings, self._explain = settings, explain
        self._calls = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the calls in work. ProblemError if all are taken, RequestError if heat maps are switched off."""
        if self._settings.max_heat_map_images == 0:
            raise RequestError("heat_map", "this service makes no heat maps; ask without")
        if self._calls >= self._settings.max_heat_map_calls:
            raise ProblemError("overloaded", "other calls wait for heat maps; try again, or ask without", headers=_BUSY)
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    async def make(self, bundle: Bundle, method: Method, images: NDArray[np.uint8]) -> list[HeatMap]:
        """Heat maps of uint8 [N, S, S, 3], one after the other. ProblemError if they take too long."""
        try:
            async with asyncio.timeout(self._settings.heat_map_timeout_seconds):
                return [await self._explain(bundle, method, image) for image in images]
        except TimeoutError:
            seconds = f"{self._settings.heat_map_timeout_seconds:g} s"
            raise ProblemError(
                "overloaded", f"the heat maps were not ready in {seconds}; send fewer images", headers=_BUSY
            ) from None
