"""Federated training of a classifier, at the server's beginning and at a member.

What travels are the weights that are trained, by their names, and the running averages of batch norms that are not frozen.
What is frozen is the same at all members, since they all begin with the same published weights.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from dermis.metrics.classification import auc
from training.classifier.batches import TrainingSet, epoch_order
from training.classifier.config import ClassifierConfig
from training.classifier.data import CLASS_NAMES, RealData
from training.classifier.loop import all_features, logits_of, training_batches, training_step
from training.classifier.network import finished_network, freeze, learning_mode, new_network
from training.classifier.state import State, new_state
from training.data.cache import new_array, read_array
from training.federated.config import FederationConfig, classifier_config
from training.federated.messages.serialization import Tensors
from training.federated.site import Site, site_classifier_data, site_seed, use_device
from training.federated.tasks import client_state
from training.federated.tasks.proximal import proximal_pull
from training.federated.tasks.task import Order, Update
from training.gan.checkpoint import load_checkpoint, save_checkpoint
from training.gan.parallel import Ranks

EDGE, STEP = 25.0, 0.01  # logits are counted from -EDGE to EDGE in steps
BINS = round(2 * EDGE / STEP)


def averaged(name: str) -> bool:
    return True


def optimised(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var"))


def begin(federation: FederationConfig) -> Tensors:
    """The published weights (or what `start` names) with a new last layer."""
    network, _ = _network(federation)
    return {name: value.clone() for name, value in travelling(network, classifier_config(federation)).items()}


@lru_cache(maxsize=2)
def shapes(federation: FederationConfig) -> Tensors:
    """Tensors of the names and shapes that are exchanged."""
    network, _ = _network(federation)
    return travelling(network, classifier_config(federation))


def travelling(network: TorchClassifier, config: ClassifierConfig) -> Tensors:
    """What is exchanged, by name, as tensors on the CPU."""
    frozen = {id(buffer) for module in freeze(network, config) for buffer in module.buffers()}
    found = {name: value.detach().cpu() for name, value in network.named_parameters() if value.requires_grad}
    return found | {
        name: buffer.detach().cpu()
        for name, buffer in network.named_buffers()
        if buffer.is_floating_point() and id(buffer) not in frozen and name.startswith("backbone.")
    }


def describe(federation: FederationConfig, site: Site) -> dict[str, int]:
    """Training images, those of each class, and validation images."""
    if federation.class_names != CLASS_NAMES:
        raise TrainingError(f"classes: a classifier tells {', '.join(CLASS_NAMES)}; give these")
    real = _real(federation, site)
    per_class = {f"images-{name}": count for name, count in real.train.classes.items()}
    return {"images": len(real.train.labels), "validation": len(real.validation.labels), **per_class}


def train(order: Order, site: Site) -> Update:
    """Some steps of Adam from the global weights, with this hospital's images and its own optimizer."""
    federation, device = order.federation, use_device(site)
    config, real = classifier_config(federation), _real(federation, site)
    local = replace(config, seed=site_seed(site, config.seed, real.train.sha256))
    network, frozen = _network(federation)
    network.to(device)
    state, ranks = new_state(network, local), Ranks(device=device)
    previous = client_state.latest_before(site, order.run, order.round)
    if previous is not None:
        load_checkpoint(previous, {}, {"optimizer": state.optimizer}, {})
    _take(network, order.tensors)
    training = TrainingSet((real.train.images,), real.train.labels)
    features = _features(network, training, site, order.run, ranks) if config.cached_features else None
    start, before = time.monotonic(), (order.round - 1) * federation.iterations
    learning_mode(network, frozen)
    losses = _steps(state, training, features, local, before, federation.iterations, order.proximal_mu, ranks)
    save_checkpoint(
        client_state.path_of(site, order.run, order.round), {}, {"optimizer": state.optimizer}, {}, {"kind": "member"}
    )
    client_state.forget_old(site, order.run, order.round)
    stats = {"loss": losses / federation.iterations, "seconds": time.monotonic() - start}
    return Update(travelling(network, config), len(real.train.labels), stats)


def evaluate(federation: FederationConfig, site: Site, tensors: Tensors) -> dict[str, float]:
    """Area under the ROC curve and log loss on this hospital's validation images."""
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
    """How many validation and test images of each class have which logit: int64 [2, BINS], and how many patients.

    The logits are those of the network as it will be stored.
    """
    device, real, config = use_device(site), _real(federation, site), classifier_config(federation)
    network = global_network(federation, tensors)
    finished = finished_network(network, 0.0, config.weights_dtype)
    found: Tensors = {}
    for name in ("validation", "test"):
        part = real.parts[name]
        places = ((logits_of(finished, part.images, device) + EDGE) / STEP).clip(0, BINS - 1).astype(np.int64)
        counts = [np.bincount(places[part.labels == label], minlength=BINS) for label in (0, 1)]
        found[name] = torch.from_numpy(np.stack(counts).astype(np.int64))
        found[f"{name}-patients"] = torch.tensor([len(set(part.groups))])
    return found


def _steps(
    state: State,
    training: TrainingSet,
    features: Tensor | None,
    config: ClassifierConfig,
    before: int,
    count: int,
    mu: float,
    ranks: Ranks,
) -> float:
    """`count` steps after the first `before` ones, which are numbered through all epochs. The sum of their losses."""
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
    """The network with these weights."""
    network, _ = _network(federation)
    _take(network, tensors)
    return network


def _real(federation: FederationConfig, site: Site) -> RealData:
    return site_classifier_data(site, federation.resolution)


def _network(federation: FederationConfig) -> tuple[TorchClassifier, list[torch.nn.Module]]:
    network = copy.deepcopy(_template(federation))
    return network, freeze(network, classifier_config(federation))


@lru_cache(maxsize=1)
def _template(federation: FederationConfig) -> TorchClassifier:
    """Reading the published weights, and checking that they can be exported, takes longer than a copy."""
    return new_network(classifier_config(federation), federation.start or "imagenet")


@torch.no_grad()
def _take(network: TorchClassifier, tensors: Tensors) -> None:
    mine = dict(network.named_parameters()) | dict(network.named_buffers())
    for name, value in tensors.items():
        mine[name].copy_(value)


def _features(network: TorchClassifier, training: TrainingSet, site: Site, run: str, ranks: Ranks) -> Tensor:
    """Features of all training images, which never change when the last layer alone is trained: computed once a run."""
    file = site.state / run / "features.npy"
    shape = (len(training), network.head.in_features)
    array = read_array(file, shape)
    if array is None:
        array = all_features(network, training, ranks, progress_bar=False).cpu().numpy()
        with new_array(file, shape, np.float32) as kept:
            kept[:] = array
    return torch.from_numpy(array).to(ranks.device)
