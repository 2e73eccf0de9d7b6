"""The training loop: one function from a dataset and a configuration to a run folder.

Everything random in a step follows from (seed, step), so a run that is stopped and resumed computes what an
uninterrupted one would have computed, bit for bit on the CPU.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dermis.errors import TrainingError
from dermis.networks import Discriminator, Generator, one_hot
from training.data.isic import ImageDataset
from training.gan.augment import AUGMENTATIONS, AdaptiveP
from training.gan.checkpoint import load_checkpoint, read_state, save_checkpoint
from training.gan.config import STRUCTURE, GanConfig
from training.gan.loss import HINGE, LOGISTIC, Phases
from training.gan.projected import LEARNING_RATE as PROJECTED_RATE
from training.gan.projected import ProjectedDiscriminator

DTYPES: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Progress:
    """Where a run stands; what a checkpoint stores besides tensors."""

    step: int = 0
    nimg: int = 0
    seconds: float = 0.0
    stopped: bool = False  # by the user, before total_kimg
    stats: dict[str, float] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)  # of options on the way: {"kimg", "before", "after"}


def train(
    dataset: ImageDataset,
    config: GanConfig,
    out: Path,
    *,
    device: torch.device,
    resume: bool = False,
    allow_changes: bool = False,
    compile_networks: bool = False,
    snapshot_kimg: float = 20.0,
    on_snapshot: Callable[[Path, Generator, Progress], None] | None = None,
    progress_bar: bool = True,
) -> tuple[Generator, Progress]:
    """Train until config.total_kimg; returns the averaged generator (G_ema) and where the run stands.

    Writes into `out`: checkpoint.safetensors, log.jsonl, config.json, and calls on_snapshot(out, G_ema, progress) at
    the start, every snapshot_kimg and at the end. SIGINT and SIGTERM finish the step, save and return. Raises
    TrainingError if the loss is no longer finite (the last checkpoint is kept) or the checkpoint does not fit: a run is
    resumed with the options that it began with, unless `allow_changes`, which notes what changed in Progress.changes.
    """
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists() and not resume:
        raise TrainingError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)
    G = Generator(config.generator).to(device)
    D: Discriminator | ProjectedDiscriminator
    if config.projected:
        D = ProjectedDiscriminator(config.c_dim, config.seed, device)
    else:
        D = Discriminator(config.discriminator).to(device)
    G_ema = copy.deepcopy(G).eval().requires_grad_(False)
    D_rate = PROJECTED_RATE if config.projected else config.learning_rate
    optimizers = {
        "G_opt": _adam(G, config.learning_rate, config.pl_interval if config.pl_weight else None),
        "D_opt": _adam(D, D_rate, config.r1_interval if config.r1_gamma else None),
    }
    pl_mean = torch.zeros((), device=device)
    adaptive = _adaptive(config)
    progress = Progress()
    modules = {"G": G, "D": D, "G_ema": G_ema}
    if checkpoint.exists():
        state = read_state(checkpoint)
        changes = _changes(checkpoint, state, config, dataset, allow_changes)
        load_checkpoint(checkpoint, modules, optimizers, {"pl_mean": pl_mean})
        progress = Progress(**state["progress"])
        progress.stopped = False
        if changes:
            before = {name: state["config"].get(name) for name in changes}
            progress.changes.append({"kimg": progress.nimg / 1000, "before": before, "after": changes})
        if adaptive.target is not None or not changes:
            adaptive = replace(AdaptiveP(**state["adaptive"]), target=adaptive.target, kimg=adaptive.kimg)
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")

    phases = Phases(
        G,
        D,
        DTYPES[config.precision],
        AUGMENTATIONS[config.augment],
        config.style_mixing_prob,
        config.r1_gamma,
        config.pl_weight,
        config.pl_batch_shrink,
        config.pl_decay,
        pl_mean,
        synthesis=torch.compile(G.synthesis) if compile_networks else G.synthesis,
        discriminate=torch.compile(D) if compile_networks else D,
        adversarial=HINGE if config.projected else LOGISTIC,
    )

    def save() -> None:
        state = {
            "config": config.identity,
            "dataset_sha256": dataset.sha256,
            "adaptive": vars(adaptive),
            "progress": vars(progress),
        }
        save_checkpoint(checkpoint, modules, optimizers, {"pl_mean": pl_mean}, state)
        if on_snapshot is not None:
            on_snapshot(out, G_ema, progress)

    total = int(config.total_kimg * 1000)
    next_snapshot = progress.nimg + snapshot_kimg * 1000
    if progress.nimg == 0 and on_snapshot is not None:
        on_snapshot(out, G_ema, progress)
    clock = time.monotonic()
    bar = tqdm(total=total, initial=progress.nimg, unit="img", unit_scale=True, disable=not progress_bar, smoothing=0.1)
    with bar, _stop_requested() as stop, (out / "log.jsonl").open("a", encoding="utf-8") as log:
        while progress.nimg < total:
            stats = _step(phases, optimizers, adaptive, dataset, config, progress, device)
            _update_ema(G_ema, G, config, progress.nimg)
            progress.step += 1
            progress.nimg += config.batch
            now = time.monotonic()
            progress.seconds, clock = progress.seconds + now - clock, now
            if not all(math.isfinite(value) for value in stats.values()):
                raise TrainingError(
                    f"loss is no longer finite at {progress.nimg / 1000:.1f} kimg ({stats}); the last good state is in "
                    f"{checkpoint}: resume with a smaller learning rate or a larger r1_gamma"
                )
            progress.stats |= stats
            log.write(json.dumps({"nimg": progress.nimg, "seconds": round(progress.seconds, 2), **stats}) + "\n")
            bar.update(config.batch)
            bar.set_postfix(p=f"{adaptive.p:.3f}", G=f"{stats['G']:.2f}", D=f"{stats['D']:.2f}", refresh=False)
            if stop.is_set():
                progress.stopped = True
                break
            if progress.nimg >= next_snapshot and progress.nimg < total:
                log.flush()
                save()
                next_snapshot += snapshot_kimg * 1000
        save()
    return G_ema, progress


def _adam(module: torch.nn.Module, learning_rate: float, interval: int | None) -> torch.optim.Adam:
    """Adam with beta (0, 0.99), corrected for lazy regularisation every `interval` steps (StyleGAN2, appendix B)."""
    ratio = 1.0 if interval is None else interval / (interval + 1)
    return torch.optim.Adam(module.parameters(), lr=learning_rate * ratio, betas=(0.0, 0.99**ratio), eps=1e-8)


def _adaptive(config: GanConfig) -> AdaptiveP:
    if config.augment == "none":
        return AdaptiveP(0.0, None)
    return AdaptiveP(config.augment_p, config.augment_target, kimg=config.augment_kimg)


def _changes(
    checkpoint: Path, state: dict[str, Any], config: GanConfig, dataset: ImageDataset, allow: bool
) -> dict[str, Any]:
    """The options whose value is another than the checkpoint's. TrainingError if they must not be."""
    if state["dataset_sha256"] != dataset.sha256:
        raise TrainingError(f"{checkpoint}: was trained on other images than the folder given with --data")
    changed = {name: value for name, value in config.identity.items() if state["config"].get(name) != value}
    structural = changed.keys() & STRUCTURE
    if structural or (changed and not allow):
        names = ", ".join(sorted(structural or changed))
        hint = "" if structural else ", or add --allow-changes to go on with the new ones"
        raise TrainingError(f"{checkpoint}: was trained with another {names}; use the same options{hint}")
    return changed


