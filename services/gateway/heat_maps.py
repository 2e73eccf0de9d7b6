"""Heat maps for the routes, within a time limit: a heat map takes seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle
from dermis.errors import RequestError
from dermis.explain.attribution import Method
from services.inference.client import ExplainerClient
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

    async def make(
        self, bundle: Bundle, method: Method, images: NDArray[np.uint8], disconnected: Callable[[], Awaitable[None]]
    ) -> list[EncodedHeatMap]:
        """Make heat maps, one after the other.

        When the time is over or the caller has closed the connection, the call of the explainer is cancelled, which ends the
        computation.

        Args:
            bundle: A bundle with a classifier.
            method: The method of attribution.
            images: uint8 [N, S, S, 3] at the size of the classifier.
            disconnected: Returns when the caller has closed the connection.

        Raises:
            ProblemError: If the heat maps take too long, or the caller has closed the connection.
        """
        pictures: list[EncodedHeatMap] = []

        async def make_all() -> None:
            for image in images:
                pictures.append(await self._explainer.heat_map(bundle, method, image))

        work = asyncio.ensure_future(make_all())
        disconnection = asyncio.ensure_future(disconnected())
        seconds = self._settings.heat_map_timeout_seconds
        try:
            await asyncio.wait({work, disconnection}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return pictures
            if disconnection.done():
                raise ProblemError("bad-request", "the caller closed the connection before the heat maps were made")
        finally:
            for task in (work, disconnection):
                task.cancel()
            await asyncio.gather(work, disconnection, return_exceptions=True)
        if len(images) == 1:
            detail = f"the heat map was not ready in {seconds:g} s; the service is busy, try again later"
        else:
            detail = (
                f"{len(pictures)} of {len(images)} heat maps were ready in {seconds:g} s; send fewer images in a call"
            )
        raise ProblemError("overloaded", detail, headers=_BUSY)
