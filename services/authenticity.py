"""The index of training images as a BentoML service: rows of pixels in, distances out, calls of many callers batched together.

Like the generator it takes pickled bodies and listens on a socket file of the deployment only. It says how near the nearest
training image is, never which one.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from typing import Any

import bentoml
import numpy as np

from dermis.authenticity.attack import exposure
from dermis.authenticity.checker import Checker
from dermis.bundle.folder import exists
from dermis.bundle.index import DESCRIPTOR
from dermis.cpus import available_cpus
from dermis.errors import DermisError
from services import logs, pixels
from services.data_folder import restrict_new_files
from services.models import locate, without_place
from services.orphans import exit_with_parent
from services.settings import settings_of_process

logger = logging.getLogger("dermis.authenticity")

CALL_SECONDS = 300.0
_settings = settings_of_process()


@bentoml.service(
    name="Authenticity",
    workers=_settings.authenticity_workers,
    traffic={"timeout": CALL_SECONDS},
    # As for the generator: calls in flight would be cut off otherwise.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    logging={"access": {"enabled": False}},
)
class Authenticity:
    """The index of every served bundle that has one. One that cannot be loaded leaves the others at work."""

    def __init__(self) -> None:
        logs.configure(_settings.log_level)
        exit_with_parent()
        restrict_new_files()
        threads = max(1, available_cpus() // _settings.authenticity_workers)
        self._checkers: dict[str, Checker] = {}
        self._problems: list[str] = []
        for location in locate(_settings.bundles):
            if not exists(f"{location.rstrip('/')}/authenticity", DESCRIPTOR):
                continue
            started = time.perf_counter()
            try:
                checker = Checker(location, device=_settings.device, threads=threads)
            except (DermisError, OSError, RuntimeError, MemoryError) as error:
                logger.error("index not loaded", extra={"location": location, "error": str(error)})
                self._problems.append(without_place(error, location))
                continue
            # By its own digest, which the bundle that the gateway has verified names.
            self._checkers[checker.description.digest] = checker
            logger.info("index loaded", extra=dict(checker.identity) | {"seconds": time.perf_counter() - started})

    # As in the generator: the latency is the age at which BentoML sheds a call.
    @bentoml.api(batchable=True, max_batch_size=_settings.max_batch_size, max_latency_ms=int(CALL_SECONDS * 1000))
    def nearest(self, rows: np.ndarray) -> list[Any]:  # BentoML reads these types
        """uint8 rows (`services.pixels`) -> float32 [2 + dim] each, or a reason for want of one."""
        return list(pixels.find_nearest(self._checkers, rows))

    @bentoml.api
    def expose(self, digest: str, embeddings: np.ndarray) -> dict[str, Any]:
        """float32 [N, dim] of a whole dataset -> the fields of an Exposure, or "problem" with the reason."""
        checker = self._checkers.get(digest)
        if checker is None:
            return {"problem": f"the service has no index {digest[:12]}; restart the service to load it"}
        return asdict(exposure(checker.index, embeddings))

    @bentoml.api
    async def describe(self) -> dict[str, Any]:  # on the event loop: probes do not wait for a batch to end
        """What is loaded: {"identities": {digest: identity}, "problems": [...]}."""
        identities = {digest: dict(checker.identity) for digest, checker in self._checkers.items()}
        return {"identities": identities, "problems": self._problems}
