"""The classifier as a BentoML service: rows of pixels in, logits out. Calls of several callers run as one batch.

Its process does not import torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from dermis.bundle import Bundle
from dermis.bundle.classifier import DESCRIPTOR
from dermis.bundle.folder import exists
from dermis.classifier.onnx_session import Classifier
from dermis.cpus import available_cpus
from services.inference import pixels
from services.inference.base import InferenceService, batch_api, inference_service, part_folder, part_source
from services.inference.dispatching import BatchDispatcher, measured_batch
from services.settings import settings_of_process

_settings = settings_of_process()


@inference_service("Classifier", _settings.classifier_workers)
class ClassifierService(InferenceService[Classifier]):
    """The classifiers of all served bundles that have one."""

    logger = logging.getLogger("dermis.classifier")
    failure = "classifier not loaded"

    def has_model(self, location: str) -> bool:
        """Whether the bundle has a classifier."""
        return exists(part_folder(location, "classifier"), DESCRIPTOR)

    def load(self, source: Bundle | str) -> tuple[str, Classifier]:
        """Load a classifier. Calls name it by its own digest, which the bundle that the gateway has verified contains."""
        started = time.perf_counter()
        threads = max(1, available_cpus() // _settings.classifier_workers)
        session = Classifier(part_source(source, "classifier"), device=_settings.device, threads=threads)
        BatchDispatcher.keep_busy(threads)  # images are computed one on each core
        fields = dict(session.identity) | {"seconds": time.perf_counter() - started}
        self.logger.info("classifier loaded", extra=fields)
        return session.description.digest, session

    def identity(self, model: Classifier) -> Mapping[str, str]:
        """The software and the device that classify."""
        return model.identity

    @batch_api
    def classify(self, rows: np.ndarray) -> list[Any]:  # BentoML reads these types
        """Classify images.

        Args:
            rows: uint8 [N, length], see `services.inference.pixels`.

        Returns:
            A logit per row, or a text with the reason why there is none.
        """
        return measured_batch("classifier", len(rows), lambda: pixels.classify_rows(self._models, rows))
