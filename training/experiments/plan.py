"""The plan of a group of experiments: all options and images are checked before the first training starts.

The folder of the experiments has the plan in plan.json. Running the same command again continues the experiments; a command
with other options is refused, and the message names what differs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dermis.bundle import check_names
from dermis.errors import DataError, TrainingError, escape
from dermis.features import FeatureExtractor
from dermis.files import write_file
from dermis.network_config import DEFAULT_NOISE_MODE
from training.data.images import ImageDataset, load_images
from training.data.sources import Source
from training.evaluation.evaluation import check_images
from training.evaluation.measure import MIN_IMAGES
from training.evaluation.record import FORMAT_VERSION
from training.experiments.experiment import TABLE1, Experiment, read_experiment
from training.gan.config import GanConfig, automatic_precision

PLAN = "plan.json"
METRICS = "metrics.json"  # name of a file in the folder of a finished experiment
GROUPS = {"table1": TABLE1}
_OPTION = {"total_kimg": "--kimg or --scale", "seed": "--seed", "resolution": "--resolution"}


@dataclass(frozen=True)
class ExperimentTask:
    """One experiment with the images of its classes.

    Attributes:
        holdout: Real images that the generator is not trained on.
    """

    experiment: Experiment
    config: GanConfig
    dataset: ImageDataset
    holdout: ImageDataset | None


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of the evaluation, the same for all generators.

    Attributes:
        samples: Number of generated images; None for as many as there are real ones.
    """

    extractor: FeatureExtractor
    samples: int | None
    ppl_paths: int

    def __post_init__(self) -> None:
        for option, value in (("--samples", self.samples), ("--ppl-paths", self.ppl_paths)):
            if value is not None and value < MIN_IMAGES:
                raise TrainingError(f"{option}: {value} are too few to measure anything; give {MIN_IMAGES} or more")


def read_experiments(which: Sequence[str]) -> list[Experiment]:
    """Read experiments by name, file or group ("table1"), each once.

    Raises:
        TrainingError: An experiment is wrong, or two have the same name.
    """
    names = [name for each in which for name in GROUPS.get(each, (each,))]
    experiments: dict[str, Experiment] = {}
    for name in names:
        experiment = read_experiment(name)
        if experiments.setdefault(experiment.name, experiment) != experiment:
            raise TrainingError(f"{name}: another experiment also has the name {experiment.name}; rename the file")
    return list(experiments.values())


