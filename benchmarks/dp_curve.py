"""What differential privacy costs: `python -m benchmarks.dp_curve --data FOLDER --split FOLDER --out FOLDER`.

Trains one small generator for every epsilon and seed on `train`, all with the same options and number of steps, and measures

    FD        Fréchet distance of the generated images to those of `train`, in a feature space that no discriminator uses
    utility   AUC on the real images of `test` of a logistic regression on the features of generated images alone

"inf" is the same training without noise, but with clipping; "ordinary" is `dermis train gan --projected` with as many images.
"real" is the classifier trained on as many real images of `train`. Each run writes one JSON file to --out. Runs that have one
are skipped, so the program can be stopped and started again. It prints the table of docs/differential-privacy.md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.objectives import PROJECTED, check_same_run, mean_and_range, read_part
from dermis.cpus import keep_freed_memory
from dermis.devices import describe_hardware
from dermis.features import FeatureExtractor, feature_extractor
from dermis.files import write_file
from dermis.metrics import frechet_distance
from dermis.metrics.classification import auc
from dermis.networks import Generator
from training.data.images import ImageDataset
from training.evaluation.features import BATCH, labels_in_proportion, real_features
from training.gan.config import GanConfig, automatic_precision, base_config
from training.gan.loop import train
from training.gan.private.planning import resolved_privacy
from training.gan.private.record import privacy_record
from training.gan.snapshot import draw_samples

EPSILONS = ("ordinary", "inf", "50", "10", "3", "1")
_CPU = torch.device("cpu")
Features = NDArray[np.float32]


def configuration(epsilon: str, dataset: ImageDataset, seed: int, args: argparse.Namespace) -> GanConfig:
    """Hyper-parameters of one run. All but "ordinary" have the same, except for the noise."""
    shared = PROJECTED | {"total_kimg": args.kimg, "seed": seed, "precision": automatic_precision(_CPU)}
    classes = len(dataset.class_names)
    if epsilon == "ordinary":
        return base_config("auto", dataset.resolution, classes, **shared)
    private: dict[str, Any] = {"dp": True, "batch": args.batch, "projected_width": args.width, "dp_clip": args.clip}
    noise = {"dp_noise": 0.0} if epsilon == "inf" else {"dp_epsilon": float(epsilon)}
    return base_config("auto", dataset.resolution, classes, **(shared | private | noise))


def train_one(config: GanConfig, dataset: ImageDataset) -> tuple[Generator, dict[str, Any]]:
    """Train, and return the averaged generator, and length, processor time and privacy of the run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if config.dp:
            config = resolved_privacy(config, dataset, out, resume=False)
        begin = time.process_time()
        G, progress = train(dataset, config, out, device=_CPU, snapshot_kimg=math.inf, progress_bar=False)
    if progress.stopped:
        raise SystemExit(130)
    run: dict[str, Any] = {"kimg": progress.kimg, "steps": progress.step, "seconds": time.process_time() - begin}
    if config.dp:
        record = privacy_record(config, dataset, progress.dp_steps)
        run |= {
            name: record[name] for name in ("epsilon", "delta", "noise_multiplier", "unit", "units", "sampling_rate")
        }
    return G, run


def generated_features(G: Generator, labels: NDArray[np.int64], extractor: FeatureExtractor) -> Features:
    """Features of generated images of these classes."""
    indices = range(len(labels))
    return extractor.over(
        draw_samples(G, 0, indices[i : i + BATCH], labels[i : i + BATCH], _CPU) for i in range(0, len(labels), BATCH)
    )


