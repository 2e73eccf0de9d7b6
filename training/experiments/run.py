"""Train and evaluate one experiment in a folder of its own; what was done before is not done again.

checkpoint.safetensors, log.jsonl, samples-*.png, ...   the run, as `dermis train gan` leaves it
bundle/                                                 the generator, evaluated
metrics.json                                            `Result`, written last: the experiment is done
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dermis.bundle import open_bundle
from dermis.errors import TrainingError, escape
from dermis.network_config import DEFAULT_NOISE_MODE
from training.evaluation.evaluation import evaluate_bundle, keep_metrics
from training.experiments.plan import METRICS, Measuring, Task, write_beside
from training.gan.config import GanConfig
from training.gan.loop import train
from training.gan.snapshot import GeneratorOrigin, write_snapshot


@dataclass(frozen=True)
class Result:
    """An experiment that is done. images: training images by class; bundle: its digest; metrics: its evaluation."""

    kimg: float
    seconds_per_kimg: float
    images: Mapping[str, int]
    bundle: str
    metrics: Mapping[str, Any]


def read_result(folder: Path) -> Result | None:
    """What the experiment in `folder` came to; None if it is not done."""
    file = folder / METRICS
    try:
        return Result(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{file}: cannot be read ({escape(error)}); remove it to evaluate again") from None


def run_experiment(
    task: Task,
    folder: Path,
    measuring: Measuring,
    origin: GeneratorOrigin,
    *,
    device: torch.device,
    cache: Path | None = None,
    snapshot_kimg: float | None = None,
    compile_networks: bool = False,
    progress_bar: bool = True,
) -> Result | None:
    """Train, evaluate and write metrics.json; None if the user stopped the training, which the next call goes on with.

    snapshot_kimg: 20, or a hundredth of a long run, if None. Raises what `train` and `evaluate_bundle` raise.
    """
    if (done := read_result(folder)) is not None:
        return done
    config, dataset = task.config, task.dataset
    _, progress = train(
        dataset,
        config,
        folder,
        device=device,
        resume=True,
        compile_networks=compile_networks,
        snapshot_kimg=snapshot_kimg or max(20.0, config.total_kimg / 100),
        on_snapshot=write_snapshot(dataset, config, origin, device),
        progress_bar=progress_bar,
    )
    if progress.stopped:
        return None
    threads = torch.get_num_threads()
    found = evaluate_bundle(
        open_bundle(folder / "bundle"),
        dataset,
        [measuring.extractor],
        holdout=task.holdout,
        count=measuring.samples,
        ppl_paths=measuring.ppl_paths,
        seed=config.seed,
        noise_modes=[DEFAULT_NOISE_MODE],
        cache=cache,
        device=str(device),
    )
    torch.set_num_threads(threads)  # drawing with torch on the CPU takes one thread an image
    bundle = keep_metrics(open_bundle(folder / "bundle"), found.metrics)
    result = Result(
        kimg=progress.kimg,
        seconds_per_kimg=seconds_per_kimg(folder / "log.jsonl", config),
        images={name: int((dataset.labels == label).sum()) for label, name in enumerate(dataset.class_names)},
        bundle=bundle.digest,
        metrics=found.metrics,
    )
    write_beside(folder / METRICS, json.dumps(asdict(result), indent=2, sort_keys=True) + "\n")
    return result


def seconds_per_kimg(log: Path, config: GanConfig) -> float:
    """Median over the cycles of all phases (16 steps by default), so that snapshots, pauses and compiling do not count.

    The mean of a run that is shorter than a cycle.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    seconds = [0.0, *(float(json.loads(line)["seconds"]) for line in lines)]
    intervals = config.r1_interval if config.r1_gamma else 1, config.pl_interval if config.pl_weight else 1
    cycle = min(math.lcm(*intervals), len(lines))
    marks = seconds[::cycle]
    return median(b - a for a, b in pairwise(marks)) / (cycle * config.batch / 1000)
