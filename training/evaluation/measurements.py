"""Measure generated images with the detectors of artefacts and the bundle's classifier."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.artefacts import NAMES, THRESHOLDS, detect_artefacts, frame_share
from dermis.bundle import Bundle
from dermis.classifier.onnx_session import Classifier
from dermis.cpus import available_cpus
from dermis.dataset.request import classes_of
from dermis.imaging import Images, as_rgb
from dermis.synthesizer import Synthesizer
from training.evaluation.disentanglement import Measurements, Ws

BATCH = 64


@dataclass(frozen=True)
class ImageMeasurer:
    """Generates and measures images of a bundle. Sample i has the class i modulo the number of classes.

    Style vectors belong to samples: an image has the noise of its sample, also after its style vectors were moved.
    """

    synthesizer: Synthesizer
    classifier: Classifier | None
    pool: ThreadPoolExecutor
    classes: int

    def ws(self, indices: NDArray[np.int64], *, seed: int, truncation_psi: float) -> Ws:
        """Style vectors float32 [N, num_ws, w_dim] of samples of a seed."""
        labels = [int(index) % self.classes for index in indices]
        return self.synthesizer.ws([seed] * len(indices), indices.tolist(), labels, truncation_psi=truncation_psi)

    def generate(self, ws: Ws, indices: NDArray[np.int64], *, seed: int) -> Images:
        """Images uint8 [N, H, W, 3] of the style vectors of samples."""
        return as_rgb(self.synthesizer.images_from_ws(ws, "random", seeds=[seed] * len(ws), indices=indices.tolist()))

    def frames(self, ws: Ws, indices: NDArray[np.int64], *, seed: int) -> NDArray[np.float64]:
        """Scores of the black frame, float64 [N]."""
        return np.array(list(self.pool.map(frame_share, self.generate(ws, indices, seed=seed))), np.float64)

    def measure(self, ws: Ws, indices: NDArray[np.int64], *, seed: int) -> Measurements:
        """Measure the scores of the detectors, and the calibrated probability and the features of the classifier."""
        attributes: dict[str, list[NDArray[np.float64]]] = {}
        features = []
        for start in range(0, len(ws), BATCH):
            part = slice(start, start + BATCH)
            images = self.generate(ws[part], indices[part], seed=seed)
            artefacts = list(self.pool.map(detect_artefacts, images))
            for name in NAMES:
                attributes.setdefault(name, []).append(
                    np.array([getattr(each, name) for each in artefacts], np.float64)
                )
            if self.classifier is not None:
                scores = self.classifier.classify(images)
                attributes.setdefault(self.classifier.description.positive_class, []).append(scores.calibrated)
                features.append(scores.features)
        all_features = np.concatenate(features) if features else np.empty((len(ws), 0), np.float32)
        return Measurements({name: np.concatenate(parts) for name, parts in attributes.items()}, all_features)

    def find_framed(
        self, count: int, *, search: int, seed: int, truncation_psi: float
    ) -> Iterator[tuple[int, NDArray[np.int64], Ws]]:
        """Search samples for the black frame until `count` have it, in at most `search` samples.

        Yields:
            For each batch, the number of samples, and indices and style vectors of those with the frame.
        """
        total = 0
        for start in range(0, search, BATCH):
            if total >= count:
                return
            indices = np.arange(start, min(start + BATCH, search))
            ws = self.ws(indices, seed=seed, truncation_psi=truncation_psi)
            framed = np.flatnonzero(self.frames(ws, indices, seed=seed) >= THRESHOLDS["frame"])[: count - total]
            total += len(framed)
            yield len(indices), indices[framed], ws[framed]


@contextmanager
def open_measurer(bundle: Bundle, *, device: str = "auto") -> Iterator[ImageMeasurer]:
    """Load the generator and the classifier of a bundle. Raises the errors of `Synthesizer` and `Classifier`."""
    with ExitStack() as stack:
        synthesizer = stack.enter_context(Synthesizer(bundle, device=device))
        classifier = stack.enter_context(Classifier(bundle, device="cpu")) if bundle.classifier else None
        pool = stack.enter_context(ThreadPoolExecutor(available_cpus()))
        yield ImageMeasurer(synthesizer, classifier, pool, len(classes_of(bundle)))
