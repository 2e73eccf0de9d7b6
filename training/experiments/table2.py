"""Train classifiers in all scenarios of table 2 with several seeds, and measure them on the same real test images.

plan.json                   options and digests of the images; a command with other options or images is refused
SCENARIO/seed-N/            the run, as `dermis train classifier` writes it
SCENARIO/seed-N/done.json   written last: the run is finished
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import DESCRIPTOR
from dermis.bundle.folder import exists
from dermis.errors import TrainingError
from dermis.files import write_file
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealData
from training.classifier.run import ClassifierData, ClassifierOrigin, train_classifier
from training.classifier.synthetic import SyntheticImages, SyntheticSource, load_synthetic, parse_source
from training.distributed import Ranks
from training.experiments.plan import PLAN
from training.experiments.scenarios import GENERATORS, Scenario, sources_of_table1

DONE = "done.json"
_PREDICTIONS = "predictions.csv"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScenarioTask:
    """A scenario with its training images."""

    scenario: Scenario
    data: ClassifierData


@dataclass(frozen=True)
class ScenarioRun:
    """The predictions of one finished training on the test images, in the order of their ids.

    Attributes:
        logits: Logits [N].
        calibrated: Calibrated probabilities [N].
        threshold: The default threshold of the classifier.
    """

    seed: int
    logits: Floats
    calibrated: Floats
    threshold: float


def read_generators(texts: Sequence[str], table1: Path | None) -> dict[str, list[SyntheticSource]]:
    """Return the sources of synthetic images by generator.

    Args:
        texts: Texts such as "cgan=BUNDLE" or "gan=benign=BUNDLE"; they replace the generators of `table1`.
        table1: Folder of the experiments of table 1.

    Raises:
        TrainingError: A text has another form, or the folder has no finished generator.
    """
    sources: dict[str, list[SyntheticSource]] = {}
    if table1 is not None:
        for generator in GENERATORS:
            parts = {key: table1 / run / "bundle" for key, run in sources_of_table1(generator).items()}
            if all(exists(str(part), DESCRIPTOR) for part in parts.values()):
                sources[generator] = [SyntheticSource(str(part), key or None) for key, part in parts.items()]
        if not sources:
            raise TrainingError(
                f"--generators: {table1}: has no finished experiment of table1; run `dermis experiment table1` first"
            )
    named: dict[str, list[SyntheticSource]] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or name not in GENERATORS or not source:
            raise TrainingError(
                f"--generator {text}: must be NAME=SOURCE, where NAME is one of {', '.join(GENERATORS)}"
            )
        named.setdefault(name, []).append(parse_source(source))
    return sources | named


def plan_tasks(
    scenarios: Sequence[Scenario],
    generators: Mapping[str, Sequence[SyntheticSource]],
    real: RealData,
    size: int,
    scale: float,
    *,
    synthetic_seed: int,
    truncation_psi: float,
    cache: Path,
    device: str,
    progress: bool = True,
) -> list[ScenarioTask]:
    """Return the scenarios whose generators are given, with their images.

    Args:
        scenarios: All scenarios.
        generators: Sources of synthetic images by generator.
        real: Real images.
        size: Side in pixels.
        scale: Factor of the paper's numbers of synthetic images.
        synthetic_seed: Seed of the synthetic images.
        truncation_psi: Truncation of the synthetic images.
        cache: Folder for synthetic images.
        device: Device of the generators.
        progress: Show a progress bar.

    Raises:
        DermisError: `load_synthetic` failed.
    """
    tasks = []
    for scenario in scenarios:
        synthetic: SyntheticImages | None = None
        if scenario.generator is not None:
            if scenario.generator not in generators:
                continue
            synthetic = load_synthetic(
                generators[scenario.generator],
                scenario.counts(scale),
                size,
                seed=synthetic_seed,
                truncation_psi=truncation_psi,
                cache=cache,
                device=device,
                progress=progress,
            )
        tasks.append(ScenarioTask(scenario, ClassifierData(scenario.configuration, real, synthetic)))
    return tasks


def check_or_write_plan(
    out: Path, tasks: Sequence[ScenarioTask], config: ClassifierConfig, seeds: Sequence[int], weights: str
) -> None:
    """Write out/plan.json, or add scenarios and seeds to it.

    Raises:
        TrainingError: The folder was started with other options or images; the message names what differs.
    """
    options = {name: value for name, value in config.to_dict().items() if name != "seed"} | {"weights": weights}
    planned = {task.scenario.name: task.data.digest for task in tasks}
    file = out / PLAN
    try:
        stored_plan = json.loads(file.read_text(encoding="utf-8"))
        stored_options, stored = stored_plan["options"], stored_plan["scenarios"]
    except FileNotFoundError:
        stored_options, stored = options, {}
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{file}: is not a plan of table2; choose another --out") from None
    changed = [name for name in options if stored_options.get(name) != options[name]]
    if changed:
        name = changed[0]
        raise TrainingError(
            f"{out}: was started with {name} {stored_options.get(name)}, not {options[name]}; use the same value, or "
            "choose another --out"
        )
    for name, digest in planned.items():
        if stored.get(name, digest) != digest:
            raise TrainingError(
                f"{out}: {name} was started with other images (data, split, generator or scale); use the same, or choose "
                "another --out"
            )
    text = json.dumps({"options": options, "scenarios": stored | planned, "seeds": list(seeds)}, indent=2)
    write_file(file, (text + "\n").encode())


def run_tasks(
    out: Path,
    tasks: Sequence[ScenarioTask],
    config: ClassifierConfig,
    seeds: Sequence[int],
    *,
    weights: str,
    origin: ClassifierOrigin,
    ranks: Ranks,
    report: Callable[[str], None],
    progress_bar: bool = True,
) -> bool:
    """Train what is not finished, seed by seed, so that there is a complete table early.

    Args:
        out: Folder of the experiment.
        tasks: Scenarios with their images.
        config: Options of the classifiers; each seed replaces its seed.
        seeds: Seeds of the runs.
        weights: Weights to start from.
        origin: Origin of the images.
        ranks: Devices.
        report: Called with lines of progress.
        progress_bar: Show progress bars.

    Returns:
        False, on all ranks, if the user stopped the training.
    """
    every = [(task, seed) for seed in seeds for task in tasks]
    for number, (task, seed) in enumerate(every, 1):
        name, folder = task.scenario.name, out / task.scenario.name / f"seed-{seed}"
        head = f"[{number}/{len(every)}] {name}, seed {seed}:"
        if (folder / DONE).exists():
            report(f"{head} done already")
            continue
        report(f"{head} {len(task.data.training):,} images")
        trained = train_classifier(
            task.data,
            replace(config, seed=seed),
            folder,
            origin=replace(origin, name=f"{name}-{seed}", scenario=task.scenario.title),
            ranks=ranks,
            weights=weights,
            resume=True,
            progress_bar=progress_bar,
        )
        if ranks.any(ranks.first and trained is None):
            return False
        if trained is None:  # as on all ranks but the first
            continue
        summary = {
            "seed": seed,
            "classifier": trained.description.digest,
            "threshold": trained.description.threshold(),
            "epochs": trained.progress.epoch,
            "hours": round(trained.progress.seconds / 3600, 3),
        }
        write_file(folder / DONE, (json.dumps(summary, indent=2) + "\n").encode())
    return True


def read_runs(out: Path, scenario: Scenario, ids: Sequence[str]) -> list[ScenarioRun]:
    """Read the finished runs of a scenario, ordered by seed.

    Args:
        out: Folder of the experiment.
        scenario: The scenario.
        ids: Ids of the test images, in the order of the predictions that are returned.

    Raises:
        TrainingError: A run was measured on other test images.
    """
    runs = []
    for file in sorted((out / scenario.name).glob(f"seed-*/{DONE}")):
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        with (file.parent / _PREDICTIONS).open(newline="", encoding="utf-8") as text:
            rows = {row["isic_id"]: row for row in csv.DictReader(text) if row["part"] == "test"}
        if rows.keys() != set(ids):
            raise TrainingError(f"{file.parent}: was measured on other test images; choose another --out")
        logits, calibrated = (np.array([float(rows[key][name]) for key in ids]) for name in ("logit", "calibrated"))
        runs.append(ScenarioRun(int(summary["seed"]), logits, calibrated, float(summary["threshold"])))
    return sorted(runs, key=lambda run: run.seed)
