"""The loop: generated images teach the encoder their latents, real ones what comes of its latents.

First a regression on generated images, whose latents are known. Then every image, real or generated, is encoded and drawn
again, and the loss is what is lost on the way (perceptual distance and pixels), with a weak pull of real images' latents
towards the mean and, for generated ones, the regression. (In the manner of Richardson et al., "Encoding in Style", arXiv
2008.00951, with an encoder small enough to start an optimisation and no more.)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dermis.devices import fast_dtype
from dermis.errors import TrainingError
from dermis.latents import z_for
from dermis.networks import Generator, one_hot
from dermis.projection.encoder import EncoderNetwork
from dermis.projection.perceptual import Perceptual, perceptual
from training.encoder.config import EncoderConfig
from training.gan.checkpoint import load_checkpoint, read_state, save_checkpoint
from training.interrupt import stop_requested

CHECKPOINT = "checkpoint.safetensors"
_BASIS_SAMPLES = 10_000
_SAVE_SECONDS = 120.0
_STREAM = 7  # of the seed: latents that no dataset draws, as datasets count from index 0 of their seeds


@dataclass
class Progress:
    """Where a run stands; what a checkpoint stores besides tensors."""

    step: int = 0
    seconds: float = 0.0
    stopped: bool = False


def new_network(generator: Generator, config: EncoderConfig) -> EncoderNetwork:
    """An encoder that gives the mean latent, with the basis of this generator."""
    device = generator.mapping.w_avg.device
    components = min(config.components, generator.config.w_dim)
    w = torch.from_numpy(latents(generator, range(_BASIS_SAMPLES), config.seed)).double()
    mean = w.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(w.T))
    basis = (vectors[:, -components:] * values[-components:].clamp(min=1e-12).sqrt()).T.flip(0)
    torch.manual_seed(config.seed)
    network = EncoderNetwork(config.backbone, config.size, generator.num_ws, basis.float(), mean.float())
    return network.to(device)


def train(
    generator: Generator,
    network: EncoderNetwork,
    real: NDArray[np.uint8] | None,
    config: EncoderConfig,
    out: Path,
    *,
    identity: str,
    resume: bool = False,
    progress_bar: bool = True,
) -> Progress:
    """Train `network` in place until `steps`. real: uint8 [N, R, R, 3] at the generator's resolution, or None.

    Writes checkpoint.safetensors and log.jsonl into `out`. `identity` names generator and images, for a resumed run.
    SIGINT and SIGTERM finish the step, save and return. A run that is stopped and resumed computes what an uninterrupted
    one would have, bit for bit on the CPU. TrainingError if the loss is not finite or the checkpoint does not fit.
    """
    device = generator.mapping.w_avg.device
    dtype = None if fast_dtype(device) == torch.float32 else fast_dtype(device)
    distance = perceptual(config.distance, device, dtype)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    progress = Progress()
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise TrainingError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        _load(checkpoint, network, optimizer, progress, config, identity)
    mode = "a" if progress.step else "w"
    saved = clock = time.monotonic()
    with (
        stop_requested(insist=False) as stop,
        (out / "log.jsonl").open(mode, encoding="utf-8") as log,
        tqdm(
            total=config.steps,
            initial=progress.step,
            desc="encoder",
            unit="step",
            disable=None if progress_bar else True,
        ) as bar,
    ):
        network.train()
        while progress.step < config.steps and not stop.is_set():
            for group in optimizer.param_groups:
                group["lr"] = _rate(config, progress.step)
            terms = _losses(generator, network, real, config, progress.step, distance, dtype)
            loss = torch.stack(list(terms.values())).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            if not math.isfinite(loss.item()):
                raise TrainingError(f"the loss is not finite at step {progress.step}; use a lower --learning-rate")
            progress.step += 1
            bar.update()
            if progress.step % 10 == 0:
                log.write(
                    json.dumps({"step": progress.step, **{k: round(v.item(), 5) for k, v in terms.items()}}) + "\n"
                )
            now = time.monotonic()
            if now - saved > _SAVE_SECONDS:
                progress.seconds, clock, saved = progress.seconds + now - clock, now, now
                log.flush()
                _save(checkpoint, network, optimizer, progress, config, identity)
    progress.seconds += time.monotonic() - clock
    progress.stopped = progress.step < config.steps
    _save(checkpoint, network, optimizer, progress, config, identity)
    network.eval()
    return progress


def _rate(config: EncoderConfig, step: int) -> float:
    """Up in 100 steps, then down along a cosine."""
    return config.learning_rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))


def _losses(
    generator: Generator,
    network: EncoderNetwork,
    real: NDArray[np.uint8] | None,
    config: EncoderConfig,
    step: int,
    distance: Perceptual,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The terms of the loss of a step, which depend on step and seed alone."""
    device = generator.mapping.w_avg.device
    rng = np.random.default_rng([config.seed, step])
    drawing = step >= config.warm_up
    ours = config.batch - (round(config.batch * config.real_share) if drawing and real is not None else 0)
    images, wanted = [], torch.empty(0, network.num_ws, len(network.basis), device=device)
    if ours:
        ws = _mixed_latents(generator, config, step, ours, rng)
        with torch.no_grad():
            images.append(draw(generator, ws, dtype).clamp(0, 255))
        norms = network.basis.square().sum(dim=1)
        wanted = (ws - network.mean) @ network.basis.T / norms
    if real is not None and ours < config.batch:
        chosen = _turned(
            real[np.sort(rng.choice(len(real), config.batch - ours, replace=len(real) < config.batch))], rng
        )
        images.append(torch.tensor(chosen, device=device).permute(0, 3, 1, 2).float())
    batch = torch.cat(images)
    coordinates = network.coordinates(batch)
    terms = {}
    if ours:
        weight = 1.0 if not drawing else 0.1
        terms["latent"] = weight * (coordinates[:ours] - wanted).square().mean()
    if drawing:
        again = draw(generator, network.latents(coordinates), dtype)
        terms["perceptual"] = (distance.embed(again) - distance.embed(batch)).square().sum(dim=1).mean()
        terms["pixels"] = config.pixels * ((again - batch) / 127.5).square().mean()
        terms["prior"] = (
            config.prior * coordinates[ours:].square().mean() if ours < len(batch) else coordinates.sum() * 0
        )
    return terms


