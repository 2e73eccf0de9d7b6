"""The classifier as a BentoML service: rows of pixels in, logits out, calls of many callers batched together.

Like the generator it takes pickled bodies and listens on a socket file of the deployment only. Its process knows no torch.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import bentoml
import numpy as np

from dermis.bundle.classifier import DESCRIPTOR
from dermis.bundle.folder import exists
from dermis.classifier.onnx_session import Classifier as Session
from dermis.cpus import available_cpus
from dermis.errors import DermisError
from services import logs, pixels
from services.data_folder import restrict_new_files
from services.models import locate, without_place
from services.orphans import exit_with_parent
from services.settings import settings_of_process

logger = logging.getLogger("dermis.classifier")

CALL_SECONDS = 300.0
_settings = settings_of_process()


@bentoml.service(
    name="Classifier",
    workers=_settings.classifier_workers,
    traffic={"timeout": CALL_SECONDS},
    # As for the generator: calls in flight would be cut off otherwise.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    logging={"access": {"enabled": False}},
)
class Classifier:
    """The classifier of every served bundle that has one. One that cannot be loaded leaves the others at work."""

    def __init__(self) -> None:
        logs.configure(_settings.log_level)
        exit_with_parent()
        restrict_new_files()
        threads = max(1, available_cpus() // _settings.classifier_workers)
        self._sessions: dict[str, Session] = {}
        self._problems: list[str] = []
        for location in locate(_settings.bundles):
            folder = f"{location.rstrip('/')}/classifier"
            if not exists(folder, DESCRIPTOR):
                continue
            started = time.perf_counter()
            try:
                session = Session(folder, device=_settings.device, threads=threads)
            except (DermisError, OSError, RuntimeError, MemoryError) as error:
                logger.error("classifier not loaded", extra={"location": location, "error": str(error)})
                self._problems.append(without_place(error, location))
                continue
            # By its own digest, which the bundle that the gateway has verified names.
            self._sessions[session.description.digest] = session
            logger.info("classifier loaded", extra=dict(session.identity) | {"seconds": time.perf_counter() - started})

    # As in the generator: the latency is the age at which BentoML sheds a call.
    @bentoml.api(batchable=True, max_batch_size=_settings.max_batch_size, max_latency_ms=int(CALL_SECONDS * 1000))
    def classify(self, rows: np.ndarray) -> list[Any]:  # BentoML reads these types
        """uint8 rows (`services.pixels`) -> logits, or a reason for want of one."""
        return list(pixels.run(self._sessions, rows))

    @bentoml.api
    async def describe(self) -> dict[str, Any]:  # on the event loop: probes do not wait for a batch to end
        """What is loaded: {"identities": {digest: identity}, "problems": [...]}."""
        identities = {digest: dict(session.identity) for digest, session in self._sessions.items()}
        return {"identities": identities, "problems": self._problems}
