"""Tests of retraining with neighbours of edge cases: the comparison equals planted results, and the run resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dermis.errors import TrainingError
from dermis.explain.edge_cases import Criteria
from tiny import make_bundle
from tiny_skin import make_skin
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealPart, load_real
from training.experiments.edge_case_runs import TrainedRun
from training.experiments.edge_case_table import compare, markdown, write_results
from training.experiments.edge_cases import EdgeCaseResults, EdgePlan, run_edge_cases

N = 400


def planted() -> tuple[RealPart, EdgeCaseResults]:
    """Every fourth image an edge case, where `neighbours` is right more often; elsewhere all arms have the same predictions."""
    rng = np.random.default_rng(0)
    labels = (np.arange(N) % 5 == 0).astype(np.int64)
    edge = np.arange(N) % 4 == 0
    part = RealPart(
        np.zeros((N, 1, 1, 3), np.uint8),
        labels,
        tuple(map(str, range(N))),
        tuple(str(i // 2) for i in range(N)),
        {},
        "0",
    )

    def run(seed: int, gain: float) -> TrainedRun:
        base = np.random.default_rng(seed).normal(size=N)
        logits = base + np.where(edge, gain, 1.0) * (2 * labels - 1)
        return TrainedRun(None, 0.0, 1.0, 0.5, 1 / (1 + np.exp(-logits)))  # type: ignore[arg-type]

    runs = {
        arm: [run(seed, gain) for seed in range(4)]
        for arm, gain in (("real", 0.0), ("random", 0.0), ("neighbours", 1.0))
    }
    assert rng is not None
    return part, EdgeCaseResults(edge, {"misclassified": 100}, {"benign": 3, "malignant": 4}, runs)


def test_gain_is_measured_only_on_planted_edge_cases() -> None:
    part, measured = planted()
    comparison = compare(part, measured, replicates=200)
    assert {name: row["images"] for name, row in comparison.items()} == {"edge cases": 100, "the rest": 300, "all": 400}
    gain = comparison["edge cases"]["differences"]
    for pair in ("neighbours - real", "neighbours - random"):
        assert gain[pair]["auc"]["low"] > 0.1
        assert gain[pair]["balanced_accuracy"]["low"] > 0
        assert gain[pair]["brier"]["high"] < 0
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert gain["random - real"]["auc"] == zero  # the same predictions, patients and seeds
    assert comparison["the rest"]["differences"]["neighbours - real"]["auc"] == zero
    arms = comparison["edge cases"]["arms"]
    difference = arms["neighbours"]["auc"]["value"] - arms["real"]["auc"]["value"]
    assert gain["neighbours - real"]["auc"]["value"] == pytest.approx(difference)


def test_intervals_include_variation_of_seeds() -> None:
    """Runs that disagree widen the interval: one half of them is inverted."""
    part, measured = planted()
    run = measured.runs["real"][0]
    inverted = dataclasses.replace(run, calibrated=1 - run.calibrated)
    width = []
    for runs in ([run] * 4, [run, inverted] * 2):
        each = dataclasses.replace(measured, runs=dict.fromkeys(measured.runs, runs))
        estimate = compare(part, each, replicates=300)["the rest"]["arms"]["real"]["auc"]
        width.append(estimate["high"] - estimate["low"])
    assert width[1] > 2 * width[0]


def test_table_marks_subset_of_one_class(tmp_path: Path) -> None:
    part, measured = planted()
    benign = dataclasses.replace(measured, edge=measured.edge & (part.labels == 0))
    text = markdown(compare(part, benign, replicates=20), benign, EdgePlan())
    assert "one class only" in text
    assert "Not a medical device" in text
    text = write_results(tmp_path, part, benign, EdgePlan())
    assert "one class only" in text
    assert (tmp_path / "table.md").read_text() == text
    assert json.loads((tmp_path / "results.json").read_text())["plan"]["distance"] == 0.1


def test_invalid_plans_are_refused() -> None:
    for change in ({"seeds": 1}, {"generate": 3}, {"count": 0}, {"cases": 1}):
        with pytest.raises(TrainingError, match=next(iter(change))):
            EdgePlan(**change)  # type: ignore[arg-type]


@pytest.mark.full
def test_edge_case_run_resumes_and_refuses_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import training.experiments.edge_case_runs as runs

    skin, bundle = make_skin(tmp_path / "skin"), make_bundle(tmp_path / "bundle")
    real = load_real(skin, 32, cache=tmp_path / "cache", progress=False)
    config = ClassifierConfig(
        "tf_efficientnet_lite0", size=32, epochs=2, batch=16, rotation=0, flips=False, head_only=True
    )
    plan = EdgePlan(generate=40, cases=6, count=2, seeds=2, criteria=Criteria(neighbours=5))
    trained: list[Path] = []
    real_train = runs.train

    def train(*args, **options):  # type: ignore[no-untyped-def]
        trained.append(args[4])
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real_train(*args, **options)

    def run(out: str, change: EdgePlan = plan) -> EdgeCaseResults | None:
        return run_edge_cases(
            real,
            bundle,
            config,
            change,
            tmp_path / out,
            weights="none",
            device="cpu",
            target=torch.device("cpu"),
            cache=tmp_path / "cache",
            progress_bar=False,
        )

    monkeypatch.setattr(runs, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run("a")
    monkeypatch.setattr(runs, "train", real_train)
    resumed, whole = run("a"), run("b")
    assert resumed is not None
    assert whole is not None
    assert resumed.added == whole.added
    assert sum(whole.added.values()) == 12
    for arm in ("real", "random", "neighbours"):
        assert len(whole.runs[arm]) == 2
        for first, second in zip(resumed.runs[arm], whole.runs[arm], strict=True):
            assert (first.calibrated == second.calibrated).all()
    assert (tmp_path / "b" / "edge-cases.csv").is_file()
    assert (tmp_path / "b" / "neighbours" / "neighbours.json").is_file()
    text = write_results(tmp_path / "b", real.test, whole, plan)
    assert "edge cases" in text
    with pytest.raises(TrainingError, match=r"distance 0\.1, not 0\.2"):
        run("a", dataclasses.replace(plan, distance=0.2))
    more = run("a", dataclasses.replace(plan, seeds=3))
    assert more is not None
    assert len(more.runs["real"]) == 3
