"""Federated training of StyleGAN2-ADA: the first weights on the server, training and measuring on a client.

The tensors that are exchanged have the names "G/...", "G_ema/...", "D/..." (unless only the generator is shared),
"pl_mean", and "p" (the strength of augmentation); with a shared optimizer also "G_opt/..." and "D_opt/...". All of them
are averaged, also running averages such as `w_avg` and G_ema, which are linear in what they average. The constant noise and
the filters never change: the server sends them, so that all clients generate the same images, and clients do not send
them back.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dermis.errors import TrainingError
from dermis.features import feature_extractor
from dermis.metrics import frechet_distance, kernel_distance
from dermis.networks import Generator
from training.data.images import ImageDataset
from training.distributed import Ranks
from training.evaluation.features import labels_in_proportion, real_features
from training.federated.config import FederationConfig, gan_config
from training.federated.messages.serialization import RefusedError, Tensors
from training.federated.site import Site, SiteImages, site_images, site_seed, use_device
from training.federated.tasks import client_state
from training.federated.tasks.proximal import proximal_pull
from training.federated.tasks.task import FederatedTask, TrainingRequest, Update
from training.gan.batches import batches
from training.gan.divergence import DivergenceCheck
from training.gan.snapshot import draw_samples
from training.gan.state import GanState, load_state, new_state, save_state
from training.gan.step import training_step
from training.gan.transfer import read_source, transfer

MIN_VALIDATION_IMAGES = 10  # with fewer a distance has no meaning
_FIXED = ("noise_const", "resample_filter")
_RUNNING = ("G_ema/", "G_opt/", "D_opt/", "pl_mean", "p")
_BATCH = 32
_SLOTS = ("exp_avg", "exp_avg_sq", "step")


def is_averaged(name: str) -> bool:
    """Return whether clients send back the tensor of this name."""
    return not name.endswith(_FIXED)


def is_optimised(name: str) -> bool:
    """Return whether this is a weight of G or D, which a server optimizer can move; running averages are always averaged."""
    return is_averaged(name) and not name.startswith(_RUNNING) and not name.endswith(("w_avg", "_u", "_v"))


def begin(federation: FederationConfig) -> Tensors:
    """Return random weights from the federation's seed, or those of `start`."""
    device = torch.device("cpu")
    state = new_state(gan_config(federation, device), device)
    if federation.start:
        transfer(read_source(Path(federation.start)), state)
    return {name: value.clone() for name, value in exchanged(state, federation).items()}


@lru_cache(maxsize=2)
def shapes(federation: FederationConfig) -> Tensors:
    """Return tensors with the names and shapes that are exchanged; their values mean nothing."""
    device = torch.device("cpu")
    return exchanged(new_state(gan_config(federation, device), device), federation)


def exchanged(state: GanState, federation: FederationConfig) -> Tensors:
    """Return the tensors that are exchanged, by name, on the CPU. On the CPU they can share memory with the state."""
    networks: dict[str, nn.Module] = {"G": state.G, "G_ema": state.G_ema}
    if federation.share == "both":
        networks["D"] = state.D
    tensors = {
        f"{network}/{name}": value.detach().cpu()
        for network, module in networks.items()
        for name, value in module.state_dict().items()
        if value.is_floating_point()
    }
    tensors["pl_mean"] = state.pl_mean.detach().cpu().reshape(1)
    tensors["p"] = torch.tensor([state.adaptive.p], dtype=torch.float64)
    if federation.optimizer == "shared":
        for name, optimizer in _optimizers(state, federation).items():
            tensors |= {f"{name}/{key}": value for key, value in _slots(optimizer).items()}
    return tensors


@torch.no_grad()
def set_tensors(state: GanState, federation: FederationConfig, tensors: Tensors) -> None:
    """Copy received tensors into the state; the rest of the state stays as it is.

    Raises:
        RefusedError: Names or shapes are not those of this federation's options.
    """
    own = exchanged(state, federation)
    if own.keys() != tensors.keys() or any(own[name].shape != tensors[name].shape for name in own):
        raise RefusedError("the global model has other tensors than this federation's options make")
    for network, module in (("G", state.G), ("G_ema", state.G_ema), ("D", state.D)):
        for name, value in module.state_dict().items():
            if (received := tensors.get(f"{network}/{name}")) is not None:
                value.copy_(received)
    state.pl_mean.copy_(tensors["pl_mean"].reshape(()))
    state.adaptive = replace(state.adaptive, p=float(min(max(tensors["p"].item(), 0.0), 1.0)))
    if federation.optimizer == "shared":
        for name, optimizer in _optimizers(state, federation).items():
            _fill_slots(optimizer, name, tensors)


def describe(federation: FederationConfig, site: Site) -> dict[str, int]:
    """Return the numbers of training images, of those in each class, and of validation images."""
    images = _images(federation, site)
    counts = np.bincount(images.train.labels, minlength=len(federation.class_names))
    per_class = {f"images-{name}": int(count) for name, count in zip(federation.class_names, counts, strict=True)}
    validation = 0 if images.validation is None else len(images.validation.labels)
    return {"images": len(images.train.labels), "validation": validation, **per_class}


