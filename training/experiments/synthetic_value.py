"""The effect of synthetic images on classifiers: the numbers of all scenarios, and their differences from the real baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dermis.files import write_file
from dermis.metrics import classification as metrics
from dermis.metrics.classification import Estimate, Floats, Labels
from training.classifier.data import RealPart
from training.data.splits import count_without_ids
from training.experiments.scenarios import BASELINE, PAPER, TABLE2, Scenario
from training.experiments.table import RESULTS, TABLE, markdown_table
from training.experiments.table2 import ScenarioRun

TITLES = {
    "accuracy": "Acc (%)",
    "auc": "AUC (%)",
    "balanced_accuracy": "balanced acc (%)",
    "sensitivity_at_90_specificity": "sens. at 90 % spec. (%)",
}
_RunMetric = Callable[[Labels, ScenarioRun, Floats | None], Floats]
_METRICS: Mapping[str, _RunMetric] = {
    "accuracy": lambda labels, run, w: metrics.accuracy(labels, run.calibrated, w),
    "auc": lambda labels, run, w: metrics.auc(labels, run.logits, w),
    "balanced_accuracy": lambda labels, run, w: metrics.balanced_accuracy(
        labels, run.calibrated, w, threshold=run.threshold
    ),
    "sensitivity_at_90_specificity": lambda labels, run, w: metrics.sensitivity_at_specificity(labels, run.logits, w),
}


@dataclass(frozen=True)
class Row:
    """The numbers of one scenario, from 0 to 1.

    Attributes:
        images: Number of training images.
        values: Means over the seeds by metric.
        by_seed: Values of each seed by metric.
        difference: Paired differences from the baseline by metric; None for the baseline itself.
    """

    scenario: Scenario
    seeds: tuple[int, ...]
    images: int
    values: Mapping[str, Estimate]
    by_seed: Mapping[str, tuple[float, ...]]
    difference: Mapping[str, Estimate] | None


def compare(
    runs: Mapping[str, Sequence[ScenarioRun]],
    images: Mapping[str, int],
    test: RealPart,
    *,
    replicates: int = metrics.REPLICATES,
) -> list[Row]:
    """Return a row for each scenario that has runs, in the table's order.

    Intervals (95 %) are for the mean over the seeds, by a bootstrap over the patients of the test part. For `difference`
    it draws the same patients for both scenarios. The spread over seeds is in `by_seed`.

    Args:
        runs: Finished runs by scenario.
        images: Number of training images by scenario.
        test: The test images.
        replicates: Number of bootstrap replicates.
    """
    rows = []
    for scenario in TABLE2:
        scenario_runs = runs.get(scenario.name, ())
        if not scenario_runs:
            continue
        estimated: dict[str, metrics.Metric] = {name: _mean(metric, scenario_runs) for name, metric in _METRICS.items()}
        baseline = runs.get(BASELINE, ()) if scenario.name != BASELINE else ()
        if baseline:
            estimated |= {
                f"difference:{name}": _difference(metric, scenario_runs, baseline) for name, metric in _METRICS.items()
            }
        estimates = metrics.bootstrap(
            test.labels, scenario_runs[0].calibrated, estimated, groups=test.groups, replicates=replicates
        )
        by_seed = {
            name: tuple(float(metric(test.labels, run, None)[0]) for run in scenario_runs)
            for name, metric in _METRICS.items()
        }
        values = {name: estimates[name] for name in _METRICS}
        difference = {name: estimates[f"difference:{name}"] for name in _METRICS} if baseline else None
        rows.append(
            Row(scenario, tuple(run.seed for run in scenario_runs), images[scenario.name], values, by_seed, difference)
        )
    return rows


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table, header first: numbers in percent with intervals in brackets, and the reported numbers."""
    by_name = {row.scenario.name: row for row in rows}
    header = ["", "images", *TITLES.values(), "AUC difference to real", "reported Acc", "reported AUC"]
    table = [header]
    for scenario in TABLE2:
        reported = [f"{scenario.accuracy:g}", f"{scenario.auc:g}"]
        row = by_name.get(scenario.name)
        if row is None:
            table.append([scenario.title, "not run", *[""] * (len(TITLES) + 1), *reported])
            continue
        numbers = [_percent(row.values[name]) for name in TITLES]
        table.append(
            [
                scenario.title,
                f"{row.images:,}",
                *numbers,
                _percent(row.difference["auc"], sign=True) if row.difference else "",
                *reported,
            ]
        )
    return table


