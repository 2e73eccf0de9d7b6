"""Projection as a BentoML service: a few images in, their latents out, one call at a time.

Torch and the generator are loaded when the first projection is asked for. Like the generator it takes pickled bodies and
listens on a socket file of the deployment only. Images exist in its memory for the time of the call.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import asdict
from typing import Any

import bentoml
import numpy as np

from dermis.bundle import Bundle, open_bundle
from dermis.cpus import available_cpus
from dermis.errors import DermisError, RequestError
from services import logs, projections
from services.data_folder import restrict_new_files
from services.models import locate, without_place
from services.orphans import exit_with_parent
from services.settings import settings_of_process

logger = logging.getLogger("dermis.projector")

CALL_SECONDS = 3600.0
_NICE = 10  # projections take minutes and give way to all other work
_settings = settings_of_process()


class _CancelledError(Exception):
    """Nobody waits for this call any more."""


@bentoml.service(
    name="Projector",
    workers=1,
    threads=1,
    traffic={"timeout": CALL_SECONDS},
    # As for the generator: calls in flight would be cut off otherwise.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    logging={"access": {"enabled": False}},
)
class Projector:
    """Every served bundle of colour images, ready to be projected to."""

    def __init__(self) -> None:
        logs.configure(_settings.log_level)
        exit_with_parent()
        restrict_new_files()
        self._bundles: dict[str, Bundle] = {}
        self._problems: list[str] = []
        self._loaded: dict[str, Any] = {}
        self._loading = threading.Lock()
        self._steps: dict[str, int] = {}
        self._cancelled: set[str] = set()
        for location in locate(_settings.bundles):
            try:
                bundle = open_bundle(location)
            except (DermisError, OSError) as error:
                logger.error("model not found", extra={"location": location, "error": str(error)})
                self._problems.append(without_place(error, location))
                continue
            self._bundles[bundle.digest] = bundle

    @bentoml.api
    def project(  # BentoML reads these types
        self, digest: str, images: np.ndarray, labels: list[int], task: dict[str, Any], ticket: str
    ) -> dict[str, Any]:
        """uint8 [N, R, R, 3], labels (-1: unknown) -> {"projected": [...]}, or "problem" or "refused" with the reason."""
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, 0, _NICE)  # on Linux of this thread, and of those that torch starts from it
        bundle = self._bundles.get(digest)
        if bundle is None:
            return {"problem": f"the projector has no model {digest[:12]}; restart the service to load it"}

        def count(steps: int) -> None:
            if ticket in self._cancelled:
                raise _CancelledError
            self._steps[ticket] = steps

        try:
            projector = self._load(bundle)
            wanted = projections.Task.from_dict(task)
            known = [None if label < 0 else label for label in labels]
            made = projections.run(projector, images, known, wanted, count)
        except _CancelledError:
            return {"problem": "the projection was cancelled"}
        except RequestError as error:
            return {"refused": error.message, "field": error.field}
        except ImportError as error:
            return {"refused": f"the service lacks a package that projections need ({error})"}
        except (DermisError, OSError, RuntimeError, MemoryError) as error:
            logger.error("projection failed", extra={"model": bundle.name, "error": str(error)})
            return {"problem": without_place(error, bundle.location)}
        finally:
            self._steps.pop(ticket, None)
            self._cancelled.discard(ticket)
        return {"projected": [asdict(each) for each in made]}

    @bentoml.api
    async def steps(self, ticket: str) -> int:  # on the event loop: it does not wait for the call to end
        """Steps that all images of a call in work have done together; 0 if it has not begun or is over."""
        return self._steps.get(ticket, 0)

    @bentoml.api
    async def cancel(self, ticket: str) -> None:
        """End a call at its next step."""
        if ticket in self._steps:
            self._cancelled.add(ticket)

    @bentoml.api
    async def describe(self) -> dict[str, Any]:
        """What could be loaded: {"identities": {digest: {}}, "problems": [...]}."""
        return {"identities": {digest: {} for digest in self._bundles}, "problems": self._problems}

    def _load(self, bundle: Bundle) -> Any:
        with self._loading:
            if bundle.digest not in self._loaded:
                import torch

                from dermis.projection.encoder import load_encoder
                from dermis.projection.projector import Projector as Loaded

                started = time.perf_counter()
                torch.set_num_threads(available_cpus())
                encoder = load_encoder(bundle, device=_settings.device)
                self._loaded[bundle.digest] = Loaded(
                    bundle, distance=_settings.projection_distance, device=_settings.device, encode=encoder
                )
                told = {"model": bundle.name, "seconds": time.perf_counter() - started}
                logger.info("projector loaded", extra=told)
            return self._loaded[bundle.digest]
