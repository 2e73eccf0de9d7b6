"""Measure the generator during training, and select the best snapshot so far."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.bundle import open_bundle
from dermis.errors import TrainingError
from dermis.features import FeatureExtractor, feature_extractor
from dermis.metrics import frechet_distance, kernel_distance
from dermis.network_config import DEFAULT_NOISE_MODE
from dermis.synthesizer import Synthesizer
from training.checkpoint import drop_after, position
from training.data.images import ImageDataset
from training.evaluation.features import BATCH, labels_in_proportion
from training.evaluation.sets import Generation, generated_batches
from training.gan.state import GanProgress

METRICS = ("fid", "kid")
LOG = "metrics.jsonl"


@dataclass(frozen=True)
class Measurements:
    """Distance `metric` in the feature space `extractor` between the training set and `count` generated images.

    It is measured every `kimg` thousand images and at the end. metrics.jsonl gets one line for each measurement.
    """

    dataset: ImageDataset
    metric: str
    kimg: float
    count: int
    device: torch.device
    extractor: str = "lite0"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise TrainingError(f"--metric: {self.metric!r} is none of {', '.join(METRICS)}")
        if self.kimg <= 0 or self.count < 2:
            raise TrainingError("--metric-kimg must be positive, --metric-count at least 2")

    def due(self, out: Path, progress: GanProgress, total_kimg: float) -> bool:
        """Whether to measure now. False if the user has requested a stop."""
        drop_after(out / LOG, progress.nimg)
        if progress.nimg == 0 or progress.stopped:
            return False
        last = max([0.0, *(position(line) for line in _lines(out))])
        return progress.nimg - last >= self.kimg * 1000 or progress.kimg >= total_kimg

    def measure(self, bundle: Path) -> dict[str, Any]:
        """The content of metrics.json for a bundle. Classes are generated in the proportions of the training set."""
        opened = open_bundle(bundle)
        real_labels = self.dataset.labels if opened.class_names else np.zeros_like(self.dataset.labels)
        generation = Generation(labels_in_proportion(real_labels, self.count), 0, 1.0, [DEFAULT_NOISE_MODE])
        threads = torch.get_num_threads()
        with Synthesizer(opened, device=str(self.device)) as synthesizer:
            generated = self._space.over(generated_batches(synthesizer, generation, DEFAULT_NOISE_MODE))
            identity = dict(synthesizer.identity)
        torch.set_num_threads(threads)  # a synthesizer on the CPU generates each image with one thread
        kid, kid_std = kernel_distance(self._real, generated)
        return {
            "extractor": self._space.name,
            "extractor_identity": self._space.identity,
            "real_sha256": self.dataset.sha256,
            "real_images": len(self._real),
            "images": self.count,
            "seed": generation.seed,
            "truncation_psi": generation.truncation_psi,
            "noise_mode": DEFAULT_NOISE_MODE,
            "synthesizer": identity,
            "fid": frechet_distance(self._real, generated),
            "kid": kid,
            "kid_std": kid_std,
        }

    def record(self, out: Path, progress: GanProgress, bundle: Path) -> tuple[dict[str, Any], bool]:
        """Measure, and append a line to metrics.jsonl.

        Returns:
            The metrics, and whether `metric` is better than in all earlier lines with the same noise. Lines without a noise
            mode were measured with constant noise, the default of earlier versions.
        """
        start = time.monotonic()
        lines = [json.loads(line) for line in _lines(out)]
        before = [
            line.get(self.metric, math.inf) for line in lines if line.get("noise_mode", "const") == DEFAULT_NOISE_MODE
        ]
        metrics = self.measure(bundle)
        line = {
            "nimg": progress.nimg,
            **{name: metrics[name] for name in (*METRICS, "images", "extractor", "noise_mode")},
        }
        with (out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line | {"seconds": round(time.monotonic() - start, 1)}) + "\n")
        return metrics, metrics[self.metric] < min(before, default=math.inf)

    @cached_property
    def _space(self) -> FeatureExtractor:
        return feature_extractor(self.extractor, self.device)

    @cached_property
    def _real(self) -> NDArray[np.float32]:
        images = self.dataset.images
        return self._space.over(images[i : i + BATCH] for i in range(0, len(images), BATCH))


def _lines(out: Path) -> list[str]:
    return (out / LOG).read_text(encoding="utf-8").splitlines() if (out / LOG).exists() else []
