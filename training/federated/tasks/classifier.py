"""Federated training of a classifier: the first weights on the server, training, measuring and counting on a client.

The tensors that are exchanged are the trained weights, by their names, and the running averages of batch norms that are not
frozen. Frozen weights are the same on all clients, since all start from the same published weights.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from dermis.metrics.classification import auc
from training.checkpoint import load_checkpoint, save_checkpoint
from training.classifier.batches import TrainingSet, epoch_order
from training.classifier.config import ClassifierConfig
from training.classifier.data import CLASS_NAMES, RealData
from training.classifier.loop import all_features, logits_of, training_batches, training_step
from training.classifier.network import finished_network, freeze, new_network, set_train_mode
from training.classifier.state import ClassifierState, new_state
from training.data.cache import new_array, read_array
from training.data.splits import count_without_ids
from training.distributed import Ranks
from training.federated.config import FederationConfig, classifier_config
from training.federated.messages.serialization import Tensors
from training.federated.site import Site, site_classifier_data, site_seed, use_device
from training.federated.tasks import client_state
from training.federated.tasks.proximal import proximal_pull
from training.federated.tasks.task import FederatedTask, TrainingRequest, Update

EDGE, STEP = 25.0, 0.01  # logits are counted in bins of width STEP from -EDGE to EDGE
BINS = round(2 * EDGE / STEP)


def is_averaged(name: str) -> bool:
    """Return True: clients send back all tensors."""
    return True


def is_optimised(name: str) -> bool:
    """Return whether this is a weight, which a server optimizer can move, and not a running average."""
    return not name.endswith(("running_mean", "running_var"))


def begin(federation: FederationConfig) -> Tensors:
    """Return the published weights, or those that `start` names, with a new last layer."""
    network, _ = _network(federation)
    return {name: value.clone() for name, value in exchanged(network, classifier_config(federation)).items()}


@lru_cache(maxsize=2)
def shapes(federation: FederationConfig) -> Tensors:
    """Return tensors with the names and shapes that are exchanged."""
    network, _ = _network(federation)
    return exchanged(network, classifier_config(federation))


def exchanged(network: TorchClassifier, config: ClassifierConfig) -> Tensors:
    """Return the tensors that are exchanged, by name, on the CPU."""
    frozen = {id(buffer) for module in freeze(network, config) for buffer in module.buffers()}
    weights = {name: value.detach().cpu() for name, value in network.named_parameters() if value.requires_grad}
    return weights | {
        name: buffer.detach().cpu()
        for name, buffer in network.named_buffers()
        if buffer.is_floating_point() and id(buffer) not in frozen and name.startswith("backbone.")
    }


def describe(federation: FederationConfig, site: Site) -> dict[str, int]:
    """Return the numbers of training images, of those in each class, and of validation images."""
    if federation.class_names != CLASS_NAMES:
        raise TrainingError(f"classes: a classifier distinguishes {', '.join(CLASS_NAMES)}; set classes to these")
    real = _real(federation, site)
    per_class = {f"images-{name}": count for name, count in real.train.classes.items()}
    return {"images": len(real.train.labels), "validation": len(real.validation.labels), **per_class}


def train(request: TrainingRequest, site: Site) -> Update:
    """Train from the global weights for some steps of Adam, with this client's images and its own optimizer."""
    federation, device = request.federation, use_device(site)
    config, real = classifier_config(federation), _real(federation, site)
    local = replace(config, seed=site_seed(site, config.seed, real.train.sha256))
    network, frozen = _network(federation)
    network.to(device)
    state, ranks = new_state(network, local), Ranks(device=device)
    previous = client_state.latest_before(site, request.run, request.round)
    if previous is not None:
        load_checkpoint(previous, {}, {"optimizer": state.optimizer}, {})
    _set_tensors(network, request.tensors)
    training = TrainingSet((real.train.images,), real.train.labels)
    features = None
    if config.cached_features:
        features = _features(network, training, client_state.features_of(site, request.run, real.train.sha256), ranks)
    start, before = time.monotonic(), (request.round - 1) * federation.iterations
    set_train_mode(network, frozen)
    losses = _steps(state, training, features, local, before, federation.iterations, request.proximal_mu, ranks)
    save_checkpoint(
        client_state.path_of(site, request.run, request.round),
        {},
        {"optimizer": state.optimizer},
        {},
        {"kind": "member"},
    )
    client_state.delete_old_states(site, request.run, request.round)
    stats = {"loss": losses / federation.iterations, "seconds": time.monotonic() - start}
    return Update(exchanged(network, config), len(real.train.labels), stats)


