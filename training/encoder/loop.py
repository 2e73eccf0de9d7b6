"""The training loop of an encoder, which learns from generated images and, optionally, from real ones.

The first steps regress the latents of generated images, which are known. After them every image, real or generated, is
encoded and reconstructed with the generator. The loss is then the perceptual distance and the pixel error between image and
reconstruction, a weak prior that keeps the latents of real images near the mean, and the regression for generated images.
(After Richardson et al., "Encoding in Style", arXiv 2008.00951, with a small encoder that only has to start an optimisation.)
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
from training.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    locked,
    opened_log,
    read_state_of_kind,
    save_checkpoint,
)
from training.encoder.config import EncoderConfig
from training.interrupt import stop_requested
from training.loggers import open_loggers

KIND = "encoder"  # value of the field `kind` in checkpoints
_BASIS_SAMPLES = 10_000
_SAVE_SECONDS = 120.0
_STREAM = 7  # makes seeds that differ from those of datasets, so that no dataset has the same latents


@dataclass
class EncoderProgress:
    """Progress of a run. A checkpoint stores it with the tensors."""

    step: int = 0
    seconds: float = 0.0
    stopped: bool = False


def new_network(generator: Generator, config: EncoderConfig) -> EncoderNetwork:
    """Make an untrained encoder, whose output is the mean latent, with the basis of this generator."""
    device = generator.mapping.w_avg.device
    components = min(config.components, generator.config.w_dim)
    w = torch.from_numpy(latents(generator, range(_BASIS_SAMPLES), config.seed)).double()
    mean = w.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(w.T))
    basis = (vectors[:, -components:] * values[-components:].clamp(min=1e-12).sqrt()).T.flip(0)
    torch.manual_seed(config.seed)
    network = EncoderNetwork(config.backbone, config.size, generator.num_ws, basis.float(), mean.float())
    return network.to(device)


def _curves(losses: Mapping[str, float], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    return {
        **{f"loss/{name}": value for name, value in losses.items()},
        "learning_rate": optimizer.param_groups[0]["lr"],
    }


def train(
    generator: Generator,
    network: EncoderNetwork,
    real: NDArray[np.uint8] | None,
    config: EncoderConfig,
    out: Path,
    *,
    identity: str,
    resume: bool = False,
    loggers: Sequence[str] = (),
    progress_bar: bool = True,
) -> EncoderProgress:
    """Train `network` in place until `steps`.

    SIGINT and SIGTERM finish the step, save and return. A run that is stopped and resumed computes the same as an
    uninterrupted one, bit for bit on the CPU.

    Args:
        generator: The generator whose latents the encoder finds.
        network: The encoder.
        real: Real images uint8 [N, R, R, 3] at the generator's resolution, or None.
        config: Hyper-parameters.
        out: Folder of the run. It gets checkpoint.safetensors and log.jsonl.
        identity: Digest of generator and images. A run is resumed only with the same one.
        resume: Continue the run that is in `out`.
        loggers: Where curves go besides log.jsonl (`training.loggers`).
        progress_bar: Show a progress bar.

    Raises:
        TrainingError: The loss is not finite, or the checkpoint has another generator, other images or options.
    """
    device = generator.mapping.w_avg.device
    dtype = None if fast_dtype(device) == torch.float32 else fast_dtype(device)
    distance = perceptual(config.distance, device, dtype)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=1e-4)
    progress = EncoderProgress()
    checkpoint = checkpoint_path(out, resume=resume)
    with locked(out):  # also while the checkpoint is read, and for the last save
        if checkpoint.exists():
            _load(checkpoint, network, optimizer, progress, config, identity)
        saved = clock = time.monotonic()
        with (
            stop_requested(ignore_repeated=False) as stop,
            opened_log(out / "log.jsonl", progress.step) as log,
            open_loggers(loggers, out, progress.step, asdict(config)) as logged,
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
                    values = {name: round(term.item(), 5) for name, term in terms.items()}
                    log.write(json.dumps({"step": progress.step, **values}) + "\n")
                    logged.scalars(_curves(values, optimizer), progress.step)
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
    """The learning rate of a step: it rises linearly in 100 steps and falls along a cosine."""
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
    """The terms of the loss of a step. Everything random in them follows from seed and step."""
    device = generator.mapping.w_avg.device
    rng = np.random.default_rng([config.seed, step])
    reconstructing = step >= config.warm_up
    generated = config.batch - (round(config.batch * config.real_share) if reconstructing and real is not None else 0)
    images, target = [], torch.empty(0, network.num_ws, len(network.basis), device=device)
    if generated:
        ws = _mixed_latents(generator, config, step, generated, rng)
        with torch.no_grad():
            images.append(synthesize(generator, ws, dtype).clamp(0, 255))
        norms = network.basis.square().sum(dim=1)
        target = (ws - network.mean) @ network.basis.T / norms
    if real is not None and generated < config.batch:
        chosen = real[np.sort(rng.choice(len(real), config.batch - generated, replace=len(real) < config.batch))]
        images.append(torch.tensor(_rotated_and_flipped(chosen, rng), device=device).permute(0, 3, 1, 2).float())
    batch = torch.cat(images)
    coordinates = network.coordinates(batch)
    terms = {}
    if generated:
        weight = 1.0 if not reconstructing else 0.1
        terms["latent"] = weight * (coordinates[:generated] - target).square().mean()
    if reconstructing:
        reconstruction = synthesize(generator, network.latents(coordinates), dtype)
        terms["perceptual"] = (distance.embed(reconstruction) - distance.embed(batch)).square().sum(dim=1).mean()
        terms["pixels"] = config.pixels * ((reconstruction - batch) / 127.5).square().mean()
        terms["prior"] = (
            config.prior * coordinates[generated:].square().mean() if generated < len(batch) else coordinates.sum() * 0
        )
    return terms


def synthesize(generator: Generator, ws: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Images float [N, 3, R, R] in about 0..255, not clamped, of ws [N, num_ws, w_dim], with constant noise."""
    image: Tensor = generator.synthesis(ws, noise_mode="const", dtype=dtype)
    return (image + 1) * 127.5


