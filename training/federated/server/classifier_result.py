"""The classifier that a federation becomes: exported, calibrated and measured from counts that members sent.

Members count how many of their validation and test images have which logit. Added up, that gives every number that the
images themselves would give, to the width of a bin; only which images are of one patient is not known, so that intervals are
over images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis import __version__
from dermis.bundle.classifier import Description, InputSpec, write_classifier
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
from training.federated.config import FederationConfig, classifier_config
from training.federated.messages.serialization import Tensors
from training.federated.server.global_state import GlobalState
from training.federated.server.provenance import federation_facts, federation_section
from training.federated.tasks.classifier import BINS, EDGE, STEP, global_network

FOLDER = "classifier"
_PARTS = ("validation", "test")
_CHECKED = 4


def finish(federation: FederationConfig, state: GlobalState, out: Path, counted: Tensors | None) -> Path:
    """Write (or replace) out/classifier; returns its folder. TrainingError if members' counts lack a class."""
    config = classifier_config(federation)
    counts = counted or {}
    found = {part: _from_counts(counts, part) for part in _PARTS}
    for part, (measured, _) in found.items():
        if len(set(measured.labels)) < 2:
            raise TrainingError(f"the members' {part} images together lack a class: nothing can be measured")
    train = _training_set(state)
    shift = prior_shift(seen_share(train, config), found["validation"][0].positive_share)
    parts = {part: measured for part, (measured, _) in found.items()}
    logits = {part: values + shift for part, (_, values) in found.items()}
    metrics = evaluate(parts, logits, default_threshold=DEFAULT)
    for part in _PARTS:
        patients = [int(v.sum()) for name, v in counts.items() if name.endswith(f"/{part}-patients")]
        metrics[part]["patients"] = sum(patients)
    network = global_network(federation, state.tensors)
    finished = finished_network(network, shift, config.weights_dtype)
    model = to_onnx(finished, config.size, config.weights_dtype)
    noise = np.random.default_rng(0).integers(0, 256, (_CHECKED, config.size, config.size, 3), dtype=np.uint8)
    device = next(finished.parameters()).device
    check_agreement(model, noise, logits_of(finished, noise, device))
    facts = federation_facts(federation, state)
    mean, std = normalisation(config.architecture, finished.backbone)
    described = Description(
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
                "name": f"federation of {len(state.participants)}",
                "configuration": "real",
                "split": "by patient at each member",
                "parts": {"train": _classes(train.labels)} | {part: parts[part].classes for part in _PARTS},
                "synthetic": [],
                "generator_saw_training_part_only": False,
            },
            "training": {
                "configuration": config.to_dict(),
                "weights": _begun_with(federation),
                "images": federation.iterations * config.batch * sum(member.rounds for member in state.participants),
                "hardware": "the members' own",
            },
            "federation": facts,
            "scenario": "federated",
            "hours": round(state.seconds / 3600, 3),
            "licence": federation.licence,
            "attribution": federation.attribution,
            "code_version": __version__,
        },
        metrics=metrics,
    )
    card = classifier_card(federation.name, described)
    card = card.replace("\n## Training\n", f"\n{federation_section(facts)}{_INTERVALS}\n## Training\n", 1)
    card = card.replace("by bootstrap over patients", "by bootstrap over images", 1)
    write_classifier(out / FOLDER, described, model, card, replace=(out / FOLDER).exists())
    return out / FOLDER


_INTERVALS = """
Measured from counts of logits that the members added up: intervals below are over images, since nobody but a member knows
which of them are of one patient, and so are a little too narrow.
"""


def _from_counts(counts: Tensors, part: str) -> tuple[RealPart, NDArray[np.float64]]:
    """Labels and logits that have these counts, and of each the member."""
    labels, logits, members = [np.zeros(0, np.int64)], [np.zeros(0)], list[str]()
    centres = (np.arange(BINS) + 0.5) * STEP - EDGE
    for name in sorted(name for name in counts if name.endswith(f"/{part}")):
        table = counts[name].numpy()
        if table.shape != (2, BINS) or table.dtype != np.int64 or table.min() < 0 or table.sum() > 10**8:
            raise TrainingError(f"{name.partition('/')[0]}: sent counts of another form; its version may be another")
        for label in (0, 1):
            values = np.repeat(centres, table[label])
            logits.append(values)
            labels.append(np.full(len(values), label, np.int64))
            members += [name.partition("/")[0]] * len(values)
    joined = np.concatenate(labels)
    groups = tuple(map(str, range(len(joined))))
    part_of = RealPart(np.zeros((0, 1, 1, 3), np.uint8), joined, groups, groups, {"source": tuple(members)}, "")
    return part_of, np.concatenate(logits)


def _training_set(state: GlobalState) -> TrainingSet:
    """The members' training labels, for their numbers; no image is known here."""
    labels = np.repeat(np.arange(2, dtype=np.int64), [state.images_of(name) for name in CLASS_NAMES])
    return TrainingSet((np.zeros((0, 1, 1, 3), np.uint8),), labels)


def _classes(labels: NDArray[np.int64]) -> dict[str, Any]:
    return {name: int((labels == k).sum()) for k, name in enumerate(CLASS_NAMES)}


def _begun_with(federation: FederationConfig) -> str:
    start = federation.start or "imagenet"
    return start if start in ("imagenet", "none") else Path(start).name
