"""The training loop: one function from a dataset and a configuration to a run folder.

A run that is stopped and resumed computes what an uninterrupted one would have computed, bit for bit on the CPU.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from dermis.errors import TrainingError
from dermis.networks import Generator as GeneratorNetwork
from training.checkpoint import checkpoint_path, locked
from training.data.images import ImageDataset
from training.distributed import Ranks
from training.gan.batches import Batch, batches
from training.gan.config import GanConfig
from training.gan.divergence import DivergenceCheck
from training.gan.private.sampling import PatientSampler, PrivateBatch
from training.gan.state import GanProgress, GanState, load_state, new_state, save_state
from training.gan.step import training_step
from training.gan.training_log import TrainingLog
from training.interrupt import stop_requested
from training.loggers import open_loggers

NOT_PUBLIC = (
    "--from: with --dp the first weights must not have been trained on private images, since epsilon does not cover them; if "
    "they were trained on public images only, add --dp-public-start"
)
Snapshot = Callable[[Path, GanState], bytes | None]
"""Called with the run folder and the state; it returns a grid of samples, uint8 [H, W, 3], if it has made one."""


def train(
    dataset: ImageDataset,
    config: GanConfig,
    out: Path,
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    resume: bool = False,
    allow_changes: bool = False,
    compile_networks: bool = False,
    snapshot_kimg: float = 20.0,
    begin: Callable[[GanState], None] | None = None,
    on_snapshot: Snapshot | None = None,
    loggers: Sequence[str] = (),
    progress_bar: bool = True,
) -> tuple[GeneratorNetwork, GanProgress]:
    """Train until config.total_kimg, or until SIGINT or SIGTERM: these finish the step, save and return.

    With differential privacy also until the next step would exceed config.dp_epsilon.

    Args:
        dataset: Training images.
        config: Hyper-parameters.
        out: Folder of the run. It gets checkpoint.safetensors, log.jsonl and config.json.
        device: Device of the networks.
        ranks: Several processes, of which only the first writes and calls `on_snapshot`. None: this process alone.
        resume: Continue the run that is in `out`.
        allow_changes: Resume with options other than those that the run was started with. GanProgress.changes lists them.
        compile_networks: Compile the networks with torch.compile.
        snapshot_kimg: Thousands of images between two checkpoints.
        begin: Fills the state of a new run, for instance with the weights of another.
        on_snapshot: Called with `out` and the state at the start, with every checkpoint and at the end.
        loggers: Where curves and grids go besides log.jsonl (`training.loggers`).
        progress_bar: Show a progress bar.

    Returns:
        The averaged generator (G_ema), and the progress of the run.

    Raises:
        TrainingError: Another training is running in `out`, the run diverges (the last checkpoint is kept), or the
            checkpoint has other images or options.
    """
    checkpoint = checkpoint_path(out, resume=resume)
    if config.precision == "fp16" and device.type != "cuda":
        raise TrainingError(f"precision: fp16 needs a CUDA device; use bf16 or fp32 on {device.type}")
    ranks = ranks or Ranks(device=device)
    config.check_processes(ranks.count)

    state = new_state(config, device)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
    with locked(out) if ranks.first else nullcontext():
        resumed = checkpoint.exists()
        if resumed:
            load_state(checkpoint, state, config, dataset, allow_changes)
        elif begin is not None:
            begin(state)
        if config.dp and state.progress.started_from and not config.dp_public_start:
            raise TrainingError(NOT_PUBLIC)
        sampler = None
        if config.dp:
            sampler = PatientSampler(dataset, config, out, state.progress.dp_steps if resumed else None)
            state.progress.dp_steps = sampler.ledger.steps
        if ranks.first:
            (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        phases = state.phases(config, ranks, compile_networks)
        divergence_check = DivergenceCheck(checkpoint)

        def snapshot() -> None:
            png = on_snapshot(out, state) if on_snapshot is not None else None
            if png is not None:
                logged.image("samples", png, state.progress.nimg)

        def save() -> None:
            if ranks.first:
                save_state(checkpoint, state, config, dataset)
                if sampler is not None:
                    sampler.ledger.settle()
                snapshot()

        progress, total = state.progress, int(config.total_kimg * 1000)
        next_snapshot = progress.nimg + snapshot_kimg * 1000
        quiet = not (progress_bar and ranks.first)
        with (
            tqdm(total=total, initial=progress.nimg, unit="img", unit_scale=True, disable=quiet, smoothing=0.1) as bar,
            open_loggers(loggers, out, progress.nimg, config.to_dict(), enabled=ranks.first) as logged,
            TrainingLog(out, progress.nimg, loggers=logged, enabled=ranks.first) as log,
            closing(_real_images(dataset, config, progress, ranks, sampler)) as real,
            stop_requested(ignore_repeated=ranks.count > 1) as stop,
        ):
            if progress.nimg == 0 and ranks.first:
                snapshot()
            clock = time.monotonic()
            while progress.nimg < total and not (sampler is not None and sampler.exhausted):
                stats = training_step(state, phases, dataset, next(real), config)
                now = time.monotonic()
                progress.seconds, clock = progress.seconds + now - clock, now
                divergence_check.check(progress.kimg, stats)
                if sampler is not None:
                    progress.dp_steps = sampler.ledger.steps
                    if math.isfinite(sampler.epsilon):
                        stats["epsilon"] = sampler.epsilon
                progress.stats |= stats
                log.write(progress, stats)
                bar.update(config.batch)
                bar.set_postfix(
                    p=f"{state.adaptive.p:.3f}", G=f"{stats['G']:.2f}", D=f"{stats['D']:.2f}", refresh=False
                )
                if ranks.any(stop.is_set()):
                    progress.stopped = True
                    break
                if progress.nimg >= next_snapshot and progress.nimg < total:
                    log.flush()
                    save()
                    next_snapshot += snapshot_kimg * 1000
            save()
    return state.G_ema, progress


def _real_images(
    dataset: ImageDataset, config: GanConfig, progress: GanProgress, ranks: Ranks, sampler: PatientSampler | None
) -> Generator[Batch | PrivateBatch]:
    if sampler is None:
        yield from batches(dataset, config, progress.nimg, ranks)
    else:
        yield from sampler.batches(progress.step, ranks.device)
