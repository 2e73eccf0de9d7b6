"""The classifier of a federation: exported, calibrated and measured from the clients' counts.

Clients count their validation and test images by class and logit. The sums give the same numbers as the images would, up to
the width of a bin. The counts do not contain which images belong to the same patient, so intervals are over images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray

from dermis import __version__
from dermis.bundle.classifier import ClassifierDescription, InputSpec, write_classifier
from dermis.classifier.torch_network import normalisation
from dermis.errors import TrainingError
from training.classifier.batches import TrainingSet
from training.classifier.calibration import DEFAULT
from training.classifier.card import classifier_card
from training.classifier.data import CLASS_NAMES, RealPart
from training.classifier.evaluate import evaluate
from training.classifier.export import to_onnx
from training.classifier.loop import logits_of, seen_share
from training.classifier.network import finished_network, prior_shift
from training.classifier.run import check_agreement
from training.federated.config import OF_EPOCHS, FederationConfig, classifier_config
from training.federated.messages.replies import ARRAYS, MAX_IMAGES
from training.federated.messages.serialization import RefusedError, Tensors, unpack
from training.federated.server.global_state import GlobalState
from training.federated.server.provenance import federation_provenance, federation_section
from training.federated.tasks.classifier import BINS, EDGE, STEP, global_network

FOLDER = "classifier"
_PARTS = ("validation", "test")
_TOTALS = ("patients", "without_ids")  # of each part
_CHECKED_IMAGES = 4
_MAX_BYTES = 2**20  # of the counts of a client; they have about 160 KB


def write_result(federation: FederationConfig, state: GlobalState, out: Path, counts: Tensors) -> Path:
    """Write or replace the folder `classifier` in `out`.

    Args:
        federation: Options.
        state: The state after the last round.
        out: The federation's folder.
        counts: The clients' counts that passed `read_counts`, under "CLIENT/NAME".

    Returns:
        The classifier's folder.

    Raises:
        TrainingError: The counts lack a class.
    """
    config = classifier_config(federation)
    parts, logits = dict[str, RealPart](), dict[str, NDArray[np.float64]]()
    for part in _PARTS:
        parts[part], logits[part] = _from_counts(counts, part)
    for part, images in parts.items():
        if len(set(images.labels)) < 2:
            raise TrainingError(f"the {part} images of all clients together lack a class, so nothing can be measured")
    train = _training_set(state)
    shift = prior_shift(seen_share(train, config), parts["validation"].positive_share)
    logits = {part: values + shift for part, values in logits.items()}
    metrics = evaluate(parts, logits, default_threshold=DEFAULT)
    for part in _PARTS:
        for key in _TOTALS:
            metrics[part][key] = sum(int(v.sum()) for name, v in counts.items() if name.endswith(f"/{part}-{key}"))
    network = global_network(federation, state.tensors)
    finished = finished_network(network, shift, config.weights_dtype)
    model = to_onnx(finished, config.size, config.weights_dtype)
    noise = np.random.default_rng(0).integers(0, 256, (_CHECKED_IMAGES, config.size, config.size, 3), dtype=np.uint8)
    device = next(finished.parameters()).device
    check_agreement(model, noise, logits_of(finished, noise, device))
    provenance = federation_provenance(federation, state)
    mean, std = normalisation(config.architecture, finished.backbone)
    description = ClassifierDescription(
        architecture=config.architecture,
        input=InputSpec(config.size, mean, std),
        class_names=CLASS_NAMES,
        positive_class=CLASS_NAMES[1],
        temperature=metrics["temperature"],
        thresholds=metrics["thresholds"],
        weights_dtype=config.weights_dtype,
        feature_dim=finished.head.in_features,
        provenance={
            "dataset": {
                "name": f"federation of {len(state.contributors)}",
                "configuration": "real",
                "split": "by patient on each client",
                "parts": {"train": _classes(train.labels)} | {part: parts[part].classes for part in _PARTS},
                "synthetic": [],
                "generator_saw_training_part_only": False,
            },
            "training": {
                "configuration": {name: value for name, value in config.to_dict().items() if name not in OF_EPOCHS},
                "weights": _started_from(federation),
                "images": federation.iterations * config.batch * sum(client.rounds for client in state.contributors),
                "hardware": "the clients' own",
            },
            "federation": provenance,
            "scenario": "federated",
            "hours": round(state.seconds / 3600, 3),
            "licence": federation.licence,
            "attribution": federation.attribution,
            "code_version": __version__,
        },
        metrics=metrics,
    )
    card = classifier_card(federation.name, description)
    card = card.replace("\n## Training\n", f"\n{federation_section(provenance)}{_INTERVALS}\n## Training\n", 1)
    card = card.replace("by bootstrap over patients", "by bootstrap over images", 1)
    write_classifier(out / FOLDER, description, model, card, replace=(out / FOLDER).exists())
    return out / FOLDER


_INTERVALS = """
Measured from the clients' counts of logits. The intervals below are over images, because the counts do not contain which images
belong to the same patient; so they are a little too narrow.
"""


def read_counts(reply: Message, validation: int) -> Tensors:
    """Check a client's counts of images (`tasks.classifier.count`).

    Args:
        reply: The client's message, which is not an error.
        validation: The number of validation images that the client announced.

    Raises:
        RefusedError: They must not be used; the text says why.
    """
    record = reply.content.array_records.get(ARRAYS)
    if record is None:
        raise RefusedError("the reply has no arrays")
    counts = unpack(record, _MAX_BYTES)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_PARTS, (2, BINS))
    shapes |= {f"{part}-{key}": (1,) for part in _PARTS for key in _TOTALS}
    if counts.keys() != shapes.keys():
        raise RefusedError(f"the counts must be {', '.join(shapes)}")
    for name, shape in shapes.items():
        values = counts[name]
        if values.dtype != torch.int64 or tuple(values.shape) != shape:
            raise RefusedError(f"{name} is {values.dtype} {list(values.shape)} and must be torch.int64 {list(shape)}")
        if int(values.min()) < 0 or int(values.max()) > MAX_IMAGES or int(values.sum()) > MAX_IMAGES:
            raise RefusedError(f"{name} must hold counts from 0 to {MAX_IMAGES:,}")
    for part in _PARTS:
        images = int(counts[part].sum())
        patients, alone = (int(counts[f"{part}-{key}"]) for key in _TOTALS)
        if part == "validation" and images != validation:
            raise RefusedError(f"counts {images} validation images, but announced {validation}")
        if not alone <= patients <= images:
            raise RefusedError(f"counts {patients} patients of {images} {part} images, {alone} of them without an id")
    return counts


def _from_counts(counts: Tensors, part: str) -> tuple[RealPart, NDArray[np.float64]]:
    """Return images with the labels and clients of these counts, without pixels, and their logits."""
    labels, logits, clients = [np.zeros(0, np.int64)], [np.zeros(0)], list[str]()
    centres = (np.arange(BINS) + 0.5) * STEP - EDGE
    for name in sorted(name for name in counts if name.endswith(f"/{part}")):
        table = counts[name].numpy()
        for label in (0, 1):
            values = np.repeat(centres, table[label])
            logits.append(values)
            labels.append(np.full(len(values), label, np.int64))
            clients += [name.partition("/")[0]] * len(values)
    joined = np.concatenate(labels)
    groups = tuple(map(str, range(len(joined))))
    no_pixels = np.zeros((0, 1, 1, 3), np.uint8)
    images = RealPart(no_pixels, joined, groups, groups, {"source": tuple(clients)}, "")
    return images, np.concatenate(logits)


def _training_set(state: GlobalState) -> TrainingSet:
    """Return a training set with as many labels of each class as the clients have, without pixels."""
    labels = np.repeat(np.arange(2, dtype=np.int64), [state.images_of(name) for name in CLASS_NAMES])
    return TrainingSet((np.zeros((0, 1, 1, 3), np.uint8),), labels)


def _classes(labels: NDArray[np.int64]) -> dict[str, Any]:
    return {name: int((labels == k).sum()) for k, name in enumerate(CLASS_NAMES)}


def _started_from(federation: FederationConfig) -> str:
    start = federation.start or "imagenet"
    return start if start in ("imagenet", "none") else Path(start).name
