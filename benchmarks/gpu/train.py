"""Train for a given time and write a state that the next run continues.

    python -m benchmarks.gpu.train CONFIG.toml --data FOLDER --out DIR --seconds S [--resume STATE]
    python -m benchmarks.gpu.train CONFIG.toml --data FOLDER --resume STATE --bundle RUN

The second command makes a bundle from a state, on any machine. DIR gets state/state-*.safetensors (training.gan.compact),
grid.webp and training.jsonl (one line for each of the last steps), each replaced every `snapshot_seconds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import tomllib
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from benchmarks.gpu.results import Results
from dermis.devices import resolve_device
from dermis.errors import TrainingError
from dermis.files import write_file
from dermis.image_metadata import ImageOrigin
from dermis.imaging import contact_sheet, encode
from training.data.images import ImageDataset, load_images
from training.data.sources import read_source
from training.distributed import Ranks
from training.gan.batches import batches
from training.gan.compact import Moments, load_compact_state, save_compact_state, warm_up_factor
from training.gan.config import GanConfig, automatic_precision, base_config
from training.gan.divergence import DivergenceCheck
from training.gan.snapshot import GRID, GeneratorOrigin, sample_grid, write_snapshot
from training.gan.state import GanState, new_state
from training.gan.step import training_step
from training.gan.transfer import read_source as read_weights
from training.gan.transfer import transfer
from training.interrupt import stop_requested

LOG_LINES = 20_000  # maximum number of lines that training.jsonl keeps
TINY: dict[str, Any] = {"channel_base": 256, "channel_max": 16, "z_dim": 16, "w_dim": 16, "batch": 4}


@dataclass(frozen=True)
class TrainingPlan:
    """The options of a TOML file. `gan` has fields of GanConfig; the others follow `base`."""

    resolution: int
    base: str = "auto"
    conditional: bool = True
    start_from: str | None = None  # a bundle or an official .pkl, for a run that does not resume
    compile: bool = True
    snapshot_seconds: float = 75.0
    moments: Moments = "auto"
    warm_up_steps: int = 100
    gan: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.moments not in get_args(Moments):
            raise TrainingError(f"moments: {self.moments!r} is none of {', '.join(get_args(Moments))}")


def read_plan(path: Path) -> TrainingPlan:
    """Read a plan. Raises TrainingError if the file is not TOML or has an unknown option."""
    try:
        options = tomllib.loads(path.read_text(encoding="utf-8"))
        return TrainingPlan(**options)
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{path}: {error}") from error


def config_of(plan: TrainingPlan, dataset: ImageDataset, device: torch.device, tiny: bool) -> GanConfig:
    """The configuration of a plan for this device. `tiny` uses small networks in float32."""
    options: dict[str, Any] = {"precision": automatic_precision(device), "total_kimg": 1e6} | plan.gan
    if tiny:
        options |= TINY | {"precision": "fp32"}
    classes = len(dataset.class_names) if plan.conditional else 0
    try:
        return base_config(plan.base, 16 if tiny else plan.resolution, classes, **options)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"gan: {error}") from error


def load_data(folder: Path | None, resolution: int, tiny: bool) -> ImageDataset:
    """Read the images. A tiny run without a folder gets coloured noise."""
    if folder is not None:
        return load_images(read_source(folder), 16 if tiny else resolution, progress=False)
    if not tiny:
        raise TrainingError("--data: name the folder of training images")
    rng = np.random.default_rng(0)
    labels = np.arange(32, dtype=np.int64) % 2
    pixels = np.where(labels[:, None, None, None] == 1, 190, 60) + rng.integers(-30, 30, (32, 16, 16, 3))
    return ImageDataset(pixels.astype(np.uint8), labels, ("a", "b"), tuple(map(str, range(32))), "0" * 64)


class Run:
    """A training run that saves at intervals of time."""

    def __init__(self, plan: TrainingPlan, config: GanConfig, dataset: ImageDataset, results: Results) -> None:
        self.plan, self.config, self.dataset, self.results = plan, config, dataset, results
        self.out, self.device = results.out, results.device
        self.state: GanState = new_state(config, self.device)
        self.lines: list[str] = []
        self.save_seconds = 0.0
        self.warm_up_steps = 0

    def begin(self, resume: Path | None) -> None:
        """Fill the state from an earlier run or with a bundle's weights. Otherwise it keeps its random weights."""
        if resume is not None:
            has_moments = load_compact_state(resume, self.state, self.config, self.dataset)
            self.warm_up_steps = 0 if has_moments else self.plan.warm_up_steps
            moments = "with their moments" if has_moments else f"without moments, {self.warm_up_steps} steps of warm-up"
            self.results.note("resumed", f"at {self.state.progress.kimg:.1f} kimg, optimizers {moments}")
        elif self.plan.start_from is not None:
            networks = transfer(read_weights(Path(self.plan.start_from)), self.state)
            self.results.note(
                "began", "; ".join(f"{each.network}: {each.share:.0%} of the weights" for each in networks)
            )

    def train(self, deadline: float, most_steps: int | None = None) -> None:
        """Train at least one step, until the deadline (time.monotonic) minus the time for saving, or until SIGTERM."""
        state, config, progress = self.state, self.config, self.state.progress
        compiled = self.plan.compile and self.device.type == "cuda"
        phases = state.phases(config, compiled=compiled)
        health = DivergenceCheck(self.out / "state")
        ranks = Ranks(device=self.device)
        clock = saved = time.monotonic()
        durations: list[float] = []
        with (
            closing(batches(self.dataset, config, progress.nimg, ranks)) as real,
            stop_requested(ignore_repeated=False) as stop,
        ):
            step = 0
            while step == 0 or not (
                stop.is_set() or step == most_steps or clock + 2 * self.save_seconds + 1 > deadline
            ):
                factor = warm_up_factor(step, self.warm_up_steps)
                stats = training_step(state, phases, self.dataset, next(real), config, rate_factor=factor)
                now = time.monotonic()
                durations.append(now - clock)
                progress.seconds, clock = progress.seconds + now - clock, now
                health.check(progress.kimg, stats)
                progress.stats |= stats
                self.lines.append(json.dumps({"nimg": progress.nimg, "seconds": round(progress.seconds, 2)} | stats))
                step += 1
                if clock - saved >= self.plan.snapshot_seconds:
                    self.save()
                    saved = clock = time.monotonic()
            self.save()
        self.results.number("training, steps", step, "steps", kimg=progress.kimg, first_step_seconds=durations[0])
        median = 1000 * statistics.median(durations) / config.batch
        self.results.number(
            f"training, {config.resolution} px, batch {config.batch}", median, "s/kimg", compiled=compiled,
            precision=config.precision, projected=config.projected, seconds=progress.seconds,
        )  # fmt: skip

    def save(self) -> None:
        """Write the state first, since a grid can be made from it later."""
        start = time.monotonic()
        summary = save_compact_state(self.out / "state", self.state, self.config, self.dataset, self.plan.moments)
        write_file(self.out / "training.jsonl", "".join(f"{line}\n" for line in self.lines[-LOG_LINES:]).encode())
        grid = contact_sheet(sample_grid(self.state.G_ema, self.device), columns=GRID)
        write_file(self.out / "grid.webp", encode(grid, "webp", 85, ImageOrigin("GPU training")))
        self.save_seconds = time.monotonic() - start
        self.results.number(
            f"state at {self.state.progress.kimg:.1f} kimg", summary.bytes / 2**20, "MiB", files=len(summary.files),
            second_moments=summary.moments, rounding=summary.rounding, save_seconds=round(self.save_seconds, 2),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path, help="training images: any source that dermis reads")
    parser.add_argument("--resume", type=Path, help="folder with the state of an earlier run")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--until", type=float, help="seconds since 1970, instead of --seconds; includes imports")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--bundle", type=Path, metavar="RUN", help="only write bundle and grid of --resume to this folder"
    )
    parser.add_argument("--name", default="gpu", help="name of the bundle")
    parser.add_argument("--licence", default="unknown")
    parser.add_argument("--attribution", default="")
    options = parser.parse_args()
    left = options.seconds if options.until is None else options.until - time.time()
    deadline = time.monotonic() + left
    device = torch.device("cpu") if options.tiny or options.bundle else resolve_device("auto")
    plan = read_plan(options.config)
    dataset = load_data(options.data, plan.resolution, options.tiny)
    config = config_of(plan, dataset, device, options.tiny)
    if options.bundle:
        if options.resume is None:
            parser.error("--bundle: name the state with --resume")
        run = Run(plan, config, dataset, Results(options.bundle, "bundle", device))
        options.bundle.mkdir(parents=True, exist_ok=True)
        run.begin(options.resume)
        source = options.data.name if options.data else "noise"
        origin = GeneratorOrigin(options.name, source, options.licence, options.attribution)
        write_snapshot(dataset, config, origin, device)(options.bundle, run.state)
        return
    if options.out is None:
        parser.error("--out: name the folder for results")
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out, "train", device, options.tiny)
    results.note("training images", f"{len(dataset.labels)} of {len(dataset.class_names)} classes")
    run = Run(plan, config, dataset, results)
    run.begin(options.resume)
    run.train(deadline, options.steps)


if __name__ == "__main__":
    main()
