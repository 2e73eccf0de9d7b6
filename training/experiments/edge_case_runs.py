"""Runs of one classifier with different images and seeds. They are not exported; shared features are computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.classifier.torch_network import TorchClassifier
from dermis.explain.embeddings import Embedded, Item
from dermis.files import write_file
from training.classifier.batches import TrainingSet
from training.classifier.calibration import calibrated, choose_thresholds, fit_temperature
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealData
from training.classifier.loop import all_features, logits_of, logits_of_features, seen_share, train
from training.classifier.network import new_network, prior_shift
from training.classifier.synthetic import SyntheticImages
from training.data.cache import new_array, read_array
from training.distributed import Ranks

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrainedRun:
    """A trained network, calibrated on the validation images.

    Attributes:
        shift: Number added to logits, because the proportions of the classes differ between training and validation.
        calibrated: Calibrated probabilities of the test images [N].
    """

    network: TorchClassifier
    shift: float
    temperature: float
    threshold: float
    calibrated: Floats


class RunTrainer:
    """Trains runs, each in its own folder.

    If only the last layer is trained, the features of every image are computed once.
    """

    def __init__(
        self,
        real: RealData,
        config: ClassifierConfig,
        out: Path,
        weights: str,
        ranks: Ranks,
        cache: Path,
        progress_bar: bool,
    ) -> None:
        self.real, self.config, self.out, self.weights, self.ranks = real, config, out, weights, ranks
        self.cache, self.progress_bar = cache, progress_bar
        self._feature_cache: dict[int, tuple[NDArray[np.uint8], torch.Tensor]] = {}

    def run(
        self, name: str, seed: int, added: SyntheticImages | None = None, *, synthetic_only: bool = False
    ) -> TrainedRun | None:
        """Train one run, or read it if it is finished.

        Args:
            name: First part of the folder's name.
            seed: Seed of the run.
            added: Generated images that are added to the real training part.
            synthetic_only: Train on `added` only.

        Returns:
            The run; None if the user stopped it.
        """
        config, real = replace(self.config, seed=seed), self.real
        folder = self.out / f"{name}-{seed}"
        arrays = (*(() if synthetic_only else (real.train.images,)), *(added.images if added else ()))
        label_arrays = [
            *(() if synthetic_only else (real.train.labels,)),
            np.array(added.labels if added else (), np.int64),
        ]
        labels = np.concatenate(label_arrays)
        training = TrainingSet(arrays, labels)
        network = new_network(config, self.weights)
        features = None
        if config.cached_features:
            training_features = torch.cat([self._features(network, array) for array in arrays])
            features = training_features, self._features(network, real.validation.images)
        origin = [dict(each) for each in added.origin] if added else []
        identity = json.dumps([{part: each.sha256 for part, each in real.parts.items()}, origin], sort_keys=True)
        best, progress = train(
            network,
            training,
            real.validation,
            config,
            folder,
            data=hashlib.sha256(identity.encode()).hexdigest(),
            ranks=self.ranks,
            resume=True,
            progress_bar=self.progress_bar and not config.cached_features,
            features=features,
        )
        if progress.stopped:
            return None
        shift = prior_shift(seen_share(training, config), real.validation.positive_share)
        on_validation = self._logits(best, real.validation.images) + shift
        temperature = fit_temperature(real.validation.labels, on_validation)
        thresholds = choose_thresholds(real.validation.labels, calibrated(on_validation, temperature))
        on_test = calibrated(self._logits(best, real.test.images) + shift, temperature)
        rows = zip(real.test.ids, real.test.labels, on_test, strict=True)
        lines = [f"{image},{int(label)},{p:.6f}\n" for image, label, p in rows]
        write_file(folder / "predictions.csv", "".join(["isic_id,label,calibrated\n", *lines]).encode())
        return TrainedRun(best, shift, temperature, thresholds["default"], on_test)

    def embedded(self, run: TrainedRun, images: NDArray[np.uint8], items: Sequence[Item]) -> Embedded:
        """Return features and probabilities of images uint8 [N, S, S, 3] under a run, without thumbnails."""
        features = self._features(run.network, images).cpu().numpy()
        probabilities = calibrated(self._logits(run.network, images) + run.shift, run.temperature)
        return Embedded(tuple(items), features, probabilities, np.empty((len(images), 0, 0, 3), np.uint8))

    def _logits(self, network: TorchClassifier, images: NDArray[np.uint8]) -> Floats:
        if self.config.cached_features:
            return logits_of_features(network, self._features(network, images))
        return logits_of(network, images, self.ranks.device)

    def _features(self, network: TorchClassifier, images: NDArray[np.uint8]) -> torch.Tensor:
        """Return features float32 [N, D]; cached, in memory and on disk, if only the last layer is trained."""
        as_set = TrainingSet((images,), np.zeros(len(images), np.int64))
        if not self.config.cached_features:
            return all_features(network, as_set, self.ranks, self.progress_bar)
        if id(images) not in self._feature_cache:
            identity = f"{self.config.architecture} {self.config.size} {_weights(network)} {_content(images)}"
            file = self.cache / f"edge-features-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
            shape = (len(images), network.head.in_features)
            features = read_array(file, shape)
            if features is None:
                features = all_features(network, as_set, self.ranks, self.progress_bar).cpu().numpy()
                with new_array(file, shape, np.float32) as array:
                    array[:] = features
            # The images are kept too, so that no other array can get this id.
            self._feature_cache[id(images)] = images, torch.from_numpy(features).to(self.ranks.device)
        return self._feature_cache[id(images)][1]


def _weights(network: TorchClassifier) -> str:
    """Return the SHA-256 of all weights except those of the last layer."""
    head = {id(parameter) for parameter in network.head.parameters()}
    digest = hashlib.sha256()
    for value in (*network.backbone.parameters(), *network.backbone.buffers()):
        if id(value) not in head:
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _content(images: NDArray[np.uint8]) -> str:
    """Return the SHA-256 of images; they are read in parts, to limit the memory."""
    digest = hashlib.sha256(str(images.shape).encode())
    for start in range(0, len(images), 256):
        digest.update(np.ascontiguousarray(images[start : start + 256]).tobytes())
    return digest.hexdigest()