def train(request: TrainingRequest, site: Site) -> Update:
    """Train from the global tensors for some iterations, with this client's images and its own optimizers.

    Steps are numbered through all rounds, so that the random numbers of a round do not depend on which earlier rounds this
    client took part in. A federation of one client computes the same as `training.gan.loop.train`, bit for bit on the CPU.
    """
    federation, device = request.federation, use_device(site)
    images = _images(federation, site)
    dataset, config = images.train, gan_config(federation, device)
    local = replace(config, seed=site_seed(site, config.seed, dataset.sha256))
    if len(dataset.labels) < config.batch:
        raise TrainingError(
            f"batch: {config.batch} is more than the {len(dataset.labels)} training images of this site"
        )
    state = new_state(config, device)
    previous = client_state.latest_before(site, request.run, request.round)
    if previous is not None:
        # The server guards the federation's options. What else can differ is the precision, which `auto` takes from the
        # device: a site can continue on another machine.
        load_state(previous, state, local, dataset, allow_changes=True)
    set_tensors(state, federation, request.tensors)
    checkpoint = client_state.path_of(site, request.run, request.round)
    state.progress.step = (request.round - 1) * federation.iterations
    state.progress.nimg = state.progress.step * config.batch
    start, totals = time.monotonic(), dict[str, list[float]]()
    phases = state.phases(local, Ranks(device=device))
    health = DivergenceCheck(checkpoint)
    adjust = proximal_pull((state.G, state.D), request.proximal_mu)
    with closing(batches(dataset, local, state.progress.nimg, phases.ranks)) as real:
        for _ in range(federation.iterations):
            stats = training_step(state, phases, dataset, next(real), local, adjust)
            health.check(state.progress.kimg, stats)
            for name, value in stats.items():
                totals.setdefault(name, []).append(value)
    state.progress.seconds += time.monotonic() - start
    save_state(checkpoint, state, local, dataset)
    client_state.delete_old_states(site, request.run, request.round)
    tensors = {name: value for name, value in exchanged(state, federation).items() if is_averaged(name)}
    means = {name: float(np.mean(values)) for name, values in totals.items() if not name.endswith("_gradient")}
    return Update(tensors, len(dataset.labels), means | {"seconds": time.monotonic() - start})


def evaluate(federation: FederationConfig, site: Site, tensors: Tensors) -> dict[str, float]:
    """Measure the distance of generated images to this client's validation images.

    The generated images have the same proportions of classes as the validation images.

    Returns:
        Numbers as of `distances`; none if there are fewer than `MIN_VALIDATION_IMAGES` validation images.
    """
    device = use_device(site)
    images = _images(federation, site)
    if images.validation is None or len(images.validation.labels) < MIN_VALIDATION_IMAGES:
        return {}
    generator = Generator(gan_config(federation, device).generator).to(device).eval()
    with torch.no_grad():
        for name, value in generator.state_dict().items():
            value.copy_(tensors[f"G_ema/{name}"])
    return distances(generator, images.validation, federation, device, site)


def distances(
    generator: Generator, real: ImageDataset, federation: FederationConfig, device: torch.device, site: Site
) -> dict[str, float]:
    """Compute the Fréchet distance and KID of generated images against `real`, in the federation's feature space.

    Returns:
        "fid", "kid", and the numbers of real ("images") and of generated images ("generated").
    """
    space = feature_extractor(federation.extractor, device)
    labels = labels_in_proportion(real.labels, federation.evaluate_images)
    generated = space.over(_generate(generator, labels, federation.seed, device))
    features = real_features(real, space, site.cache)
    kid, _ = kernel_distance(features, generated)
    return {
        "fid": frechet_distance(features, generated),
        "kid": kid,
        "images": float(len(real.labels)),
        "generated": float(len(labels)),
    }


def _images(federation: FederationConfig, site: Site) -> SiteImages:
    return site_images(site, federation.class_names, federation.binary, federation.resolution)


def _generate(
    generator: Generator, labels: NDArray[np.int64], seed: int, device: torch.device
) -> list[NDArray[np.uint8]]:
    parts = [range(start, min(start + _BATCH, len(labels))) for start in range(0, len(labels), _BATCH)]
    return [draw_samples(generator, seed, part, labels[part.start : part.stop], device) for part in parts]


def _optimizers(state: GanState, federation: FederationConfig) -> dict[str, torch.optim.Optimizer]:
    both = federation.share == "both"
    return {name: each for name, each in state.optimizers.items() if both or name == "G_opt"}


def _slots(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return Adam's averages by the number of the parameter and their name; zeros before the first step."""
    averages: Tensors = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        slots = optimizer.state.get(parameter, {})
        for name in _SLOTS:
            empty = torch.zeros(1) if name == "step" else torch.zeros_like(parameter)
            averages[f"{i}/{name}"] = torch.as_tensor(slots.get(name, empty)).detach().cpu().float()
            if name == "step":
                averages[f"{i}/{name}"] = averages[f"{i}/{name}"].reshape(1)
    return averages


def _fill_slots(optimizer: torch.optim.Optimizer, prefix: str, tensors: Tensors) -> None:
    for i, parameter in enumerate(_parameters(optimizer)):
        received = {name: tensors[f"{prefix}/{i}/{name}"] for name in _SLOTS}
        slots = {name: torch.empty_like(parameter).copy_(received[name]) for name in _SLOTS if name != "step"}
        step = received["step"].reshape(()).to(parameter.device if _fused(optimizer) else "cpu")
        optimizer.state[parameter] = slots | {"step": step.clone()}


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


TASK = FederatedTask(
    begin=begin,
    shapes=shapes,
    is_averaged=is_averaged,
    is_optimised=is_optimised,
    describe=describe,
    train=train,
    evaluate=evaluate,
)
