"""Federated training of StyleGAN2-ADA, at the server's beginning and at a member.

What travels, by name: "G/...", "G_ema/..." and "D/..." (unless only the generator is shared), "pl_mean" and "p", the
strength of augmentation; with a shared optimizer also "G_opt/..." and "D_opt/...". All of it is averaged, running
averages such as `w_avg` and G_ema included: they are linear in what they average. What never changes, the constant noise
and the filters, goes out to the members, who must draw the same images, and does not come back.
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
from training.evaluation.features import labels_in_proportion, real_features
from training.federated.config import FederationConfig, gan_config
from training.federated.messages.serialization import RefusedError, Tensors
from training.federated.site import Site, SiteImages, site_images, site_seed, use_device
from training.federated.tasks import client_state
from training.federated.tasks.proximal import proximal_pull
from training.federated.tasks.task import Order, Update
from training.gan.batches import batches
from training.gan.health import Health
from training.gan.parallel import Ranks
from training.gan.snapshot import draw_samples
from training.gan.state import State, load_state, new_state, save_state
from training.gan.step import training_step
from training.gan.transfer import read_source, transfer

FEWEST = 10  # validation images below which a distance says nothing
_FIXED = ("noise_const", "resample_filter")
_RUNNING = ("G_ema/", "G_opt/", "D_opt/", "pl_mean", "p")
_BATCH = 32
_SLOTS = ("exp_avg", "exp_avg_sq", "step")


def averaged(name: str) -> bool:
    return not name.endswith(_FIXED)


def optimised(name: str) -> bool:
    """Weights of G and D: a server optimizer moves them, and leaves running averages to the mean."""
    return averaged(name) and not name.startswith(_RUNNING) and not name.endswith(("w_avg", "_u", "_v"))


def begin(federation: FederationConfig) -> Tensors:
    """Random weights of the federation's seed, or those of `start`."""
    device = torch.device("cpu")
    state = new_state(gan_config(federation, device), device)
    if federation.start:
        transfer(read_source(Path(federation.start)), state)
    return {name: value.clone() for name, value in travelling(state, federation).items()}


@lru_cache(maxsize=2)
def shapes(federation: FederationConfig) -> Tensors:
    """Tensors of the names and shapes that are exchanged; what is in them means nothing."""
    device = torch.device("cpu")
    return travelling(new_state(gan_config(federation, device), device), federation)


def travelling(state: State, federation: FederationConfig) -> Tensors:
    """What is exchanged, by name, as tensors on the CPU; a change of them changes nothing."""
    networks: dict[str, nn.Module] = {"G": state.G, "G_ema": state.G_ema}
    if federation.share == "both":
        networks["D"] = state.D
    found = {
        f"{network}/{name}": value.detach().cpu()
        for network, module in networks.items()
        for name, value in module.state_dict().items()
        if value.is_floating_point()
    }
    found["pl_mean"] = state.pl_mean.detach().cpu().reshape(1)
    found["p"] = torch.tensor([state.adaptive.p], dtype=torch.float64)
    if federation.optimizer == "shared":
        for name, optimizer in _optimizers(state, federation).items():
            found |= {f"{name}/{key}": value for key, value in _slots(optimizer).items()}
    return found


@torch.no_grad()
def take(state: State, federation: FederationConfig, tensors: Tensors) -> None:
    """Put what was received into the state; what it does not hold stays. RefusedError if it does not fit."""
    mine = travelling(state, federation)
    if mine.keys() != tensors.keys() or any(mine[name].shape != tensors[name].shape for name in mine):
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
    """Training images, those of each class, and validation images."""
    images = _images(federation, site)
    counts = np.bincount(images.train.labels, minlength=len(federation.class_names))
    per_class = {f"images-{name}": int(count) for name, count in zip(federation.class_names, counts, strict=True)}
    held = 0 if images.validation is None else len(images.validation.labels)
    return {"images": len(images.train.labels), "validation": held, **per_class}