def evaluate(federation: FederationConfig, site: Site, tensors: Tensors) -> dict[str, float]:
    """Measure the area under the ROC curve and the log loss on this client's validation images."""
    device, part = use_device(site), _real(federation, site).validation
    network = global_network(federation, tensors)
    logits = logits_of(network, part.images, device)
    loss = F.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(part.labels).double())
    return {
        "auc": float(auc(part.labels, logits)[0]),
        "loss": float(loss),
        "images": float(len(part.labels)),
    }


def count(federation: FederationConfig, site: Site, tensors: Tensors) -> Tensors:
    """Count validation and test images by class and logit.

    The logits are those of the network as it will be stored.

    Returns:
        For each part, "validation" and "test", counts int64 [2, BINS]; under "PART-patients" the number of patients, and under
        "PART-without_ids" the number of those that are images without an id, each int64 [1].
    """
    device, real, config = use_device(site), _real(federation, site), classifier_config(federation)
    network = global_network(federation, tensors)
    finished = finished_network(network, 0.0, config.weights_dtype)
    counts: Tensors = {}
    for name in ("validation", "test"):
        part = real.parts[name]
        bins = ((logits_of(finished, part.images, device) + EDGE) / STEP).clip(0, BINS - 1).astype(np.int64)
        by_class = [np.bincount(bins[part.labels == label], minlength=BINS) for label in (0, 1)]
        counts[name] = torch.from_numpy(np.stack(by_class).astype(np.int64))
        counts[f"{name}-patients"] = torch.tensor([len(set(part.groups))])
        counts[f"{name}-without_ids"] = torch.tensor([count_without_ids(part.groups)])
    return counts


def _steps(
    state: ClassifierState,
    training: TrainingSet,
    features: Tensor | None,
    config: ClassifierConfig,
    before: int,
    count: int,
    mu: float,
    ranks: Ranks,
) -> float:
    """Run `count` steps after the first `before` ones, numbered through all epochs; returns the sum of their losses."""
    progress, adjust, total, end = state.progress, proximal_pull([state.network], mu), 0.0, before + count
    while before < end:
        length = len(epoch_order(training.labels, config, 0, ranks))
        progress.epoch, progress.step = divmod(before, length)
        order = epoch_order(training.labels, config, progress.epoch, ranks)[progress.step :][: end - before]
        progress.loss_sum = 0.0
        for chosen, images in training_batches(training, features, order, ranks):
            training_step(state, images, training.labels[chosen], config, training, ranks, adjust)
        total += progress.loss_sum
        before += len(order)
    if not np.isfinite(total):
        raise TrainingError(f"the loss became {total}; lower learning_rate")
    return total


def global_network(federation: FederationConfig, tensors: Tensors) -> TorchClassifier:
    """Return the network with these weights."""
    network, _ = _network(federation)
    _set_tensors(network, tensors)
    return network


def _real(federation: FederationConfig, site: Site) -> RealData:
    return site_classifier_data(site, federation.resolution)


def _network(federation: FederationConfig) -> tuple[TorchClassifier, list[torch.nn.Module]]:
    network = copy.deepcopy(_template(federation))
    return network, freeze(network, classifier_config(federation))


@lru_cache(maxsize=1)
def _template(federation: FederationConfig) -> TorchClassifier:
    """Cached, since reading the published weights and checking that they can be exported takes longer than a copy."""
    return new_network(classifier_config(federation), federation.start or "imagenet")


@torch.no_grad()
def _set_tensors(network: TorchClassifier, tensors: Tensors) -> None:
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, value in tensors.items():
        own[name].copy_(value)


def _features(network: TorchClassifier, training: TrainingSet, file: Path, ranks: Ranks) -> Tensor:
    """Return the features of all training images. They never change if only the last layer is trained: computed once a run."""
    shape = (len(training), network.head.in_features)
    array = read_array(file, shape)
    if array is None:
        array = all_features(network, training, ranks, progress_bar=False).cpu().numpy()
        with new_array(file, shape, np.float32) as kept:
            kept[:] = array
    return torch.from_numpy(array).to(ranks.device)


TASK = FederatedTask(
    begin=begin,
    shapes=shapes,
    is_averaged=is_averaged,
    is_optimised=is_optimised,
    describe=describe,
    train=train,
    evaluate=evaluate,
    count=count,
)
