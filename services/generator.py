"""The generator as a BentoML service: images of rows, batched adaptively across all callers.

Reached only through `bentoml.depends` inside one deployment: it accepts pickled bodies, so it must never listen on an
address that others reach.
"""

from __future__ import annotations

import bentoml
import numpy as np

from services import samples
from services.logs import configure
from services.models import Models
from services.orphans import exit_with_parent
from services.settings import settings_of_process

_settings = settings_of_process()
# BentoML's batching sheds calls that it expects to miss this; ours wait for their turn instead, up to the caller's limit.
_PATIENCE_MS = 600_000


@bentoml.service(
    name="generator",
    workers=_settings.generator_workers,
    traffic={"timeout": _PATIENCE_MS / 1000},
    # BentoML's client closes its session every 100 calls and kills those in flight, unless told otherwise here.
    runner_connection={"max_requests": 10**9, "max_age": 1e9},
    logging={"access": {"enabled": False}},
)
class Generator:
    """Every served bundle, compiled for this process's device."""

    def __init__(self) -> None:
        from dermis.synthesizer import Synthesizer

        exit_with_parent()
        configure(_settings.log_level)
        # On a CPU the processes share the cores; on CUDA the number of threads says nothing.
        threads = _settings.threads_per_generator if _settings.generator_workers > 1 else None
        self._synthesizers = {
            bundle.digest: Synthesizer(bundle, device=_settings.device, backend=_settings.backend, threads=threads)
            for bundle in Models(_settings.bundles).bundles
        }

    @bentoml.api(batchable=True, max_batch_size=_settings.max_batch_size, max_latency_ms=_PATIENCE_MS)
    def generate(self, rows: np.ndarray) -> list[np.ndarray]:  # BentoML reads these types
        """uint8 rows [N, SAMPLE.itemsize] (`services.samples`) -> N images uint8 [H, W, 3]."""
        return samples.run(self._synthesizers, samples.from_bytes(rows))

    @bentoml.api
    async def identity(self, digest: str) -> dict[str, str]:
        """What, besides request and bundle, decides the bytes of the images of the bundle `digest`; {} if unknown."""
        synthesizer = self._synthesizers.get(digest)
        return {} if synthesizer is None else dict(synthesizer.identity)