def train(order: Order, site: Site) -> Update:
    """Some iterations from the global state, with this hospital's images and its own optimizers.

    Steps are numbered through all rounds, so that what is random in a round does not depend on which ones this member
    took part in. A lone member computes what `training.gan.loop.train` does, bit for bit on the CPU.
    """
    federation, device = order.federation, use_device(site)
    images = _images(federation, site)
    dataset, config = images.train, gan_config(federation, device)
    local = replace(config, seed=site_seed(site, config.seed, dataset.sha256))
    if len(dataset.labels) < config.batch:
        raise TrainingError(f"batch: {config.batch} is more than this hospital's {len(dataset.labels)} training images")
    state = new_state(config, device)
    previous = client_state.latest_before(site, order.run, order.round)
    if previous is not None:
        load_state(previous, state, local, dataset)
    take(state, federation, order.tensors)
    checkpoint = client_state.path_of(site, order.run, order.round)
    state.progress.step = (order.round - 1) * federation.iterations
    state.progress.nimg = state.progress.step * config.batch
    start, totals = time.monotonic(), dict[str, list[float]]()
    phases = state.phases(local, Ranks(device=device))
    health = Health(checkpoint)
    adjust = proximal_pull((state.G, state.D), order.proximal_mu)
    with closing(batches(dataset, local, state.progress.nimg, phases.ranks)) as real:
        for _ in range(federation.iterations):
            stats = training_step(state, phases, dataset, next(real), local, adjust)
            health.check(state.progress.kimg, stats)
            for name, value in stats.items():
                totals.setdefault(name, []).append(value)
    state.progress.seconds += time.monotonic() - start
    save_state(checkpoint, state, local, dataset)
    client_state.forget_old(site, order.run, order.round)
    found = {name: value for name, value in travelling(state, federation).items() if averaged(name)}
    means = {name: float(np.mean(values)) for name, values in totals.items() if not name.endswith("_gradient")}
    return Update(found, len(dataset.labels), means | {"seconds": time.monotonic() - start})


def evaluate(federation: FederationConfig, site: Site, tensors: Tensors) -> dict[str, float]:
    """Distances of the averaged generator's images to this hospital's validation images; empty if it has too few.

    Classes are mixed as among the validation images. No image leaves: what is returned are the numbers.
    """
    device = use_device(site)
    images = _images(federation, site)
    if images.validation is None or len(images.validation.labels) < FEWEST:
        return {}
    generator = Generator(gan_config(federation, device).generator).to(device).eval()
    with torch.no_grad():
        for name, value in generator.state_dict().items():
            value.copy_(tensors[f"G_ema/{name}"])
    return distances(generator, images.validation, federation, device, site)


def distances(
    generator: Generator, real: ImageDataset, federation: FederationConfig, device: torch.device, site: Site
) -> dict[str, float]:
    """FID and KID in the federation's feature space, of its number of generated images against `real`."""
    space = feature_extractor(federation.extractor, device)
    labels = labels_in_proportion(real.labels, federation.evaluate_images)
    generated = space.over(_draw(generator, labels, federation.seed, device))
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


def _draw(generator: Generator, labels: NDArray[np.int64], seed: int, device: torch.device) -> list[NDArray[np.uint8]]:
    parts = [range(start, min(start + _BATCH, len(labels))) for start in range(0, len(labels), _BATCH)]
    return [draw_samples(generator, seed, part, labels[part.start : part.stop], device) for part in parts]


def _optimizers(state: State, federation: FederationConfig) -> dict[str, torch.optim.Optimizer]:
    both = federation.share == "both"
    return {name: each for name, each in state.optimizers.items() if both or name == "G_opt"}


def _slots(optimizer: torch.optim.Optimizer) -> Tensors:
    """Adam's averages by parameter and name; zeros before the first step."""
    found: Tensors = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        slots = optimizer.state.get(parameter, {})
        for name in _SLOTS:
            empty = torch.zeros(1) if name == "step" else torch.zeros_like(parameter)
            found[f"{i}/{name}"] = torch.as_tensor(slots.get(name, empty)).detach().cpu().float()
            if name == "step":
                found[f"{i}/{name}"] = found[f"{i}/{name}"].reshape(1)
    return found


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
