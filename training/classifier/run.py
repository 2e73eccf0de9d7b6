"""One run: from images to a measured, calibrated and exported classifier."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dermis import __version__
from dermis.bundle.classifier import ClassifierDescription, InputSpec, write_classifier
from dermis.classifier.scores import scores_of, sigmoid
from dermis.classifier.torch_network import TorchClassifier, normalisation
from dermis.devices import describe_hardware
from dermis.errors import TrainingError
from dermis.files import write_file
from training.classifier.batches import TrainingSet
from training.classifier.calibration import DEFAULT, THRESHOLDS
from training.classifier.card import classifier_card
from training.classifier.config import ClassifierConfig
from training.classifier.data import CLASS_NAMES, RealData
from training.classifier.evaluate import evaluate
from training.classifier.export import TOLERANCE, require_onnx, run_onnx, to_onnx
from training.classifier.loop import logits_of, seen_share, train
from training.classifier.network import finished_network, new_network, prior_shift
from training.classifier.state import ClassifierProgress
from training.classifier.synthetic import SyntheticImages
from training.distributed import Ranks

Configuration = Literal["real", "synthetic", "augmented"]
FOLDER = "classifier"
CHECKED = 64  # number of test images on which the exported file is compared with torch


@dataclass(frozen=True)
class ClassifierData:
    """The images of a run: real and synthetic training images by `configuration`, and real ones to measure on."""

    configuration: Configuration
    real: RealData
    synthetic: SyntheticImages | None = None

    def __post_init__(self) -> None:
        if self.configuration not in get_args(Configuration):
            raise TrainingError(
                f"configuration: {self.configuration!r} is none of {', '.join(get_args(Configuration))}"
            )
        if (self.configuration == "real") != (self.synthetic is None):
            raise TrainingError(
                f"synthetic: the configuration {self.configuration} needs {'no ' if self.synthetic else ''}synthetic images"
            )

    @property
    def training(self) -> TrainingSet:
        """The training images."""
        arrays, labels = [], []
        if self.configuration != "synthetic":
            arrays.append(self.real.train.images)
            labels.append(self.real.train.labels)
        if self.synthetic is not None:
            arrays += self.synthetic.images
            labels.append(np.array(self.synthetic.labels, dtype=np.int64))
        return TrainingSet(tuple(arrays), np.concatenate(labels))

    @property
    def digest(self) -> str:
        """SHA-256 that changes with any image, class or part."""
        parts = {name: part.sha256 for name, part in self.real.parts.items()}
        synthetic = [dict(source) for source in self.synthetic.origin] if self.synthetic else []
        content = [self.configuration, parts, synthetic]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def generator_saw_training_part_only(self) -> bool:
        """Whether every synthetic image is from a bundle that was trained on exactly the real training part."""
        return self.synthetic is not None and all(
            each.get("trained_on") == self.real.train.sha256 for each in self.synthetic.origin
        )


@dataclass(frozen=True)
class ClassifierOrigin:
    """The name of a classifier, and the part of its provenance that the user states."""

    name: str
    scenario: str
    licence: str
    attribution: str


@dataclass(frozen=True)
class TrainedClassifier:
    """The result of a finished run: the classifier's folder and description, and the progress of the training."""

    folder: Path
    description: ClassifierDescription
    progress: ClassifierProgress


