"""Heat maps for the routes: few calls at a time, each within a time limit, as they take seconds an image."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle
from dermis.errors import RequestError
from dermis.explain.attribution import Method
from services.inference.client import ExplainerClient
from services.inference.heat_maps import HeatMap
from services.problems import ProblemError
from services.settings import Settings

_BUSY = {"Retry-After": "10"}


class HeatMaps:
    """Asks the explainer for heat maps. Use it on one event loop."""

    def __init__(self, settings: Settings, explainer: ExplainerClient) -> None:
        self._settings, self._explainer = settings, explainer
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

    async def make(
        self, bundle: Bundle, method: Method, images: NDArray[np.uint8], disconnected: Callable[[], Awaitable[None]]
    ) -> list[HeatMap]:
        """Heat maps of uint8 [N, S, S, 3], one after the other. ProblemError if they take too long.

        `disconnected` returns when the caller has closed the connection: then, as when the time is over, the call to the
        explainer is cancelled, which ends the computation.
        """
        made: list[HeatMap] = []

        async def make_all() -> None:
            for image in images:
                made.append(await self._explainer.heat_map(bundle, method, image))

        work = asyncio.ensure_future(make_all())
        leaving = asyncio.ensure_future(disconnected())
        seconds = self._settings.heat_map_timeout_seconds
        try:
            await asyncio.wait({work, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
                return made
            if leaving.done():
                raise ProblemError("bad-request", "the caller closed the connection before the heat maps were made")
        finally:
            for task in (work, leaving):
                task.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)
        if len(images) == 1:
            detail = f"the heat map was not ready in {seconds:g} s; the service is busy, try again later"
        else:
            detail = f"{len(made)} of {len(images)} heat maps were ready in {seconds:g} s; send fewer images in a call"
        raise ProblemError("overloaded", detail, headers=_BUSY)