def utility(features: Features, labels: NDArray[np.int64], test: Features, test_labels: NDArray[np.int64]) -> float:
    """AUC on real images of a logistic regression on the features of other images, classes weighted equally."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
    model.fit(features, labels)
    return float(auc(test_labels, model.decision_function(test))[0])


def measure(
    G: Generator, parts: dict[str, ImageDataset], extractor: FeatureExtractor, count: int, cache: Path
) -> dict[str, float]:
    """FD of `count` images in the proportions of `train`, and utility of as many with equal classes."""
    real = {part: real_features(dataset, extractor, cache) for part, dataset in parts.items()}
    proportional = labels_in_proportion(parts["train"].labels, count)
    equal = np.arange(count, dtype=np.int64) % len(parts["train"].class_names)
    return {
        "fd": frechet_distance(real["train"], generated_features(G, proportional, extractor)),
        "auc": utility(generated_features(G, equal, extractor), equal, real["test"], parts["test"].labels),
    }


def reference(parts: dict[str, ImageDataset], extractor: FeatureExtractor, count: int, cache: Path) -> dict[str, float]:
    """The numbers of `count` real images of `train` in the place of generated ones; FD is that of `test`."""
    real = {part: real_features(dataset, extractor, cache) for part, dataset in parts.items()}
    chosen = np.random.default_rng(0).permutation(len(real["train"]))[:count]
    labels = parts["train"].labels
    return {
        "fd": frechet_distance(real["train"], real["test"]),
        "auc": utility(real["train"][chosen], labels[chosen], real["test"], parts["test"].labels),
    }


def table(results: Sequence[dict[str, Any]], real: dict[str, float]) -> str:
    """Markdown with one row for each epsilon: the mean over its seeds, with lowest and highest."""

    def cell(rows: Sequence[dict[str, Any]], name: str, digits: int) -> str:
        return mean_and_range([row[name] for row in rows], digits)

    lines = ["| epsilon | noise multiplier | seeds | kimg | FD | AUC |", "|" + " --- |" * 6]
    for epsilon in EPSILONS:
        rows = [row for row in results if row["target"] == epsilon]
        if rows:
            noise = f"{rows[0]['noise_multiplier']:.3f}" if "noise_multiplier" in rows[0] else "not private"
            cells = (cell(rows, "kimg", 1), cell(rows, "fd", 1), cell(rows, "auc", 3))
            lines.append(f"| {epsilon} | {noise} | {len(rows)} | {' | '.join(cells)} |")
    lines.append(f"| real images | | | | {real['fd']:.1f} | {real['auc']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of images and their table")
    parser.add_argument("--split", type=Path, required=True, help="folder with train.csv and test.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for one JSON file of each run")
    parser.add_argument("--epsilons", nargs="+", choices=EPSILONS, default=list(EPSILONS), metavar="EPSILON")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kimg", type=float, default=4.6, help="length of each run")
    parser.add_argument("--batch", type=int, default=32, help="expected number of patients in a step")
    parser.add_argument("--width", type=int, default=64, help="largest number of channels in the discriminator's heads")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient of one patient")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--space", default="lite1", help="a feature space that no discriminator uses")
    parser.add_argument("--count", type=int, default=2000, help="generated images that are compared")
    parser.add_argument("--cache", type=Path, default=Path(".dermis/cache"))
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)  # processor time is then the time of one core
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {part: read_part(args.data, args.split, part, args.resolution, args.cache) for part in ("train", "test")}
    extractor = feature_extractor(args.space)
    settings = {
        name: getattr(args, name) for name in ("resolution", "kimg", "batch", "width", "clip", "space", "count")
    }
    for seed in args.seeds:
        for epsilon in args.epsilons:
            file = args.out / f"epsilon-{epsilon}-{seed}.json"
            if file.exists():
                check_same_run(file, settings)
                continue
            config = configuration(epsilon, parts["train"], seed, args)
            G, run = train_one(config, parts["train"])
            numbers = measure(G, parts, extractor, args.count, args.cache)
            result = {
                "target": epsilon,
                "seed": seed,
                **settings,
                "hardware": describe_hardware(_CPU),
                **run,
                **numbers,
            }
            write_file(file, (json.dumps(result, indent=2) + "\n").encode())
            print(
                f"epsilon {epsilon}, seed {seed}: {run['steps']} steps in {run['seconds'] / 60:.1f} min, "
                f"FD {numbers['fd']:.1f}, AUC {numbers['auc']:.3f}",
                flush=True,
            )
    results = [json.loads(file.read_text()) for file in sorted(args.out.glob("epsilon-*.json"))]
    print(table(results, reference(parts, extractor, args.count, args.cache)))


if __name__ == "__main__":
    main()