def remarks(rows: Sequence[Row], possibly_leaked: Sequence[str], test: RealPart) -> list[str]:
    """Return paragraphs with notes on how to read the table.

    Args:
        rows: The rows.
        possibly_leaked: Titles of scenarios whose generator was possibly trained on test images.
        test: The test images.
    """
    seeds = sorted({len(row.seeds) for row in rows})
    alone = count_without_ids(test.groups)
    texts = [
        f"Measured on {len(test.labels):,} real images of {len(set(test.groups)):,} patients or lesions"
        f"{f' (of which {alone:,} are images without an id)' if alone else ''},"
        f" {int(test.labels.sum()):,} of them malignant, that no classifier was trained on. Means over"
        f" {' or '.join(map(str, seeds))} seeds; in brackets 95 % intervals over patients: the effect of drawing other"
        " patients from this collection. Differences are paired by patient."
    ]
    spread = [
        f"{row.scenario.title} {100 * min(row.by_seed['auc']):.1f} to {100 * max(row.by_seed['auc']):.1f}"
        for row in rows
        if len(row.seeds) > 1
    ]
    if spread:
        texts.append(f"AUC (%) from the worst to the best seed: {'; '.join(spread)}.")
    if possibly_leaked:
        texts.append(
            f"**{', '.join(possibly_leaked)}: the generator was not trained on exactly the training part, or its training"
            " images are not known. If these include images of the test part, the numbers are too high.**"
        )
    texts.append(
        f"Reported: {PAPER}, on other images, with EfficientNet-B2 at 256 px and all of 55,000 or 22,000 synthetic images."
    )
    return texts


def write_results(out: Path, rows: Sequence[Row], texts: Sequence[str]) -> None:
    """Write out/results.json and out/table.md."""
    content = {
        row.scenario.name: {
            "title": row.scenario.title,
            "images": row.images,
            "seeds": list(row.seeds),
            "values": {name: asdict(value) for name, value in row.values.items()},
            "by_seed": {name: list(values) for name, values in row.by_seed.items()},
            "less_real": None
            if row.difference is None
            else {name: asdict(value) for name, value in row.difference.items()},
            "reported_percent": {"accuracy": row.scenario.accuracy, "auc": row.scenario.auc},
        }
        for row in rows
    }
    write_file(out / RESULTS, (json.dumps({"scenarios": content, "remarks": list(texts)}, indent=2) + "\n").encode())
    table = markdown_table(cells(rows))
    write_file(out / TABLE, ("\n\n".join(["# Effect of synthetic images", table, *texts]) + "\n").encode())


def _mean(metric: _RunMetric, runs: Sequence[ScenarioRun]) -> metrics.Metric:
    def value(labels: Labels, _: Floats, weights: Floats) -> Floats:
        mean: Floats = np.mean([metric(labels, run, weights) for run in runs], axis=0)
        return mean

    return value


def _difference(metric: _RunMetric, runs: Sequence[ScenarioRun], baseline: Sequence[ScenarioRun]) -> metrics.Metric:
    mean, baseline_mean = _mean(metric, runs), _mean(metric, baseline)

    def value(labels: Labels, scores: Floats, weights: Floats) -> Floats:
        return mean(labels, scores, weights) - baseline_mean(labels, scores, weights)

    return value


def _percent(estimate: Estimate, *, sign: bool = False) -> str:
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]" if sign else f"{value:.1f} [{low:.1f}, {high:.1f}]"