def draw(generator: Generator, ws: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Images float [N, 3, R, R] in 0..255, not clamped."""
    image: Tensor = generator.synthesis(ws, noise_mode="const", dtype=dtype)
    return (image + 1) * 127.5


def _mixed_latents(
    generator: Generator, config: EncoderConfig, step: int, count: int, rng: np.random.Generator
) -> Tensor:
    """ws [count, num_ws, w_dim]: half of them of two latents, the second from a random layer on, so that W+ is seen too."""
    first = step * config.batch
    w, other = (latents(generator, range(first, first + count), config.seed, stream=stream) for stream in (1, 2))
    ws = np.repeat(w[:, None], generator.num_ws, axis=1)
    for row, place in enumerate(rng.integers(1, 2 * generator.num_ws, count)):
        ws[row, place:] = other[row]
    return torch.from_numpy(ws).to(generator.mapping.w_avg.device)


def latents(generator: Generator, indices: Sequence[int], seed: int, *, stream: int = 0) -> NDArray[np.float32]:
    """w [N, w_dim] of samples of a stream of the seed, the classes taking turns."""
    device = generator.mapping.w_avg.device
    classes = generator.config.c_dim
    found = []
    for start in range(0, len(indices), 1000):
        part = indices[start : start + 1000]
        z = torch.from_numpy(z_for(seed * 8 + _STREAM + stream, part, generator.config.z_dim)).to(device)
        c = one_hot([index % classes for index in part], classes, device) if classes else None
        with torch.no_grad():
            found.append(generator.mapping(z, c)[:, 0].cpu().numpy())
    return np.concatenate(found)


def _turned(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Flipped and turned by quarters: a lesion has no right side up."""
    found = images.copy()
    for row, (turns, flip) in enumerate(
        zip(rng.integers(0, 4, len(images)), rng.integers(0, 2, len(images)), strict=True)
    ):
        image = np.rot90(found[row], turns)
        found[row] = image[:, ::-1] if flip else image
    return found


def _save(
    path: Path,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: EncoderConfig,
    identity: str,
) -> None:
    scalars = {"kind": "encoder", "config": config.identity, "identity": identity, "progress": vars(progress)}
    save_checkpoint(path, {"network": network}, {"optimizer": optimizer}, {}, scalars)


def _load(
    path: Path,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    config: EncoderConfig,
    identity: str,
) -> None:
    scalars: dict[str, Any] = read_state(path)
    if scalars.get("kind") != "encoder":
        raise TrainingError(f"{path}: is no checkpoint of an encoder; choose another --out")
    changed = config.changed_from(scalars["config"])
    if changed:
        raise TrainingError(f"{path}: was trained with another {', '.join(changed)}; use the same or another --out")
    if scalars["identity"] != identity:
        raise TrainingError(f"{path}: was trained for another generator or on other images; choose another --out")
    load_checkpoint(path, {"network": network}, {"optimizer": optimizer}, {})
    vars(progress).update(scalars["progress"])
    progress.stopped = False
