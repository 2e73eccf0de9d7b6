"""The training loop: one function from a dataset and a configuration to a run folder.

A run that is stopped and resumed computes what an uninterrupted one would have computed, bit for bit on the CPU.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from dermis.errors import TrainingError
from dermis.files import try_lock
from dermis.networks import Generator
from training.data.isic import ImageDataset
from training.gan.batches import batches
from training.gan.config import GanConfig
from training.gan.health import Health
from training.gan.journal import Journal
from training.gan.parallel import Ranks
from training.gan.state import Progress, State, load_state, new_state, save_state
from training.gan.step import training_step
from training.interrupt import stop_requested

Snapshot = Callable[[Path, State], None]
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # some cluster file systems have none


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
    begin: Callable[[State], None] | None = None,
    on_snapshot: Snapshot | None = None,
    tensorboard: bool = False,
    progress_bar: bool = True,
) -> tuple[Generator, Progress]:
    """Train until config.total_kimg; returns the averaged generator (G_ema) and where the run stands.

    Writes into `out`: checkpoint.safetensors, log.jsonl, config.json, and calls on_snapshot(out, state) at the start,
    every snapshot_kimg and at the end. `begin` may fill the state of a new run with weights of another. `ranks` are those
    of several processes, of which only the first writes and calls on_snapshot. SIGINT and SIGTERM finish the step, save
    and return.

    Raises TrainingError if another training is going on in `out`, the run diverges (the last checkpoint is kept) or the
    checkpoint does not fit: a run is resumed with the options that it began with, unless `allow_changes`, which notes
    what changed in Progress.changes.
    """
    checkpoint = out / "checkpoint.safetensors"
    if checkpoint.exists() and not resume:
        raise TrainingError(f"{out}: holds a run already; add --resume to go on with it, or choose another --out")
    if config.precision == "fp16" and device.type == "cpu":
        raise TrainingError("precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    ranks = ranks or Ranks(device=device)
    ranks.check_batch(config)

    state = new_state(config, device)
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
    with locked(out) if ranks.first else nullcontext():
        if checkpoint.exists():
            load_state(checkpoint, state, config, dataset, allow_changes)
        elif begin is not None:
            begin(state)
        if ranks.first:
            (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        phases = state.phases(config, ranks, compile_networks)
        health = Health(checkpoint)

        def save() -> None:
            if ranks.first:
                save_state(checkpoint, state, config, dataset)
                if on_snapshot is not None:
                    on_snapshot(out, state)

        progress, total = state.progress, int(config.total_kimg * 1000)
        next_snapshot = progress.nimg + snapshot_kimg * 1000
        if progress.nimg == 0 and on_snapshot is not None and ranks.first:
            on_snapshot(out, state)
        clock = time.monotonic()
        quiet = not (progress_bar and ranks.first)
        with (
            tqdm(total=total, initial=progress.nimg, unit="img", unit_scale=True, disable=quiet, smoothing=0.1) as bar,
            Journal(out, progress.nimg, enabled=ranks.first, tensorboard=tensorboard) as journal,
            closing(batches(dataset, config, progress.nimg, ranks)) as real,
            stop_requested(insist=ranks.count > 1) as stop,
        ):
            while progress.nimg < total:
                stats = training_step(state, phases, dataset, next(real), config)
                now = time.monotonic()
                progress.seconds, clock = progress.seconds + now - clock, now
                health.check(progress.kimg, stats)
                progress.stats |= stats
                journal.write(progress, stats)
                bar.update(config.batch)
                bar.set_postfix(
                    p=f"{state.adaptive.p:.3f}", G=f"{stats['G']:.2f}", D=f"{stats['D']:.2f}", refresh=False
                )
                if ranks.any(stop.is_set()):
                    progress.stopped = True
                    break
                if progress.nimg >= next_snapshot and progress.nimg < total:
                    journal.flush()
                    save()
                    next_snapshot += snapshot_kimg * 1000
            save()
    return state.G_ema, progress


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other trainings out of the run folder. The kernel lets go when this process ends, however it ends."""
    try:
        lock = try_lock(out / "lock")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise TrainingError(f"{out / 'lock'}: cannot be locked ({error.strerror})") from None
        yield
        return
    if lock is None:
        raise TrainingError(
            f"{out}: another training is going on in this folder; wait for it or stop it, or choose another --out"
        )
    try:
        yield
    finally:
        lock.release()
