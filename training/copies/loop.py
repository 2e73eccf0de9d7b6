"""Training of the network of a copy detector.

Every training image is a class with a proxy, a unit vector. The network learns to give every view of an image, and every half
of a view, a descriptor near the proxy of the image: the loss is the cross entropy of the scaled cosine similarities with all
proxies (Movshovitz-Attias et al., arXiv 1703.07464). A view that is joined from two images is to be near both proxies. The last
linear map starts as the whitening of the pooled features of ImageNet, and a proxy as the descriptor of its image, so that
training starts from a usable detector.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from dermis.authenticity.copy_network import REGIONS, CopyNetwork
from dermis.devices import to_float64
from dermis.errors import TrainingError
from dermis.features import bicubic, channels_last
from dermis.imaging import Images
from training.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    locked,
    opened_log,
    read_state_of_kind,
    save_checkpoint,
)
from training.copies.config import CopiesConfig
from training.copies.views import Views, view_of, views_of
from training.interrupt import stop_requested
from training.loggers import open_loggers

KIND = "copy detector"  # value of the field `kind` in checkpoints
_SAVE_SECONDS = 120.0
_CHUNK = 128
_PROXY_RATE = 10.0  # learning rate of the proxies in units of that of the network
_LEAST_DEVIATION = 1e-3  # added to standard deviations before the whitening divides by them
_MAX_GRADIENT_NORM = 5.0


@dataclass
class CopiesProgress:
    """Progress of a run. A checkpoint stores it with the tensors."""

    step: int = 0
    seconds: float = 0.0
    stopped: bool = False
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(first step, number of steps) of each schedule of the learning rate that was used."""


class Proxies(nn.Module):
    """One vector [dim] for each training image. `vectors` is float [N, dim], not scaled to length 1."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.clone())


def train(
    images: Images,
    config: CopiesConfig,
    out: Path,
    *,
    identity: str,
    device: torch.device,
    resume: bool = False,
    loggers: Sequence[str] = (),
    progress_bar: bool = True,
) -> tuple[CopyNetwork, CopiesProgress]:
    """Train a network.

    SIGINT and SIGTERM finish the step, save and return. A run that is stopped and resumed computes the same as an
    uninterrupted one, bit for bit on the CPU. A run that is resumed with another number of steps goes on with the learning rate
    that this number gives.

    Args:
        images: Training images uint8 [N, R, R, 3].
        config: Hyper-parameters.
        out: Folder of the run. It gets checkpoint.safetensors and log.jsonl.
        identity: Digest of the images. A run is resumed only with the same ones.
        device: Device of the network.
        resume: Continue the run that is in `out`.
        loggers: Where curves go besides log.jsonl (`training.loggers`).
        progress_bar: Show a progress bar.

    Raises:
        TrainingError: The loss is not finite, or the checkpoint has other images or options.
    """
    checkpoint = checkpoint_path(out, resume=resume)
    with locked(out):  # also while the checkpoint is read, and for the last save
        torch.manual_seed(config.seed)
        resuming = checkpoint.exists()
        network = channels_last(CopyNetwork(config.dim, pretrained=config.pretrained and not resuming).to(device))
        vectors = torch.zeros(len(images), config.dim, device=device)
        if not resuming:
            vectors = initialise(network, images, config, device)
        proxies = Proxies(vectors).to(device)
        optimizer = torch.optim.AdamW(
            [{"params": list(network.parameters())}, {"params": list(proxies.parameters())}],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
        )
        progress = CopiesProgress()
        modules = {"network": network, "proxies": proxies}
        scalars = {"kind": KIND, "config": config.identity, "identity": identity}
        if resuming:
            state = read_state_of_kind(checkpoint, KIND, config.identity)
            if state["identity"] != identity:
                raise TrainingError(f"{checkpoint}: was trained on other images; choose another --out")
            load_checkpoint(checkpoint, modules, {"optimizer": optimizer}, {})
            vars(progress).update(state["progress"])
            progress.stopped = False
        if not progress.lengths or progress.lengths[-1][1] != config.steps:
            progress.lengths.append((progress.step, config.steps))

        def save() -> None:
            save_checkpoint(checkpoint, modules, {"optimizer": optimizer}, {}, {**scalars, "progress": vars(progress)})

        saved = clock = time.monotonic()
        with (
            stop_requested(ignore_repeated=False) as stop,
            opened_log(out / "log.jsonl", progress.step) as log,
            open_loggers(loggers, out, progress.step, asdict(config)) as logged,
            tqdm(
                total=config.steps,
                initial=progress.step,
                desc=KIND,
                unit="step",
                disable=None if progress_bar else True,
            ) as bar,
        ):
            network.train()
            while progress.step < config.steps and not stop.is_set():
                rate = learning_rate(config, progress.step)
                for group, factor in zip(optimizer.param_groups, (1.0, _PROXY_RATE), strict=True):
                    group["lr"] = rate * factor
                rng = np.random.default_rng([config.seed, progress.step])
                views = views_of(images, numbers_of(len(images), config, progress.step), rng)
                whole, halves = losses(network, proxies, views, config, device)
                loss = whole + 0.5 * halves
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT_NORM)
                optimizer.step()
                if not math.isfinite(loss.item()):
                    raise TrainingError(f"the loss is not finite at step {progress.step}; use a lower --learning-rate")
                progress.step += 1
                bar.update()
                if progress.step % 10 == 0:
                    row = {"step": progress.step, "whole": round(whole.item(), 5), "halves": round(halves.item(), 5)}
                    log.write(json.dumps(row) + "\n")
                    curves = {"loss/whole": row["whole"], "loss/halves": row["halves"], "learning_rate": rate}
                    logged.scalars(curves, progress.step)
                now = time.monotonic()
                if now - saved > _SAVE_SECONDS:
                    progress.seconds, clock, saved = progress.seconds + now - clock, now, now
                    log.flush()
                    save()
        progress.seconds += time.monotonic() - clock
        progress.stopped = progress.step < config.steps
        save()
    return network.eval(), progress


def learning_rate(config: CopiesConfig, step: int) -> float:
    """Return the learning rate of a step: it rises linearly in the warm-up and falls along a cosine."""
    rise = min(1.0, (step + 1) / config.warm_up)
    return config.learning_rate * rise * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))


def losses(
    network: CopyNetwork, proxies: Proxies, views: Views, config: CopiesConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropies of whole views and of their halves."""
    descriptors = network(prepared(views.pixels, config.size, device)).view(len(views.pixels), len(REGIONS), -1)
    similarities = config.scale * descriptors @ F.normalize(proxies.vectors, dim=1).T
    logarithms = F.log_softmax(similarities, dim=-1)
    targets = torch.from_numpy(views.targets).to(device)
    entropies = -logarithms.gather(2, targets[..., None])[..., 0]
    second = torch.from_numpy(views.second).to(device)
    other = -logarithms[:, 0].gather(1, second.clamp(min=0)[:, None])[:, 0]
    whole = torch.where(second >= 0, (entropies[:, 0] + other) / 2, entropies[:, 0])
    weights = torch.from_numpy(views.weights).to(device)[:, 1:]
    return whole.mean(), (entropies[:, 1:] * weights).sum() / weights.sum()