def _mixed_latents(
    generator: Generator, config: EncoderConfig, step: int, count: int, rng: np.random.Generator
) -> Tensor:
    """ws [count, num_ws, w_dim], of which about half change to a second w at a random layer, for training with W+."""
    first = step * config.batch
    w, other = (latents(generator, range(first, first + count), config.seed, stream=stream) for stream in (1, 2))
    ws = np.repeat(w[:, None], generator.num_ws, axis=1)
    for row, layer in enumerate(rng.integers(1, 2 * generator.num_ws, count)):
        ws[row, layer:] = other[row]
    return torch.from_numpy(ws).to(generator.mapping.w_avg.device)


def latents(generator: Generator, indices: Sequence[int], seed: int, *, stream: int = 0) -> NDArray[np.float32]:
    """w [N, w_dim] of these indices in one of the seed's independent streams. The class of index i is i modulo c_dim."""
    device = generator.mapping.w_avg.device
    classes = generator.config.c_dim
    parts = []
    for start in range(0, len(indices), 1000):
        chunk = indices[start : start + 1000]
        z = torch.from_numpy(z_for(seed * 8 + _STREAM + stream, chunk, generator.config.z_dim)).to(device)
        c = one_hot([index % classes for index in chunk], classes, device) if classes else None
        with torch.no_grad():
            parts.append(generator.mapping(z, c)[:, 0].cpu().numpy())
    return np.concatenate(parts)


def _rotated_and_flipped(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Rotate by quarter turns and flip at random, since a lesion has no upright position."""
    result = images.copy()
    for row, (turns, flip) in enumerate(
        zip(rng.integers(0, 4, len(images)), rng.integers(0, 2, len(images)), strict=True)
    ):
        image = np.rot90(result[row], turns)
        result[row] = image[:, ::-1] if flip else image
    return result


def _save(
    path: Path,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    progress: EncoderProgress,
    config: EncoderConfig,
    identity: str,
) -> None:
    scalars = {"kind": KIND, "config": config.identity, "identity": identity, "progress": vars(progress)}
    save_checkpoint(path, {"network": network}, {"optimizer": optimizer}, {}, scalars)


def _load(
    path: Path,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    progress: EncoderProgress,
    config: EncoderConfig,
    identity: str,
) -> None:
    scalars = read_state_of_kind(path, KIND, config.identity)
    if scalars["identity"] != identity:
        raise TrainingError(f"{path}: was trained for another generator or on other images; choose another --out")
    load_checkpoint(path, {"network": network}, {"optimizer": optimizer}, {})
    vars(progress).update(scalars["progress"])
    progress.stopped = False
