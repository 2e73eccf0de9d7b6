"""The explainer as a BentoML service: one image in, its heat map out. Each process runs one call at a time.

Torch and the network are loaded at the first call.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import bentoml
import numpy as np

from dermis.bundle import Bundle
from dermis.bundle.classifier import DESCRIPTOR
from dermis.bundle.folder import exists
from dermis.classifier.onnx_session import find_classifier
from dermis.cpus import available_cpus
from dermis.errors import BundleError
from dermis.explain.attribution import Explainer, Method, missing_packages
from services.callers import CallerDisconnectedError, check_caller
from services.inference import heat_maps
from services.inference.base import (
    LOAD_ERRORS,
    InferenceService,
    inference_service,
    lower_priority,
    part_folder,
    part_source,
    raise_passing,
)
from services.models import without_place
from services.settings import settings_of_process

_settings = settings_of_process()


@inference_service("Explainer", _settings.explainer_workers, threads=1)
class ExplainerService(InferenceService[Bundle | str]):
    """Heat maps for the classifiers of all served bundles that have one. `_models`: their folders or bundles."""

    logger = logging.getLogger("dermis.explainer")
    failure = "classifier not found"

    def __init__(self) -> None:
        self._explainers: dict[str, Explainer] = {}
        self._loading = threading.Lock()
        super().__init__()

    def has_model(self, location: str) -> bool:
        """Whether the bundle has a classifier."""
        return exists(part_folder(location, "classifier"), DESCRIPTOR)

    def load(self, source: Bundle | str) -> tuple[str, Bundle | str]:
        """Read the digest of a classifier, and remember where it is."""
        part = part_source(source, "classifier")
        description, _ = find_classifier(part)
        return description.digest, part

    @bentoml.api
    def explain(self, digest: str, method: str, image: np.ndarray) -> dict[str, Any]:  # BentoML reads these types
        """Make a heat map. The call ends early when the caller closes the connection, so that later calls do not wait for it.

        Args:
            digest: Digest of the classifier.
            method: A `dermis.explain.attribution.Method`.
            image: uint8 [S, S, 3] at the size of the classifier.

        Returns:
            The fields of an `EncodedHeatMap`, or "missing" or "problem" with the reason why there is none.
        """
        lower_priority()
        try:
            check_caller()  # the connection may have been closed while the call waited for the only thread
            return self._explain(digest, method, image)
        except CallerDisconnectedError:
            self.logger.info("heat map cancelled because its caller has disconnected")
            return {"problem": "the heat map was cancelled because its caller has disconnected"}

    def _explain(self, digest: str, method: str, image: np.ndarray) -> dict[str, Any]:
        missing = missing_packages()
        if missing is not None:
            return {"missing": missing}
        source = self._models.get(digest)
        if source is None:
            return {"problem": f"the explainer has no classifier {digest[:12]}; restart the service to load it"}
        try:
            explainer = self._explainer(digest, source)
        except LOAD_ERRORS as error:
            folder = source if isinstance(source, str) else part_folder(source.location, "classifier")
            self.logger.error("network not loaded", extra={"location": folder, "error": str(error)})
            raise_passing(error, folder)
            return {"problem": without_place(error, folder.removesuffix("/classifier"))}
        checked_method: Method = "xrai" if method == "xrai" else "integrated-gradients"
        return dict(heat_maps.make(explainer, checked_method, image, check_caller))

    def _explainer(self, digest: str, source: Bundle | str) -> Explainer:
        with self._loading:
            if digest not in self._explainers:
                import torch

                started = time.perf_counter()
                torch.set_num_threads(max(1, available_cpus() // _settings.explainer_workers))
                explainer = Explainer(source, device=_settings.device)
                if explainer.description.digest != digest:
                    raise BundleError("the classifier was replaced; restart the service to load the new one")
                self._explainers[digest] = explainer
                fields = {"classifier": digest[:12], "seconds": time.perf_counter() - started}
                self.logger.info("network loaded", extra=fields)
            return self._explainers[digest]