def _step(
    phases: Phases,
    optimizers: dict[str, torch.optim.Adam],
    adaptive: AdaptiveP,
    dataset: ImageDataset,
    config: GanConfig,
    progress: Progress,
    device: torch.device,
) -> dict[str, float]:
    """One step of every phase that is due. Returns the losses."""
    torch.manual_seed((config.seed << 32) + progress.step + 1)
    real, real_c = _real_batch(dataset, config, progress.nimg, device)
    n, p, stats = config.batch, adaptive.p, {}

    def latents() -> tuple[Tensor, Tensor]:
        drawn = torch.randint(len(dataset.labels), (n,)).numpy()  # labels follow the training set's proportions
        c = one_hot(dataset.labels[drawn], config.c_dim, device)
        return torch.randn(n, config.z_dim, device=device), c

    def apply(name: str, module: torch.nn.Module) -> None:
        for parameter in module.parameters():
            if parameter.grad is not None:
                torch.nan_to_num_(parameter.grad, nan=0.0, posinf=1e5, neginf=-1e5)
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)

    phases.D.requires_grad_(False)
    stats["G"] = phases.generator_main(*latents(), p)
    apply("G_opt", phases.G)
    if config.pl_weight and progress.step % config.pl_interval == 0:
        stats["path_length_penalty"] = phases.generator_path_length(*latents(), config.pl_interval)
        apply("G_opt", phases.G)
    phases.D.requires_grad_(True)
    phases.G.requires_grad_(False)
    stats["D"], real_logits = phases.discriminator_main(real, real_c, *latents(), p)
    apply("D_opt", phases.D)
    if config.r1_gamma and progress.step % config.r1_interval == 0:
        stats["r1"] = phases.discriminator_r1(real, real_c, p, config.r1_interval)
        apply("D_opt", phases.D)
    phases.G.requires_grad_(True)

    adaptive.observe(real_logits)
    r_t = adaptive.update(progress.step + 1, n)
    if r_t is not None:
        stats |= {"r_t": r_t, "p": adaptive.p}
    return stats


def _real_batch(dataset: ImageDataset, config: GanConfig, nimg: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The batch at position nimg of an endless sequence of reshuffled epochs, mirrored at random if so configured."""
    count = len(dataset.labels)
    positions = np.arange(nimg, nimg + config.batch)
    chosen = np.array([_epoch_order(count, config.seed, int(i) // count)[int(i) % count] for i in positions])
    images = torch.from_numpy(np.ascontiguousarray(dataset.images[chosen]))
    x = images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    if config.mirror:
        flip = torch.rand(config.batch, 1, 1, 1).to(device) < 0.5
        x = torch.where(flip, x.flip(3), x)
    return x, one_hot(dataset.labels[chosen], config.c_dim, device)


_orders: dict[tuple[int, int, int], NDArray[np.int64]] = {}


def _epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    key = (count, seed, epoch)
    if key not in _orders:
        if len(_orders) > 4:
            _orders.clear()
        _orders[key] = np.random.default_rng([seed, epoch]).permutation(count)
    return _orders[key]


@torch.no_grad()
def _update_ema(G_ema: Generator, G: Generator, config: GanConfig, nimg: int) -> None:
    """Average of the weights with a half-life of ema_kimg, shorter early on (ema_rampup times the images seen)."""
    half_life = config.ema_kimg * 1000
    if config.ema_rampup is not None:
        half_life = min(half_life, nimg * config.ema_rampup)
    beta = 0.5 ** (config.batch / max(half_life, 1e-8))
    for averaged, parameter in zip(G_ema.parameters(), G.parameters(), strict=True):
        averaged.copy_(parameter.lerp(averaged, beta))
    for copied, buffer in zip(G_ema.buffers(), G.buffers(), strict=True):
        copied.copy_(buffer)


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal does what it always does."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        event.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, request)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
