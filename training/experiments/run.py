"""Train and evaluate one experiment in its own folder. Finished parts are not repeated.

checkpoint.safetensors, log.jsonl, samples-*.png, ...   the run, as `dermis train gan` writes it
bundle/                                                 the generator, with its evaluation
metrics.json                                            `Result`, written last: the experiment is finished
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
from dermis.files import write_file
from dermis.network_config import DEFAULT_NOISE_MODE
from training.evaluation.evaluation import evaluate_bundle, keep_metrics
from training.experiments.plan import METRICS, EvaluationOptions, ExperimentTask
from training.gan.config import GanConfig
from training.gan.loop import train
from training.gan.snapshot import GeneratorOrigin, write_snapshot


@dataclass(frozen=True)
class Result:
    """A finished experiment.

    Attributes:
        kimg: Length of the training.
        images: Training images by class.
        bundle: Digest of the bundle.
        metrics: The evaluation.
    """

    kimg: float
    seconds_per_kimg: float
    images: Mapping[str, int]
    bundle: str
    metrics: Mapping[str, Any]


def read_result(folder: Path) -> Result | None:
    """Read the result of the experiment in `folder`; None if it is not finished."""
    file = folder / METRICS
    try:
        return Result(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise TrainingError(f"{file}: cannot be read ({escape(error)}); remove it to evaluate again") from None


def run_experiment(
    task: ExperimentTask,
    folder: Path,
    evaluation_options: EvaluationOptions,
    origin: GeneratorOrigin,
    *,
    device: torch.device,
    cache: Path | None = None,
    snapshot_kimg: float | None = None,
    compile_networks: bool = False,
    progress_bar: bool = True,
) -> Result | None:
    """Train, evaluate and write metrics.json.

    Args:
        task: The experiment with its images.
        folder: Its folder.
        evaluation_options: Options of the evaluation.
        origin: Origin of the images.
        device: Device of the training and the evaluation.
        cache: Folder for features.
        snapshot_kimg: Interval of snapshots; None for 20, or a hundredth of a long run.
        compile_networks: Compile the networks.
        progress_bar: Show a progress bar.

    Returns:
        The result; None if the user stopped the training, which the next call continues.

    Raises:
        DermisError: `train` or `evaluate_bundle` failed.
    """
    if (finished := read_result(folder)) is not None:
        return finished
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
    evaluation = evaluate_bundle(
        open_bundle(folder / "bundle"),
        dataset,
        [evaluation_options.extractor],
        holdout=task.holdout,
        count=evaluation_options.samples,
        ppl_paths=evaluation_options.ppl_paths,
        seed=config.seed,
        noise_modes=[DEFAULT_NOISE_MODE],
        cache=cache,
        device=str(device),
    )
    torch.set_num_threads(threads)  # generating with torch on the CPU sets one thread
    bundle = keep_metrics(open_bundle(folder / "bundle"), evaluation.metrics)
    result = Result(
        kimg=progress.kimg,
        seconds_per_kimg=seconds_per_kimg(folder / "log.jsonl", config),
        images={name: int((dataset.labels == label).sum()) for label, name in enumerate(dataset.class_names)},
        bundle=bundle.digest,
        metrics=evaluation.metrics,
    )
    write_file(folder / METRICS, (json.dumps(asdict(result), indent=2, sort_keys=True) + "\n").encode())
    return result


def seconds_per_kimg(log: Path, config: GanConfig) -> float:
    """Return the training time for 1,000 images.

    It is the median over cycles of all phases (16 steps by default), so that snapshots, pauses and compiling do not count;
    in a run that is shorter than a cycle, the mean.

    Args:
        log: log.jsonl of the run.
        config: Its configuration.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    seconds = [0.0, *(float(json.loads(line)["seconds"]) for line in lines)]
    intervals = config.r1_interval if config.r1_gamma else 1, config.pl_interval if config.pl_weight else 1
    cycle = min(math.lcm(*intervals), len(lines))
    marks = seconds[::cycle]
    return median(b - a for a, b in pairwise(marks)) / (cycle * config.batch / 1000)
