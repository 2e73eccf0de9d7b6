"""The index of training images as a BentoML service: rows of pixels in, distances out.

Calls of several callers run as one batch. It returns the distance to the nearest training image and never which one that is.
The map of the training images has counts of them, and positions only if the operator has switched these on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import bentoml
import numpy as np

from dermis.authenticity.attack import exposure
from dermis.authenticity.checker import Checker
from dermis.authenticity.training_map import TrainingMap, training_map
from dermis.bundle import Bundle
from dermis.bundle.folder import exists
from dermis.bundle.index import DESCRIPTOR
from dermis.cpus import available_cpus
from services.callers import CALLER_GONE, caller_has_disconnected
from services.inference import pixels
from services.inference.base import InferenceService, batch_api, inference_service, part_folder
from services.inference.dispatching import BatchDispatcher, measured_batch
from services.settings import settings_of_process

_settings = settings_of_process()


@inference_service("Authenticity", _settings.authenticity_workers, threads=2)  # one of them for `expose`
class AuthenticityService(InferenceService[Checker]):
    """The indexes of all served bundles that have one."""

    logger = logging.getLogger("dermis.authenticity")
    failure = "index not loaded"

    def __init__(self) -> None:
        self._maps: dict[str, dict[str, Any]] = {}
        self._mapping = threading.Lock()
        super().__init__()

    def has_model(self, location: str) -> bool:
        """Whether the bundle has an index."""
        return exists(part_folder(location, "authenticity"), DESCRIPTOR)

    def load(self, source: Bundle | str) -> tuple[str, Checker]:
        """Load an index. Calls name it by its own digest, which the bundle that the gateway has verified contains."""
        started = time.perf_counter()
        threads = max(1, available_cpus() // _settings.authenticity_workers)
        checker = Checker(source, device=_settings.device, threads=threads)
        BatchDispatcher.keep_busy(threads)  # images are computed one on each core
        self.logger.info("index loaded", extra=dict(checker.identity) | {"seconds": time.perf_counter() - started})
        return checker.description.digest, checker

    def identity(self, model: Checker) -> Mapping[str, str]:
        """The software and the device that compare images."""
        return model.identity

    @batch_api
    def nearest(self, rows: np.ndarray) -> list[Any]:  # BentoML reads these types
        """Compare images with the training images.

        Args:
            rows: uint8 [N, length], see `services.inference.pixels`.

        Returns:
            float32 [3 + dim] per row (`pixels.find_nearest`), or a text with the reason why there is none.
        """
        return measured_batch("authenticity", len(rows), lambda: pixels.find_nearest(self._models, rows))

    @bentoml.api
    def expose(self, digest: str, embeddings: np.ndarray) -> dict[str, Any]:
        """Measure what a dataset reveals about the training images.

        Args:
            digest: Digest of the index.
            embeddings: float32 [N, dim] of all images of the dataset.

        Returns:
            The fields of an `Exposure`, or "problem" with the reason why there is none.
        """
        if caller_has_disconnected():  # while the call waited for a thread
            return {"problem": CALLER_GONE}
        checker = self._models.get(digest)
        if checker is None:
            return {"problem": pixels.missing_message("index", digest)}
        return asdict(exposure(checker.index, embeddings))

    @bentoml.api
    def training_map(self, digest: str) -> dict[str, Any]:
        """Compute the map of the training images, once.

        Args:
            digest: Digest of the index.

        Returns:
            The fields of a `TrainingMap`, without what DERMIS_TRAINING_MAP does not show, or "problem" with the reason
            why there is none.
        """
        checker = self._models.get(digest)
        if checker is None:
            return {"problem": pixels.missing_message("index", digest)}
        with self._mapping:
            if digest not in self._maps:
                self._maps[digest] = shown_fields(training_map(checker.index), _settings.training_map)
            return self._maps[digest]


def shown_fields(known: TrainingMap, shown: Literal["none", "counts", "positions"]) -> dict[str, Any]:
    """Return the fields of a map without what the setting `training_map` does not show of the training images."""
    fields = asdict(known)
    if shown != "positions":
        fields["positions"] = np.empty((0, 3), np.float32)
    if shown == "none":
        fields |= {"cubes": np.empty((0, 3), np.float32), "counts": np.empty(0, np.int64)}
    return fields
