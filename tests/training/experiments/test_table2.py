"""Tests of table 2: every scenario trains, the table has the results of the runs, and a folder contains one experiment."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from commands.main import app
from dermis.bundle import Bundle
from dermis.errors import TrainingError
from dermis.metrics.classification import auc
from tiny import make_bundle
from tiny_skin import make_skin
from training.classifier.config import ClassifierConfig
from training.classifier.data import RealPart
from training.classifier.run import ClassifierData, ClassifierOrigin
from training.data.sources import Record
from training.data.splits import group_of
from training.experiments import table2
from training.experiments.scenarios import TABLE2
from training.experiments.synthetic_value import compare, remarks
from training.experiments.table2 import ScenarioRun, ScenarioTask, read_generators, run_tasks

SETTINGS = ("architecture=test_efficientnet", "batch=8", "epochs=1", "head_only=true", "rotation=0", "flips=false")


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_skin(tmp_path_factory.mktemp("data") / "skin", count=120)


def _run(skin: Path, out: Path, *more: object) -> Result:
    settings = [text for setting in SETTINGS for text in ("--set", setting)]
    fixed = ["--data", skin, "--out", out, "--resolution", 32, "--scale", 16 / 55_000, "--weights", "none", *settings]
    line = ["experiment", "table2", *fixed, "--device", "cpu", "--cache", out.parent / "cache", *more]
    result = CliRunner().invoke(app, list(map(str, line)), env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.full
def test_finished_scenarios_are_compared_and_not_repeated(
    skin: Path, tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "t2"
    generator_options = ("--generator", f"cgan={tiny_bundle.location}")
    first = _run(skin, out, *generator_options, "--seeds", "1")
    assert first.exit_code == 0, first.output
    assert "skipped, because no --generator is given: scenarios of cgan-no-color, gan" in first.output
    assert _run(skin, out, *generator_options, "--seeds", "2", "--only", "real").exit_code == 0
    results = json.loads((out / "results.json").read_text())["scenarios"]
    assert list(results) == ["real", "synth-cgan", "aug-cgan"]
    assert results["synth-cgan"]["images"] == 16 and results["aug-cgan"]["images"] == results["real"]["images"] + 6
    assert results["real"]["less_real"] is None
    for name, seeds in (("real", (0, 1)), ("aug-cgan", (0,))):
        scenario, aucs = results[name], []
        for seed in seeds:
            with (out / name / f"seed-{seed}" / "predictions.csv").open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if row["part"] == "test"]
            labels = np.array([int(row["label"]) for row in rows])
            aucs.append(float(auc(labels, np.array([float(row["logit"]) for row in rows]))[0]))
        assert scenario["by_seed"]["auc"] == pytest.approx(aucs)
        assert scenario["values"]["auc"]["value"] == pytest.approx(np.mean(aucs))
    gain = results["aug-cgan"]["less_real"]["auc"]
    difference = results["aug-cgan"]["values"]["auc"]["value"] - results["real"]["values"]["auc"]["value"]
    assert gain["value"] == pytest.approx(difference) and gain["low"] <= gain["value"] <= gain["high"]
    table = (out / "table.md").read_text()
    assert "| synth-cGAN w/o color | not run |" in table and "| 94.7 | 96.7 |" in table
    assert "synth-cGAN, aug-cGAN: the generator was not trained on exactly the training part" in table

    monkeypatch.setattr(table2, "train_classifier", None)  # finished runs are not trained again
    assert _run(skin, out, *generator_options, "--seeds", "1").output.count("done already") == 3
    with pytest.raises(TrainingError, match="was started with epochs 1, not 2"):
        _run(skin, out, *generator_options, "--set", "epochs=2")
    with pytest.raises(TrainingError, match="synth-cgan was started with other images"):
        _run(skin, out, *generator_options, "--truncation-psi", "0.5")


@pytest.mark.full
def test_stopped_experiment_resumes_with_unfinished_runs(
    skin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calls = table2.train_classifier, []

    def stopping(*args: Any, **options: Any) -> Any:
        calls.append(args[2].name)
        return None if len(calls) == 2 else train(*args, **options)

    monkeypatch.setattr(table2, "train_classifier", stopping)
    stopped = _run(skin, tmp_path / "t2", "--seeds", "2")
    assert stopped.exit_code == 130 and "run the same command again" in stopped.output
    assert not (tmp_path / "t2" / "table.md").exists()
    done = _run(skin, tmp_path / "t2", "--seeds", "2")
    assert done.exit_code == 0 and calls == ["seed-0", "seed-1", "seed-1"]


@pytest.mark.parametrize(("stopped", "trained"), [(False, ["seed-0", "seed-1"]), (True, ["seed-0"])])
def test_other_ranks_stop_only_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool, trained: list[str]
) -> None:
    """On them `train_classifier` returns None in any case; if they stopped then, the first rank would wait for them."""
    calls: list[str] = []
    monkeypatch.setattr(table2, "train_classifier", lambda data, config, out, **_: calls.append(out.name))
    ranks: Any = SimpleNamespace(first=False, any=lambda flag: flag or stopped)
    task = ScenarioTask(TABLE2[0], cast(ClassifierData, SimpleNamespace(training=[])))
    origin = ClassifierOrigin("", "", "", "")
    done = run_tasks(
        tmp_path,
        [task],
        ClassifierConfig(),
        [0, 1],
        weights="none",
        origin=origin,
        ranks=ranks,
        report=lambda text: None,
    )
    assert done is not stopped and calls == trained and not list(tmp_path.iterdir())


def test_invalid_table2_option_is_refused_by_name(skin: Path, tmp_path: Path, tiny_bundle: Bundle) -> None:
    for more, message in (
        (("--generator", tiny_bundle.location), "--generator .*: must be NAME=SOURCE"),
        (("--generators", tmp_path), "has no finished experiment of table1"),
        (("--only", "nothing"), "--only: nothing is none of real, synth-gan"),
        (("--set", "size=8"), "--set size: give --resolution"),
        (("--set", "colour=8"), "--set colour: unknown option; known are architecture"),
    ):
        with pytest.raises(TrainingError, match=message):
            _run(skin, tmp_path / "t2", *more)
    assert _run(skin, tmp_path / "t2", "--kimg", "1").exit_code == 2, "an option of another experiment"
    assert not (tmp_path / "t2").exists()


def test_generators_of_table1_are_found(tmp_path: Path) -> None:
    for name in ("cgan", "ben-gan", "mal-gan"):
        make_bundle(tmp_path / name / "bundle")
    generators = read_generators(["cgan=elsewhere"], tmp_path)
    assert {source.class_name for source in generators["gan"]} == {"benign", "malignant"}
    assert [source.location for source in generators["cgan"]] == ["elsewhere"], "a named generator takes precedence"
    assert "cgan-no-color" not in generators


def test_a_planted_gain_is_found_with_its_interval() -> None:
    """The baseline ranks at random, the other scenario perfectly: AUC rises from about a half to 1."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 200)
    groups = tuple(f"p{i // 2}" for i in range(400))
    test = RealPart(np.empty((400, 1, 1, 3), np.uint8), labels, groups, groups, {}, "")
    noise = [rng.normal(size=400) for _ in range(2)]
    blind = [ScenarioRun(k, n, np.full(400, 0.3), 0.5) for k, n in enumerate(noise)]
    sharp = [ScenarioRun(0, labels * 10.0 + noise[0], labels * 0.9, 0.5)]
    real, augmented = compare({"real": blind, "aug-cgan": sharp}, {"real": 1, "aug-cgan": 2}, test, replicates=200)
    assert real.difference is None and real.values["accuracy"].value == 0.5
    assert augmented.difference is not None and augmented.values["auc"].value == 1
    assert augmented.difference["auc"].low > 0.4 and augmented.difference["auc"].value == 1 - real.values["auc"].value
    assert [row.scenario.name for row in (real, augmented)] == ["real", "aug-cgan"]
    assert {scenario.auc for scenario in TABLE2} == {98.8, 94.2, 96.7, 92.7, 98.6}


def test_remarks_state_test_images_without_an_id() -> None:
    records = [Record(str(i), "", f"P{i // 2}" if i < 6 else "", "", None, {}) for i in range(10)]
    groups = tuple(group_of(records))
    test = RealPart(np.empty((10, 1, 1, 3), np.uint8), np.repeat([0, 1], 5), groups, groups, {}, "")
    text = "10 real images of 7 patients or lesions (of which 4 are images without an id), 5 of them malignant"
    assert text in remarks([], [], test)[0]