def configure(
    experiment: Experiment,
    device: torch.device,
    *,
    scale: float = 1.0,
    kimg: float | None = None,
    resolution: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> GanConfig:
    """Return the configuration of a run.

    The precision is bf16 where the device multiplies it natively, unless the file or `settings` name one.

    Args:
        experiment: The experiment.
        device: Device of the training.
        scale: Factor of the file's length.
        kimg: Length that replaces the file's.
        resolution: Side in pixels that replaces the file's.
        seed: Seed of everything random.
        settings: Fields of `GanConfig` that replace the file's.

    Raises:
        TrainingError: An option does not fit; the message names it and the experiment.
    """
    if scale <= 0:
        raise TrainingError(f"--scale: {scale:g} must be positive")
    precision = None if "precision" in experiment.options else automatic_precision(device)
    try:
        length = experiment.config().total_kimg * scale if kimg is None else kimg
        options = {"precision": precision, "total_kimg": length, "seed": seed} | dict(settings or {})
        config = experiment.config(resolution=resolution, **options)
        _ = config.generator, config.discriminator
    except (TrainingError, ValueError) as error:
        raise TrainingError(f"{experiment.name}: {error}") from None
    return config


def plan_tasks(
    experiments: Sequence[Experiment],
    configs: Sequence[GanConfig],
    source: Source,
    holdout: Source | None = None,
    *,
    cache: Path | None = None,
    progress: bool = True,
) -> list[ExperimentTask]:
    """Decode the images that the experiments need.

    Raises:
        DataError: A class is missing or too small. This is checked before anything is decoded.
    """
    for experiment in experiments:
        names = sorted(experiment.classes)
        check_names(experiment.name, names if experiment.conditional else (), len(names) * experiment.conditional)
        for images in (source, holdout):
            if images is not None:
                _check_classes(experiment, images)
    loaded: dict[tuple[bool, tuple[str, ...], int], ImageDataset] = {}

    def load(images: Source, classes: Sequence[str], resolution: int) -> ImageDataset:
        key = images is source, tuple(sorted(classes)), resolution
        if key not in loaded:
            loaded[key] = load_images(images.with_classes(key[1]), resolution, cache=cache, progress=progress)
        return loaded[key]

    tasks = []
    for experiment, config in zip(experiments, configs, strict=True):
        dataset = load(source, experiment.classes, config.resolution)
        holdout_images = None if holdout is None else load(holdout, experiment.classes, config.resolution)
        check_images(dataset, holdout_images)
        tasks.append(ExperimentTask(experiment, config, dataset, holdout_images))
    return tasks


def _check_classes(experiment: Experiment, source: Source) -> None:
    try:
        chosen = source.with_classes(experiment.classes)
    except DataError as error:
        hint = "" if {"benign", "malignant"} <= set(source.class_names) else "; --binary maps diagnoses to these two"
        raise DataError(f"{experiment.name}: {error}{hint}") from None
    for name in experiment.classes:
        if (count := len(chosen.of_class(name))) < MIN_IMAGES:
            raise DataError(
                f"{experiment.name}: {source.path}: {count} images of {name} are too few; {MIN_IMAGES} are needed"
            )


def check_or_write_plan(out: Path, tasks: Sequence[ExperimentTask], evaluation: EvaluationOptions) -> None:
    """Write out/plan.json, or add experiments to it.

    Raises:
        TrainingError: The folder was started with other options or images; the message names what differs.
    """
    measured = {
        "--extractor": evaluation.extractor.name,
        "--extractor (its weights)": evaluation.extractor.identity,
        "--samples": evaluation.samples,
        "--ppl-paths": evaluation.ppl_paths,
    }
    planned = {task.experiment.name: _planned(task) for task in tasks}
    file = out / PLAN
    stored_plan = _read(file)
    if stored_plan:
        for option, value in measured.items():
            _check_equal(out, option, stored_plan["measured"].get(option), value)
        _check_comparable(out, stored_plan)
        for task in tasks:
            if stored := stored_plan["experiments"].get(task.experiment.name):
                _check_task(out, task, stored)
        planned = stored_plan["experiments"] | planned
    measured |= {"noise_mode": DEFAULT_NOISE_MODE, "metrics_format": FORMAT_VERSION}
    write_file(file, (json.dumps({"measured": measured, "experiments": planned}, indent=2) + "\n").encode())


def _planned(task: ExperimentTask) -> dict[str, Any]:
    return {
        "classes": list(task.experiment.classes),
        "data": task.dataset.sha256,
        "holdout": None if task.holdout is None else task.holdout.sha256,
        "config": task.config.to_dict(),
    }


def _check_task(out: Path, task: ExperimentTask, stored: Mapping[str, Any]) -> None:
    name, planned = task.experiment.name, _planned(task)
    _check_equal(out, f"{name}: classes", stored["classes"], planned["classes"])
    for images in ("data", "holdout"):
        if stored[images] != planned[images]:
            raise TrainingError(
                f"{out}: was started with other images of --{images}; use the same, or choose another --out"
            )
    changed = {"total_kimg": task.config.total_kimg} | task.config.changed_from(stored["config"])
    for option, value in changed.items():
        _check_equal(out, f"{name}: {_OPTION.get(option, option)}", stored["config"].get(option), value)


def _check_comparable(out: Path, stored_plan: Mapping[str, Any]) -> None:
    """Refuse a folder whose experiments were evaluated by a version with other noise or other comparisons.

    Version 1 of the metrics compared all images with all; version 2 compares equal numbers where images are held out.
    A folder without evaluated experiments can be continued.
    """
    measured = stored_plan["measured"]
    noise_mode, version = measured.get("noise_mode", "const"), measured.get("metrics_format", 1)
    evaluated = [out / name / METRICS for name in stored_plan["experiments"] if (out / name / METRICS).exists()]
    if evaluated and (noise_mode, version) != (DEFAULT_NOISE_MODE, FORMAT_VERSION):
        raise TrainingError(
            f"{out}: its experiments were evaluated with {noise_mode} noise and metrics of format {version}, which cannot be "
            f"compared with the present {DEFAULT_NOISE_MODE} noise and format {FORMAT_VERSION}; choose another --out, or "
            f"remove {', '.join(map(str, evaluated))} to evaluate again without training"
        )


def _check_equal(out: Path, option: str, old: object, new: object) -> None:
    if old != new:
        raise TrainingError(
            f"{out}: was started with {option} {old}, not {new}; use the same value, or choose another --out"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TrainingError(f"{file}: cannot be read ({escape(error)}); remove it, or choose another --out") from None
    return content
