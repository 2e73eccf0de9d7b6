"""The results of the experiment with edge cases: each arm on edge cases and on the rest, and paired differences.

The number of an arm is the mean over its seeds. Intervals (95 %) are by a bootstrap that draws patients, as in
`dermis.metrics.classification`, and seeds. Both arms of a difference have the same patients and the same seeds, so that
their common variation cancels out.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.bundle.classifier import NOTICE
from dermis.files import write_file
from dermis.metrics import classification as metrics
from training.classifier.data import RealPart
from training.experiments.edge_case_runs import TrainedRun
from training.experiments.edge_cases import ARMS, EdgeCaseResults, EdgePlan

RESULTS, TABLE = "results.json", "table.md"
SUBSETS = ("edge cases", "the rest", "all")
PAIRS = (("random", "real"), ("neighbours", "real"), ("neighbours", "random"))
METRICS = ("auc", "balanced_accuracy", "brier")
_TITLES = {"auc": "AUC", "balanced_accuracy": "balanced accuracy", "brier": "Brier score"}

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def compare(part: RealPart, measured: EdgeCaseResults, *, replicates: int = metrics.REPLICATES) -> dict[str, Any]:
    """Compare the arms on subsets of the test images.

    Args:
        part: The test images.
        measured: The finished experiment.
        replicates: Number of bootstrap replicates.

    Returns:
        By subset: numbers of "images" and "positive" images; "arms": {arm: {metric: estimate}}; "differences":
        {"neighbours - random": {metric: estimate}, ...}. An estimate is {"value", "low", "high"}. A subset without both
        classes has only the numbers of images.
    """
    masks = {"edge cases": measured.edge, "the rest": ~measured.edge, "all": np.ones_like(measured.edge)}
    compared: dict[str, Any] = {}
    for subset, mask in masks.items():
        rows = np.flatnonzero(mask)
        labels = part.labels[rows]
        compared[subset] = {"images": len(rows), "positive": int(labels.sum())}
        if len(set(labels.tolist())) < 2:
            continue
        groups = [part.groups[i] for i in rows]
        estimated: dict[str, metrics.Metric] = {}
        for metric in METRICS:
            for arm in ARMS:
                estimated[f"{arm} {metric}"] = _over_seeds(metric, rows, measured.runs[arm], ())
            for first, second in PAIRS:
                estimated[f"{first} - {second} {metric}"] = _over_seeds(
                    metric, rows, measured.runs[first], measured.runs[second]
                )
        estimates = metrics.bootstrap(labels, np.zeros(len(rows)), estimated, groups=groups, replicates=replicates)
        compared[subset]["arms"] = {
            arm: {metric: asdict(estimates[f"{arm} {metric}"]) for metric in METRICS} for arm in ARMS
        }
        compared[subset]["differences"] = {
            f"{a} - {b}": {metric: asdict(estimates[f"{a} - {b} {metric}"]) for metric in METRICS} for a, b in PAIRS
        }
    return compared


def write_results(out: Path, part: RealPart, measured: EdgeCaseResults, plan: EdgePlan) -> str:
    """Write out/results.json and out/table.md; returns the table."""
    compared = compare(part, measured)
    content = {
        "plan": asdict(plan),
        "added": dict(measured.added),
        "edge_cases": dict(measured.reasons),
        "measured": compared,
    }
    write_file(out / RESULTS, (json.dumps(content, indent=2) + "\n").encode())
    text = markdown(compared, measured, plan)
    write_file(out / TABLE, text.encode())
    return text


def markdown(compared: Mapping[str, Any], measured: EdgeCaseResults, plan: EdgePlan) -> str:
    """Return the content of table.md."""
    added = ", ".join(f"{count:,} {name}" for name, count in measured.added.items())
    reasons = ", ".join(f"{count:,} {name}" for name, count in measured.reasons.items())
    lines = [
        "# Retraining with neighbours of edge cases",
        "",
        f"{plan.seeds} seeds; `random` and `neighbours` learn from {added} more. Test images that are edge cases of the "
        f"selection classifier: {reasons} (one image can have several reasons). In brackets 95 % intervals.",
    ]
    for metric in METRICS:
        better = "lower is better" if metric == "brier" else "higher is better"
        lines += ["", f"## {_TITLES[metric]} ({better})", ""]
        header = ["images", *ARMS, *(f"{a} - {b}" for a, b in PAIRS)]
        lines += [f"| | {' | '.join(header)} |", "| --- " * (len(header) + 1) + "|"]
        for subset in SUBSETS:
            row = compared[subset]
            cells = [subset, f"{row['images']:,} ({row['positive']:,} malignant)"]
            if "arms" in row:
                cells += [f"{row['arms'][arm][metric]['value']:.4f}" for arm in ARMS]
                cells += [_signed(row["differences"][f"{a} - {b}"][metric]) for a, b in PAIRS]
            else:
                cells += ["one class only"] + [""] * (len(header) - 2)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", NOTICE]) + "\n"


def _signed(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:+.4f} [{estimate['low']:+.4f}, {estimate['high']:+.4f}]"


def _over_seeds(
    metric: str, rows: NDArray[np.int64], runs: Sequence[TrainedRun], baseline: Sequence[TrainedRun]
) -> metrics.Metric:
    """Return the mean over seeds of a metric of `runs`, minus that of `baseline`. It draws seeds for each row of weights."""
    draws = np.random.default_rng(0)

    def value(labels: Labels, _: Floats, weights: Floats) -> Floats:
        by_seed = np.stack([_value(metric, labels, run, rows, weights) for run in runs])
        if baseline:
            by_seed -= np.stack([_value(metric, labels, run, rows, weights) for run in baseline])
        if len(weights) == 1 and (weights == 1).all():  # the estimate itself, not a replicate
            mean: Floats = by_seed.mean(axis=0)
            return mean
        seeds = draws.integers(0, len(runs), by_seed.shape)
        mean = np.take_along_axis(by_seed, seeds, axis=0).mean(axis=0)
        return mean

    return value


def _value(metric: str, labels: Labels, run: TrainedRun, rows: NDArray[np.int64], weights: Floats) -> Floats:
    measure: dict[str, metrics.Metric] = {
        "auc": metrics.auc,
        "balanced_accuracy": functools.partial(metrics.balanced_accuracy, threshold=run.threshold),
        "brier": metrics.brier,
    }
    return measure[metric](labels, run.calibrated[rows], weights)
