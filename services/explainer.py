"""The explainer as a BentoML service: one image in, its heat map out, one at a time in each process.

Torch and the network are loaded when the first heat map is asked for; until then the process knows what it could load. Like
the generator it takes pickled bodies and listens on a socket file of the deployment only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import bentoml
import numpy as np

from dermis.bundle.classifier import DESCRIPTOR, open_classifier
from dermis.bundle.folder import exists
from dermis.cpus import available_cpus
from dermis.errors import DermisError
from dermis.explain.attribution import Explainer as Loaded
from dermis.explain.attribution import Method, missing_packages
from services import heat_maps, logs
from services.callers import CallerGoneError, CallerMiddleware, check_caller
from services.data_folder import restrict_new_files
from services.models import locate, without_place
from services.orphans import exit_with_parent
from services.settings import settings_of_process

logger = logging.getLogger("dermis.explainer")

CALL_SECONDS = 300.0
_NICE = 10  # heat maps are slow work that gives way to all other
_settings = settings_of_process()


@bentoml.service(
    name="Explainer",
    workers=_settings.explainer_workers,
    threads=1,
    traffic={"timeout": CALL_SECONDS},
    # As for the generator: calls in flight would be cut off otherwise.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    logging={"access": {"enabled": False}},
)
class Explainer:
    """Heat maps of the classifier of every served bundle that has one."""

    def __init__(self) -> None:
        logs.configure(_settings.log_level)
        exit_with_parent()
        restrict_new_files()
        self._folders: dict[str, str] = {}
        self._problems: list[str] = []
        self._loaded: dict[str, Loaded] = {}
        self._loading = threading.Lock()
        for location in locate(_settings.bundles):
            folder = f"{location.rstrip('/')}/classifier"
            if not exists(folder, DESCRIPTOR):
                continue
            try:
                self._folders[open_classifier(folder).digest] = folder
            except (DermisError, OSError) as error:
                logger.error("classifier not found", extra={"location": location, "error": str(error)})
                self._problems.append(without_place(error, location))

    @bentoml.api
    def explain(self, digest: str, method: str, image: np.ndarray) -> dict[str, Any]:  # BentoML reads these types
        """uint8 [S, S, 3] at the classifier's size -> the fields of a HeatMap, or "missing" or "problem" with the reason.

        It ends early when the caller has closed the connection, so that a later call does not wait behind it.
        """
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)  # on Linux of this thread, and of those that torch starts from it
        try:
            check_caller()  # calls that waited for this one thread may have been abandoned meanwhile
            return self._explain(digest, method, image)
        except CallerGoneError:
            logger.info("heat map given up, nobody waits for it")
            return {"problem": "nobody waits for this heat map any more"}

    def _explain(self, digest: str, method: str, image: np.ndarray) -> dict[str, Any]:
        missing = missing_packages()
        if missing is not None:
            return {"missing": missing}
        folder = self._folders.get(digest)
        if folder is None:
            return {"problem": f"the explainer has no classifier {digest[:12]}; restart the service to load it"}
        try:
            loaded = self._load(digest, folder)
        except (DermisError, OSError, RuntimeError, MemoryError) as error:
            logger.error("network not loaded", extra={"location": folder, "error": str(error)})
            return {"problem": without_place(error, folder.removesuffix("/classifier"))}
        wanted: Method = "xrai" if method == "xrai" else "integrated-gradients"
        return dict(heat_maps.make(loaded, wanted, image, check_caller))

    @bentoml.api
    async def describe(self) -> dict[str, Any]:  # on the event loop: probes do not wait for a heat map
        """What could be loaded: {"identities": {digest: {}}, "problems": [...]}."""
        return {"identities": {digest: {} for digest in self._folders}, "problems": self._problems}

    def _load(self, digest: str, folder: str) -> Loaded:
        with self._loading:
            if digest not in self._loaded:
                import torch

                started = time.perf_counter()
                torch.set_num_threads(max(1, available_cpus() // _settings.explainer_workers))
                self._loaded[digest] = Loaded(folder, device=_settings.device)
                told = {"classifier": digest[:12], "seconds": time.perf_counter() - started}
                logger.info("network loaded", extra=told)
            return self._loaded[digest]


Explainer.add_asgi_middleware(CallerMiddleware)  # type: ignore[attr-defined]  # a BentoML service by now
