"""The generator as a BentoML service: rows of samples in, images out, calls of many callers batched together.

It takes pickled bodies, as BentoML's services do among themselves: it listens on a socket file of the deployment only, and
everything public is the gateway's.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import bentoml
import numpy as np

from dermis.bundle import open_bundle
from dermis.cpus import available_cpus
from dermis.errors import DermisError
from services import logs, samples
from services.data_folder import restrict_new_files
from services.models import locate, without_place
from services.orphans import exit_with_parent
from services.settings import settings_of_process

logger = logging.getLogger("dermis.generator")

CALL_SECONDS = 300.0
_settings = settings_of_process()


@bentoml.service(
    name="Generator",
    workers=_settings.generator_workers,
    traffic={"timeout": CALL_SECONDS},
    # By default the caller closes its connections every 100 calls, with those that others still wait on.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    logging={"access": {"enabled": False}},
)
class Generator:
    """Every served bundle, ready to draw. A bundle that cannot be loaded leaves the others at work."""

    def __init__(self) -> None:
        logs.configure(_settings.log_level)
        exit_with_parent()
        restrict_new_files()
        from dermis.synthesizer import Synthesizer

        threads = max(1, available_cpus() // _settings.generator_workers)

        self._synthesizers: dict[str, Synthesizer] = {}
        self._problems: list[str] = []
        for location in locate(_settings.bundles):
            started = time.perf_counter()
            try:
                bundle = open_bundle(location)
                synthesizer = Synthesizer(
                    bundle,
                    device=_device(),
                    backend=_settings.backend,
                    threads=threads,
                    cache=_settings.data_dir / "cache" / "generators",
                )
                synthesizer.images([0], [0], [0])  # the first image is slow; the first caller need not wait for it
            except (DermisError, OSError, RuntimeError, MemoryError) as error:
                logger.error("model not loaded", extra={"location": location, "error": str(error)})
                self._problems.append(without_place(error, location))
                continue
            self._synthesizers[bundle.digest] = synthesizer
            told = {"model": bundle.name, "digest": bundle.digest[:12], "seconds": time.perf_counter() - started}
            logger.info("model loaded", extra=told | dict(synthesizer.identity))

    # The latency is no wait but the age at which BentoML sheds a call; the gateway limits how many wait.
    @bentoml.api(batchable=True, max_batch_size=_settings.max_batch_size, max_latency_ms=int(CALL_SECONDS * 1000))
    def generate(self, rows: np.ndarray) -> list[Any]:  # BentoML reads these types
        """uint8 rows [N, SAMPLE.itemsize] (`services.samples`) -> images uint8 [H, W, 3], or a reason for want of one."""
        return list(samples.run(self._synthesizers, samples.from_bytes(rows)))

    @bentoml.api
    def draw(self, digest: str, ws: np.ndarray, noise_mode: str) -> Any:
        """Images uint8 [N, H, W, 3] of style vectors float32 [N, num_ws, w_dim], or a reason for want of them."""
        synthesizer = self._synthesizers.get(digest)
        if synthesizer is None:
            return f"the generator has no model with digest {digest[:12]}; restart the service to load it"
        return synthesizer.images_from_ws(ws, "none" if noise_mode == "none" else "const")

    @bentoml.api
    async def describe(self) -> dict[str, Any]:  # on the event loop: probes do not wait for a batch to end
        """What is loaded: {"identities": {digest: identity}, "problems": [...]}."""
        identities = {digest: dict(synthesizer.identity) for digest, synthesizer in self._synthesizers.items()}
        return {"identities": identities, "problems": self._problems}


def _device() -> str:
    """The device of this process: with several processes and GPUs, each process has one of its own in turn."""
    if _settings.device != "auto" or _settings.generator_workers == 1:
        return _settings.device
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        return "auto"
    index: int = bentoml.server_context.worker_index or 1
    return f"cuda:{(index - 1) % gpus}"
