"""The generator as a BentoML service: rows of samples in, images out. Calls of several callers run as one batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import bentoml
import numpy as np

from dermis.bundle import Bundle
from dermis.cpus import available_cpus
from services.callers import CALLER_GONE, caller_has_disconnected
from services.inference import samples
from services.inference.base import InferenceService, batch_api, inference_service, opened
from services.inference.dispatching import BatchDispatcher, measured_batch
from services.settings import settings_of_process

if TYPE_CHECKING:
    from dermis.synthesizer import Synthesizer

_settings = settings_of_process()


@inference_service("Generator", _settings.generator_workers)
class GeneratorService(InferenceService["Synthesizer"]):
    """The generators of all served bundles."""

    logger = logging.getLogger("dermis.generator")
    failure = "model not loaded"

    def load(self, source: Bundle | str) -> tuple[str, Synthesizer]:
        """Load a generator and generate one image, because the first image is slow and no caller should wait for it."""
        from dermis.synthesizer import Synthesizer

        started = time.perf_counter()
        bundle = opened(source)
        synthesizer = Synthesizer(
            bundle,
            device=_device(),
            backend=_settings.backend,
            threads=max(1, available_cpus() // _settings.generator_workers),
            cache=_settings.data_dir / "cache" / "generators",
        )
        synthesizer.images([0], [0], [0])
        BatchDispatcher.keep_busy(synthesizer.preferred_batch)
        fields = {"model": bundle.name, "digest": bundle.digest[:12], "seconds": time.perf_counter() - started}
        self.logger.info("model loaded", extra=fields | dict(synthesizer.identity))
        return bundle.digest, synthesizer

    def identity(self, model: Synthesizer) -> Mapping[str, str]:
        """The software and the device that generate images."""
        return model.identity

    @batch_api
    def generate(self, rows: np.ndarray) -> list[Any]:  # BentoML reads these types
        """Generate images.

        Args:
            rows: uint8 [N, SAMPLE.itemsize], see `services.inference.samples`.

        Returns:
            An image uint8 [H, W, 3] per row, or a text with the reason why there is none.
        """
        return measured_batch(
            "generator", len(rows), lambda: samples.generate_rows(self._models, samples.from_bytes(rows))
        )

    @bentoml.api
    def draw(self, digest: str, ws: np.ndarray, noise_mode: str, seed: int = 0, index: int = 0) -> Any:
        """Generate images from style vectors.

        Args:
            digest: Digest of the bundle.
            ws: float32 [N, num_ws, w_dim].
            noise_mode: "none", "const", or "random": all images have the noise of sample (seed, index).
            seed: Seed of that sample.
            index: Index of that sample.

        Returns:
            Images uint8 [N, H, W, 3], or a text with the reason why there are none.
        """
        if caller_has_disconnected():  # while the call waited for the only thread
            return CALLER_GONE
        synthesizer = self._models.get(digest)
        if synthesizer is None:
            return samples.missing_message(digest)
        if noise_mode == "random":
            return synthesizer.images_from_ws(ws, "random", seeds=[seed] * len(ws), indices=[index] * len(ws))
        return synthesizer.images_from_ws(ws, "none" if noise_mode == "none" else "const")

    @bentoml.api
    def map(self, digest: str, z: np.ndarray, labels: np.ndarray, truncation_psi: float, truncation_cutoff: int) -> Any:
        """Compute style vectors.

        Args:
            digest: Digest of the bundle.
            z: float32 [N, z_dim].
            labels: Class numbers int64 [N].
            truncation_psi: Truncation.
            truncation_cutoff: Number of style vectors that are truncated; -1 for all.

        Returns:
            float32 [N, num_ws, w_dim], or a text with the reason why there are none.
        """
        if caller_has_disconnected():
            return CALLER_GONE
        synthesizer = self._models.get(digest)
        if synthesizer is None:
            return samples.missing_message(digest)
        cutoff = None if truncation_cutoff < 0 else truncation_cutoff
        return synthesizer.ws_of(z, labels.tolist(), truncation_psi=truncation_psi, truncation_cutoff=cutoff)


def _device() -> str:
    """The device of this process. Several processes on a machine with several GPUs use them in turn."""
    if _settings.device not in ("auto", "cuda") or _settings.generator_workers == 1:
        return _settings.device
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        return _settings.device
    index: int = bentoml.server_context.worker_index or 1
    return f"cuda:{(index - 1) % gpus}"
