"""The projector as a BentoML service: a few images in, their latents out. It runs one call at a time.

Torch and the generator are loaded at the first call. Images are in memory only, for the time of the call.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import bentoml
import numpy as np

from dermis.bundle import Bundle
from dermis.cpus import available_cpus
from dermis.errors import RequestError
from services.callers import CallerDisconnectedError, check_caller
from services.inference import projections
from services.inference.base import (
    LOAD_ERRORS,
    InferenceService,
    inference_service,
    lower_priority,
    opened,
    raise_passing,
)
from services.models import without_place
from services.settings import settings_of_process

if TYPE_CHECKING:
    from dermis.projection.projector import ImageProjector

CALL_SECONDS = 3600.0
_WORK_SECONDS = 0.95 * CALL_SECONDS  # a call that would take longer is refused: repeating it would take as long
_ESTIMATED_AFTER_SECONDS = 600.0
_MAX_CANCELLED = 1000
_settings = settings_of_process()


class _CancelledError(Exception):
    """The call was cancelled."""


class _TooLongError(Exception):
    """The call would not end in time."""


@inference_service("Projector", 1, call_seconds=CALL_SECONDS, threads=1)
class ProjectorService(InferenceService[Bundle]):
    """Projection to the generators of all served bundles."""

    logger = logging.getLogger("dermis.projector")
    failure = "model not found"

    def __init__(self) -> None:
        self._projectors: dict[str, ImageProjector] = {}
        self._loading = threading.Lock()
        self._steps: dict[str, int] = {}
        self._previews: dict[str, list[dict[str, Any]]] = {}
        self._cancelled: dict[str, None] = {}  # the latest ones, changed on the event loop only
        super().__init__()

    def load(self, source: Bundle | str) -> tuple[str, Bundle]:
        """Open a bundle, without loading its networks."""
        bundle = opened(source)
        return bundle.digest, bundle

    @bentoml.api
    def project(  # BentoML reads these types
        self, digest: str, images: np.ndarray, labels: list[int], task: dict[str, Any], ticket: str
    ) -> dict[str, Any]:
        """Project images. The call ends early when it is cancelled or its caller closes the connection, because others wait.

        Args:
            digest: Digest of the bundle.
            images: uint8 [N, R, R, 3] at the resolution of the generator.
            labels: Class number of each image; -1 if it is not known.
            task: The fields of a `projections.ProjectionTask`.
            ticket: Names this call for `progress` and `cancel`.

        Returns:
            "projected" with the fields of a `projections.ProjectionFiles` per image, or "problem" or "refused" with the reason.
        """
        lower_priority()
        bundle = self._models.get(digest)
        if bundle is None:
            return {"problem": f"the projector has no model {digest[:12]}; restart the service to load it"}

        def check() -> None:
            check_caller()
            if ticket in self._cancelled:
                raise _CancelledError

        began, asked = time.monotonic(), projections.ProjectionTask.from_dict(task)

        def on_steps(steps: int) -> None:
            check()
            self._steps[ticket] = steps
            taken = time.monotonic() - began
            expected = taken * len(images) * asked.schedule.steps / max(1, steps)
            # An estimate is not precise: other work on the machine can end meanwhile.
            if taken > _WORK_SECONDS or (taken > _ESTIMATED_AFTER_SECONDS and expected > 2 * _WORK_SECONDS):
                raise _TooLongError

        def on_previews(previews: list[projections.ProjectionPreview]) -> None:
            self._previews[ticket] = [asdict(preview) for preview in previews]

        try:
            check()  # the call may have waited for the only thread,
            projector = self._projector(bundle)
            check()  # and for the networks
            known_labels = [None if label < 0 else label for label in labels]
            results = projections.project_images(projector, images, known_labels, asked, on_steps, on_previews)
        except _CancelledError:
            return {"problem": "the projection was cancelled"}
        except CallerDisconnectedError:
            self.logger.info("projection cancelled because its caller has disconnected")
            return {"problem": "the projection was cancelled because its caller has disconnected"}
        except _TooLongError:
            hours = (
                f"{len(images)} images take longer than an hour with {asked.schedule.steps} steps each on this machine"
            )
            return {"refused": f"{hours}; ask for fewer steps", "field": "steps"}
        except RequestError as error:
            return {"refused": error.message, "field": error.field}
        except ImportError as error:
            return {"refused": f"the service lacks a package that projections need ({error})"}
        except LOAD_ERRORS as error:
            self.logger.error("projection failed", extra={"model": bundle.name, "error": str(error)})
            raise_passing(error, bundle.location)
            return {"problem": without_place(error, bundle.location)}
        finally:
            self._steps.pop(ticket, None)
            self._previews.pop(ticket, None)
        return {"projected": [asdict(result) for result in results]}

    @bentoml.api
    async def progress(self, ticket: str) -> dict[str, Any]:  # on the event loop: it does not wait for the call to end
        """How far a running call is.

        Returns:
            "steps": the sum of the steps of all images, 0 before the begin and after the end of the call; "previews": the
            fields of the last `projections.ProjectionPreview` of each current image.
        """
        return {"steps": self._steps.get(ticket, 0), "previews": self._previews.get(ticket, [])}

    @bentoml.api
    async def cancel(self, ticket: str) -> None:
        """End a call at its next step, or before its first one if it waits for another call or has not arrived yet."""
        self._cancelled[ticket] = None
        if len(self._cancelled) > _MAX_CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]

    def _projector(self, bundle: Bundle) -> ImageProjector:
        with self._loading:
            if bundle.digest not in self._projectors:
                import torch

                from dermis.projection.encoder import load_encoder
                from dermis.projection.projector import ImageProjector

                started = time.perf_counter()
                torch.set_num_threads(available_cpus())
                encoder = load_encoder(bundle, device=_settings.device)
                self._projectors[bundle.digest] = ImageProjector(
                    bundle, distance=_settings.projection_distance, device=_settings.device, encode=encoder
                )
                fields = {"model": bundle.name, "seconds": time.perf_counter() - started}
                self.logger.info("projector loaded", extra=fields)
            return self._projectors[bundle.digest]