def train_classifier(
    data: ClassifierData,
    config: ClassifierConfig,
    out: Path,
    *,
    origin: ClassifierOrigin,
    ranks: Ranks,
    weights: str = "imagenet",
    default_threshold: str = DEFAULT,
    resume: bool = False,
    loggers: Sequence[str] = (),
    progress_bar: bool = True,
    on_phase: Callable[[str], None] = lambda text: None,
) -> TrainedClassifier | None:
    """Train, calibrate and choose thresholds on validation images, measure on test images, and export.

    Args:
        data: The images.
        config: Hyper-parameters.
        out: Folder of the run. It gets the files of `train`, predictions.csv (of validation and test), evaluation.json, and
            the folder `classifier`, which is replaced.
        origin: Name and stated provenance.
        ranks: The processes; the first one writes.
        weights: First weights, as for `new_network`.
        default_threshold: Name of the threshold that is the default.
        resume: Continue the run that is in `out`.
        loggers: Where curves go besides log.jsonl (`training.loggers`).
        progress_bar: Show progress bars.
        on_phase: Called with the name of each phase after the training.

    Returns:
        The result; None if the user stopped the training, or on all ranks but the first.

    Raises:
        TrainingError: An option is not valid (before the training, if possible), or the training or export failed.
    """
    require_onnx()
    if default_threshold not in THRESHOLDS:
        raise TrainingError(f"default_threshold: {default_threshold!r} is none of {', '.join(THRESHOLDS)}")
    if config.precision == "bf16" and config.cached_features:
        raise TrainingError("precision: a head on cached features is trained in fp32")
    training = data.training
    with ranks.first_rank_first():
        network = new_network(config, weights)
    best, progress = train(
        network,
        training,
        data.real.validation,
        config,
        out,
        data=data.digest,
        ranks=ranks,
        resume=resume,
        loggers=loggers,
        progress_bar=progress_bar,
    )
    if progress.stopped or not ranks.first:
        return None
    on_phase("measuring")
    shift = prior_shift(seen_share(training, config), data.real.validation.positive_share)
    finished = finished_network(best, shift, config.weights_dtype)
    parts = {name: data.real.parts[name] for name in ("validation", "test")}
    logits = {name: logits_of(finished, part.images, ranks.device) for name, part in parts.items()}
    finished.cpu()
    metrics = evaluate(parts, logits, default_threshold=default_threshold)
    _write_predictions(out / "predictions.csv", data.real, logits, metrics)
    write_file(out / "evaluation.json", (json.dumps(metrics, indent=2) + "\n").encode())
    on_phase("exporting")
    model = to_onnx(finished, config.size, config.weights_dtype)
    check_agreement(model, data.real.test.images[:CHECKED], logits["test"][:CHECKED])
    description = _describe(data, config, origin, weights, finished, progress, metrics, ranks)
    card = classifier_card(origin.name, description)
    description = write_classifier(out / FOLDER, description, model, card, replace=(out / FOLDER).exists())
    return TrainedClassifier(out / FOLDER, description, progress)


def _describe(
    data: ClassifierData,
    config: ClassifierConfig,
    origin: ClassifierOrigin,
    weights: str,
    network: TorchClassifier,
    progress: ClassifierProgress,
    metrics: Mapping[str, Any],
    ranks: Ranks,
) -> ClassifierDescription:
    real = data.real
    dataset = {
        "name": real.name,
        "configuration": data.configuration,
        "split": real.split,
        "parts": {name: {**part.classes, "sha256": part.sha256} for name, part in real.parts.items()},
        "synthetic": [dict(source) for source in data.synthetic.origin] if data.synthetic else [],
        "generator_saw_training_part_only": data.generator_saw_training_part_only,
    }
    training = {
        "configuration": config.to_dict(),
        "weights": weights if weights in ("imagenet", "none") else Path(weights).name,
        "epochs": progress.epoch,
        "best_epoch": progress.best_epoch + 1,
        "images": progress.images,
        "hardware": (f"{ranks.count} x " if ranks.count > 1 else "") + describe_hardware(ranks.device),
    }
    mean, std = normalisation(config.architecture, network.backbone)
    return ClassifierDescription(
        architecture=config.architecture,
        input=InputSpec(config.size, mean, std),
        class_names=CLASS_NAMES,
        positive_class=CLASS_NAMES[1],
        temperature=metrics["temperature"],
        thresholds=metrics["thresholds"],
        weights_dtype=config.weights_dtype,
        feature_dim=network.head.in_features,
        provenance={
            "dataset": dataset,
            "training": training,
            "scenario": origin.scenario or data.configuration,
            "hours": round(progress.seconds / 3600, 3),
            "licence": origin.licence,
            "attribution": origin.attribution,
            "code_version": __version__,
        },
        metrics=metrics,
    )


def check_agreement(model: bytes, images: NDArray[np.uint8], logits: NDArray[np.float64]) -> None:
    """Raise TrainingError if the probabilities of the exported file differ from those of torch.

    Args:
        model: The ONNX file.
        images: uint8 [N, S, S, 3].
        logits: float64 [N], computed by torch.
    """
    difference = float(np.abs(sigmoid(run_onnx(model, images)) - sigmoid(logits)).max())
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"the exported file's probabilities differ by up to {difference:.1e} from those of torch; the classifier is "
            "not written"
        )


def _write_predictions(
    path: Path, real: RealData, logits: Mapping[str, NDArray[np.float64]], metrics: Mapping[str, Any]
) -> None:
    """Write the scores of all images of validation and test, for edge cases and comparisons.

    The file contains names of images, and is therefore not a part of a bundle.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("isic_id", "part", "label", "logit", "probability", "calibrated"))
    for name, values in logits.items():
        part, scores = real.parts[name], scores_of(values, metrics["temperature"])
        rows = zip(part.ids, part.labels, scores.logits, scores.probabilities, scores.calibrated, strict=True)
        for image, label, *numbers in rows:
            writer.writerow((image, name, int(label), *(f"{number:.6f}" for number in numbers)))
    write_file(path, text.getvalue().encode())