def prepared(pixels: Images, size: int, device: torch.device) -> Tensor:
    """Make the network's input [N, 3, S, S] in [-1, 1] of images uint8 [N, R, R, 3]."""
    x = torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float()
    x = bicubic(x, (size, size)).clamp(0, 255) / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def numbers_of(count: int, config: CopiesConfig, step: int) -> NDArray[np.int64]:
    """Return the numbers [batch] of the training images of a step. Every epoch has its own random order."""
    first = step * config.batch
    places = np.arange(first, first + config.batch)
    orders = {
        epoch: np.random.default_rng([config.seed, 1, epoch]).permutation(count)
        for epoch in set((places // count).tolist())
    }
    return np.array([orders[place // count][place % count] for place in places.tolist()])


@torch.no_grad()
def initialise(network: CopyNetwork, images: Images, config: CopiesConfig, device: torch.device) -> Tensor:
    """Whiten the pooled features of random views by the last linear map; return the descriptors of all images."""
    rng = np.random.default_rng([config.seed, 2])
    chunks = range(0, len(images), _CHUNK)
    views = ([view_of(image, rng) for image in images[start : start + _CHUNK]] for start in chunks)
    pooled = torch.cat([network.pooled(prepared(np.stack(part), config.size, device))[:, 0] for part in views])
    pooled = to_float64(pooled)  # so that the rounding of the decomposition does not show in the weights
    mean = pooled.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(pooled.T))
    kept = min(config.dim, len(values))
    deviations = values.clamp(min=0).sqrt().flip(0)[:kept, None]
    matrix = vectors.T.flip(0)[:kept] / (deviations + _LEAST_DEVIATION)
    network.projection.weight[:kept] = matrix.float()
    network.projection.bias[:kept] = (-matrix @ mean).float()
    parts = [network(prepared(images[start : start + _CHUNK], config.size, device)) for start in chunks]
    return torch.cat(parts)[:, : config.dim].contiguous()
