"""Comparison of training objectives: `python -m benchmarks.objectives --data FOLDER --split FOLDER --out FOLDER`.

Trains one small generator for every objective and seed, each for the same processor time, and compares its images with the
real ones of `train` and of `validation` in feature spaces that no discriminator uses. The held-out part is not used, because
this program serves to choose. Each run writes one JSON file to --out. Runs that have one are skipped, so the program can be
stopped and started again. It prints the table of docs/training.md: mean and range over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dermis.cpus import keep_freed_memory
from dermis.devices import describe_hardware
from dermis.features import feature_extractor
from dermis.files import write_file
from dermis.metrics import frechet_distance
from dermis.metrics.neighbourhoods import compare_neighbourhoods
from dermis.networks import Generator
from training.data.images import ImageDataset
from training.data.isic import load_isic
from training.evaluation.features import BATCH, labels_in_proportion, real_features
from training.gan.batches import batches
from training.gan.config import automatic_precision, base_config
from training.gan.snapshot import draw_samples
from training.gan.state import GanState, new_state
from training.gan.step import training_step

SMALL: dict[str, Any] = {"channel_base": 4096, "channel_max": 256, "z_dim": 256, "w_dim": 256, "batch": 32}
PROJECTED: dict[str, Any] = SMALL | {"projected": True}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "stylegan2": SMALL,
    "stylegan2, relativistic": SMALL | {"relativistic": True, "pl_weight": 0.0, "style_mixing_prob": 0.0},
    "projected": PROJECTED,
    "projected, batch 16": PROJECTED | {"batch": 16},
    "projected, mbstd": PROJECTED | {"projected_mbstd": True},
    "projected, 5 levels": PROJECTED | {"projected_levels": 5},
    "projected, input 224": PROJECTED | {"projected_input": 224},
    "projected, relativistic": PROJECTED | {"relativistic": True, "r1_gamma": 0.1},
    "projected, z and w of 512": PROJECTED | {"z_dim": 512, "w_dim": 512},
    "projected, style mixing": PROJECTED | {"style_mixing_prob": 0.9},
    "projected, path length": PROJECTED | {"pl_weight": 2.0},
    "projected, class balance 0.5": PROJECTED | {"class_balance": 0.5},
    "projected, moments 0.5": PROJECTED | {"moments_weight": 0.5},
    "projected, moments 2": PROJECTED | {"moments_weight": 2.0},
    "projected, learning rate 0.001": PROJECTED | {"learning_rate": 0.001},
    "projected, ema 1 kimg": PROJECTED | {"ema_kimg": 1.0},
    "projected, recipe of the demo": PROJECTED
    | {"projected_mbstd": True, "moments_weight": 6.0, "class_balance": 0.5, "learning_rate": 0.001, "batch": 16},
}
SPACES = ("lite1", "lite2")
_CPU = torch.device("cpu")


def read_part(data: Path, split: Path, part: str, resolution: int, cache: Path) -> ImageDataset:
    """Read the images of one part of a split."""
    return load_isic(data, resolution, metadata=split / f"{part}.csv", cache=cache)


def train_for(seconds: float, dataset: ImageDataset, options: dict[str, Any], seed: int) -> GanState:
    """Train for at least `seconds` of processor time, in whole steps."""
    precision = automatic_precision(_CPU)
    classes = len(dataset.class_names)
    config = base_config("auto", dataset.resolution, classes, seed=seed, precision=precision, **options)
    state = new_state(config, _CPU)
    phases = state.phases(config)
    begin = time.process_time()
    with closing(batches(dataset, config, 0)) as real:
        while time.process_time() - begin < seconds:
            training_step(state, phases, dataset, next(real), config)
    state.progress.seconds = time.process_time() - begin
    return state


def measure(
    G: Generator, parts: dict[str, ImageDataset], spaces: Sequence[str], generated_images: int, cache: Path
) -> dict[str, Any]:
    """FD against `train`; precision, recall and coverage against equal numbers of images of both parts; in each space."""
    labels = labels_in_proportion(parts["train"].labels, generated_images)
    indices = range(generated_images)
    images = [draw_samples(G, 0, indices[i : i + BATCH], labels[i : i + BATCH], _CPU) for i in indices[::BATCH]]
    numbers: dict[str, Any] = {}
    for name in spaces:
        extractor = feature_extractor(name)
        generated = extractor.over(images)
        real = {part: real_features(dataset, extractor, cache) for part, dataset in parts.items()}
        numbers[name] = {"fd": frechet_distance(real["train"], generated)}
        for part, features in real.items():
            count = min(len(features), len(generated))
            rng = np.random.default_rng(0)
            sides = (x[rng.permutation(len(x))[:count]] for x in (features, generated))
            near = compare_neighbourhoods(*sides)
            numbers[name][part] = {key: getattr(near, key) for key in ("precision", "recall", "coverage")}
    return numbers


def check_same_run(file: Path, expected: dict[str, Any]) -> None:
    """End the program if a result was measured with other options, since one table must not mix them."""
    stored = json.loads(file.read_text())
    for key, value in expected.items():
        if stored[key] != value:
            raise SystemExit(f"{file}: was measured with {key} {stored[key]}, not {value}; choose another --out")


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """Mean (lowest to highest) of values, or the value if there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(results: list[dict[str, Any]]) -> str:
    """Markdown with one row for each objective: mean (lowest to highest) over its seeds."""

    def cell(rows: list[dict[str, Any]], *path: str, digits: int = 1) -> str:
        values = []
        for row in rows:
            value: Any = row
            for key in path:
                value = value[key]
            values.append(float(value))
        return mean_and_range(values, digits)

    spaces = results[0]["spaces"] if results else []
    columns = [f"{column}@{space}" for space in spaces for column in ("FD", "recall", "validation recall")]
    lines = [f"| objective | seeds | kimg | {' | '.join(columns)} |", "|" + " --- |" * (3 + len(columns))]
    for name in OBJECTIVES:
        rows = [row for row in results if row["objective"] == name]
        if rows:
            cells = [cell(rows, "kimg")]
            for space in spaces:
                cells.append(cell(rows, space, "fd"))
                cells += [cell(rows, space, part, "recall", digits=3) for part in ("train", "validation")]
            lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of images and their table")
    parser.add_argument("--split", type=Path, required=True, help="folder with train.csv and validation.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for one JSON file of each run")
    parser.add_argument("--minutes", type=float, default=4.0, help="processor time of each run")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES), metavar="NAME")
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), help="feature spaces that no training used")
    parser.add_argument("--count", type=int, default=2000, help="generated images that are compared")
    parser.add_argument("--cache", type=Path, default=Path(".dermis/cache"))
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)  # processor time is then the time of one core
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {
        part: read_part(args.data, args.split, part, args.resolution, args.cache) for part in ("train", "validation")
    }
    settings = {name: getattr(args, name) for name in ("resolution", "minutes", "spaces", "count")}
    for seed in args.seeds:
        for name in args.objectives:
            file = args.out / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}.json"
            if file.exists():
                check_same_run(file, settings | {"options": OBJECTIVES[name]})
                continue
            state = train_for(args.minutes * 60, parts["train"], OBJECTIVES[name], seed)
            result = {
                "objective": name,
                "options": OBJECTIVES[name],
                "seed": seed,
                **settings,
                "hardware": describe_hardware(_CPU),
                "kimg": state.progress.kimg,
                "seconds": state.progress.seconds,
                **measure(state.G_ema, parts, args.spaces, args.count, args.cache),
            }
            write_file(file, (json.dumps(result, indent=2) + "\n").encode())
            print(
                f"{name}, seed {seed}: {state.progress.kimg:.1f} kimg, "
                + ", ".join(f"FD@{space} {result[space]['fd']:.1f}" for space in args.spaces),
                flush=True,
            )
    print(table([json.loads(file.read_text()) for file in sorted(args.out.glob("*.json"))]))


if __name__ == "__main__":
    main()
