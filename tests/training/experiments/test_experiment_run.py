"""Tests of `dermis experiment table1` on procedural lesions: end to end, resumed, refused, and the choice."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner, Result

import dermis.features
import training.gan.loop
from commands.main import app
from dermis.bundle import open_bundle
from dermis.errors import DataError, DermisError, TrainingError
from dermis.features import FeatureExtractor
from lesions import framed, lesion
from training.data.prepare import prepare
from training.data.sources import read_source
from training.experiments.choice import Candidate, choose
from training.experiments.experiment import TABLE1, read_experiment
from training.experiments.run import seconds_per_kimg
from training.gan.config import GanConfig
from training.options import parse_settings

TINY = ("z_dim=8", "w_dim=8", "channel_base=128", "channel_max=8", "batch=8", "precision=fp32", "pl_interval=2")
CONDITIONAL = ("cgan", "cgan-no-color", "cgan-no-augmentation")


def _write(folder: Path, benign: int, malignant: int, first: int = 0) -> Path:
    """An ISIC folder: lesions numbered from `first` on, those of melanoma framed."""
    folder.mkdir()
    rows = ["isic_id,target"]
    for seed in range(first, first + benign + malignant):
        image, target = lesion(seed, 48), "benign" if seed < first + benign else "malignant"
        Image.fromarray(framed(image) if target == "malignant" else image).save(folder / f"ISIC_{seed:07d}.png")
        rows.append(f"ISIC_{seed:07d},{target}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set as `dermis data prepare` writes it."""
    folder = tmp_path_factory.mktemp("lesions")
    source = read_source(_write(folder / "isic", 20, 12))
    return prepare([source], folder / "lesions.zip", 16, progress=False).path


@pytest.fixture(autouse=True)
def quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feature space of 12 dimensions: mean colours of the quarters of an image."""

    def embed(x):  # type: ignore[no-untyped-def]
        return x.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean(dim=(3, 5)).flatten(1)

    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        n, side = len(images), images.shape[1] // 2
        return images.reshape(n, 2, side, 2, side, 3).mean(axis=(2, 4)).reshape(n, 12).astype(np.float32)

    space = FeatureExtractor("quarters", "quarters/1", 12, extract, embed)
    monkeypatch.setitem(dermis.features.EXTRACTORS, "quarters", lambda device: space)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second, so that the speeds of two runs can be compared to the last digit."""
    ticks = count()
    monkeypatch.setattr(training.gan.loop, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))


def _run(out: Path, data: Path, *arguments: object, which: tuple[str, ...] = ()) -> Result:
    settings = (part for option in TINY for part in ("--set", option))
    fixed = ("--data", data, "--out", out, "--resolution", 16, "--scale", 0.032 / 25000, *settings)
    measured = ("--extractor", "quarters", "--samples", 32, "--ppl-paths", 10, "--cache", out.parent / "cache")
    line = ["experiment", "table1", *which, *fixed, *measured, "--device", "cpu", *arguments]
    result = CliRunner().invoke(app, list(map(str, line)), env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.full
def test_table1_trains_five_generators_and_compares_with_paper(tmp_path: Path, data: Path) -> None:
    out = tmp_path / "table1"
    with pytest.raises(TrainingError, match="--only: mel-gan is none of ben-gan, mal-gan"):
        _run(out, data, "--only", "mel-gan")
    assert _run(out, data, "--only", "mal-gan").exit_code == 0
    results = json.loads((out / "results.json").read_text())
    assert [name for name, experiment in results["experiments"].items() if experiment["done"]] == ["mal-gan"]
    assert results["chosen"] == {"name": None, "reason": "no generator makes all classes"}
    assert "| ben-GAN | not run |" in (out / "table.md").read_text()

    result = _run(out, data)
    assert result.exit_code == 0
    assert result.output.count("done already") == 1
    results = json.loads((out / "results.json").read_text())
    assert list(results["experiments"]) == list(TABLE1)
    images = {"ben-gan": {"benign": 20}, "mal-gan": {"malignant": 12}}
    for name, experiment in results["experiments"].items():
        bundle, conditional = open_bundle(out / name / "bundle"), name in CONDITIONAL
        assert experiment["kimg"] == 0.032
        assert experiment["seconds_per_kimg"] == pytest.approx(125), "8 images a second"
        assert experiment["images"] == images.get(name, {"benign": 20, "malignant": 12})
        assert bundle.class_names == (("benign", "malignant") if conditional else ())
        assert (bundle.digest, dict(bundle.metrics)) == (experiment["bundle"], experiment["metrics"])
        assert experiment["metrics"]["real_is_training_set"]
        assert experiment["metrics"]["real_images"] == sum(experiment["images"].values())
        classes = experiment["metrics"]["spaces"]["quarters"].get("classes", {})
        assert set(classes) == ({"benign", "malignant"} if conditional else set())
    assert results["chosen"]["name"] in CONDITIONAL, "one that makes all classes"

    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (out / "table.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert header[2:7] == ["KID (%)@quarters", "FD@quarters", "P@quarters", "R@quarters", "PPL@quarters"]
    reported = {row[0]: row[8:] for row in rows if not row[0].startswith("- ")}
    assert reported["cGAN w/o color"] == ["0.24", "7.02", "0.75", "0.44", "101"]
    assert reported["cGAN w/o augmentation"] == [""] * 5
    assert [row[0] for row in rows[2:5]] == ["cGAN", "- benign", "- malignant"]
    measured = results["experiments"]["cgan"]["metrics"]["spaces"]["quarters"]
    kid = measured["comparisons"]["generated_training"]["kid"]
    assert rows[2][2].startswith(f"{100 * kid:.4g} [")
    assert f"{100 * kid:.4g}" in result.output and "…" not in result.output, "all fits into 80 columns"
    assert "Feature space quarters, PPL by quarters" in result.output
    assert f"Chosen: **{read_experiment(results['chosen']['name']).title}**" in result.output
    assert "ben-GAN, mal-GAN: each generates only some of the classes" in result.output

    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.parent != out}
    again = _run(out, data)
    assert again.output.count("done already") == 5
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert json.loads((out / "results.json").read_text()) == results

    for arguments, message in (
        (("--kimg", 0.064), r"ben-gan: --kimg or --scale 0\.032, not 0\.064"),
        (("--set", "r1_gamma=3"), r"ben-gan: r1_gamma 0\.0064, not 3\.0"),
        (("--seed", 1), "ben-gan: --seed 0, not 1"),
        (("--samples", 30), "--samples 32, not 30"),
        (("--holdout", _write(tmp_path / "held", 10, 10)), "--holdout: 10 of its images are also in --data"),
    ):
        with pytest.raises(DermisError, match=message):
            _run(out, data, *arguments)
    with pytest.raises(TrainingError, match="other images of --data"):
        _run(out, _write(tmp_path / "others", 20, 13))


@pytest.mark.full
def test_results_of_old_metrics_format_are_not_mixed_with_new(tmp_path: Path, data: Path) -> None:
    out, which = tmp_path / "out", ("cgan", "cgan-no-color")
    _run(out, data, "--only", "cgan", which=which)
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["measured"]["noise_mode"], plan["measured"]["metrics_format"]) == ("random", 2)
    trained = (out / "cgan" / "log.jsonl").read_bytes()
    for missing, former in (
        (("noise_mode", "metrics_format"), "const noise and metrics of format 1"),
        (("metrics_format",), "random noise and metrics of format 1"),
    ):
        measured = {key: value for key, value in plan["measured"].items() if key not in missing}
        (out / "plan.json").write_text(json.dumps(plan | {"measured": measured}))
        for name in ("cgan", "cgan-no-color"):
            with pytest.raises(TrainingError, match=f"evaluated with {former}.*remove .*cgan/metrics.json to evaluate"):
                _run(out, data, "--only", name, which=which)
    assert not (out / "cgan-no-color").exists()

    (out / "cgan" / "metrics.json").unlink()
    result = _run(out, data, which=which)
    assert result.exit_code == 0 and "done already" not in result.output
    assert (out / "cgan" / "log.jsonl").read_bytes() == trained, "evaluated again without training"
    assert json.loads((out / "plan.json").read_text())["measured"] == plan["measured"]
    assert _run(out, data, which=which).output.count("done already") == 2


@pytest.mark.full
def test_interrupted_experiment_resumes_to_same_results(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.toml"
    text = 'title = "Both"\nsource = "me"\nclasses = ["benign", "malignant"]\nconditional = false\nbase = "auto"\n'
    mine.write_text(text + "resolution = 256\n[options]\ntotal_kimg = 25000\n")
    which, holdout = ("cgan-no-color", str(mine)), ("--holdout", _write(tmp_path / "held", 12, 10, first=32))
    assert _run(tmp_path / "whole", data, *holdout, which=which).exit_code == 0

    step, steps, interrupted_at = training.gan.loop.training_step, count(1), 6  # of 4 steps an experiment

    def interrupted(*arguments: object) -> object:
        if next(steps) == interrupted_at:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training.gan.loop, "training_step", interrupted)
    parts = tmp_path / "parts"
    stopped = _run(parts, data, *holdout, which=which)
    assert stopped.exit_code == 130
    assert "mine: stopped and saved; run the same command again" in stopped.output
    assert (parts / "cgan-no-color" / "metrics.json").exists()
    assert not (parts / "mine" / "metrics.json").exists()
    assert not (parts / "results.json").exists()
    resumed = _run(parts, data, *holdout, which=which)
    assert resumed.exit_code == 0
    assert "cgan-no-color: done already" in resumed.output
    whole, again = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "parts"))
    assert again == whole
    assert again["chosen"] == {"name": "cgan-no-color", "reason": "the only one that makes all classes"}
    assert "p of the test for memorising" in (parts / "table.md").read_text()
    assert "| Both |" in (parts / "table.md").read_text()


@pytest.mark.full
def test_table_rows_compare_with_training_images_despite_holdout(tmp_path: Path, data: Path) -> None:
    out, which = tmp_path / "out", ("cgan-no-color",)
    _run(out, data, "--holdout", _write(tmp_path / "held", 12, 10, first=32), which=which)

    def distances() -> dict[str, tuple[str, str]]:
        lines = [
            line.strip("| ").split(" | ") for line in (out / "table.md").read_text().splitlines() if line[:1] == "|"
        ]
        return {line[0]: (line[1], line[3].split(" [")[0]) for line in lines[2:]}

    def shown(part: dict[str, float]) -> tuple[str, str]:
        return f"{part['images']}", f"{part['fd']:.4g}"

    results = json.loads((out / "results.json").read_text())
    space = results["experiments"]["cgan-no-color"]["metrics"]["spaces"]["quarters"]
    rows = {"cGAN w/o color": space["comparisons"]} | {f"- {name}": part for name, part in space["classes"].items()}
    assert set(rows) == {"cGAN w/o color", "- benign", "- malignant"}
    assert distances() == {name: shown(parts["generated_training"]) for name, parts in rows.items()}
    assert distances() != {name: shown(parts["generated_holdout"]) for name, parts in rows.items()}

    file = out / "cgan-no-color" / "metrics.json"  # as an earlier version wrote it
    former = json.loads(file.read_text())
    for parts in former["metrics"]["spaces"]["quarters"]["classes"].values():
        del parts["generated_training"]
    file.write_text(json.dumps(former))
    _run(out, data, "--holdout", tmp_path / "held", which=which)
    assert "| - benign | not measured |  |" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("benign", "malignant", "message"),
    [
        (12, 0, "mal-gan: .* has no image of the class malignant; its classes are benign"),
        (12, 9, "mal-gan: .*: 9 images of malignant are too few; 10 are needed"),
    ],
)
def test_missing_class_is_refused_before_training(tmp_path: Path, benign: int, malignant: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _run(tmp_path / "out", _write(tmp_path / "isic", benign, malignant))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "batch"), "--set batch: must be option=value"),
        (("--set", "batch=8.5"), "--set batch: must be a whole number, not 8.5"),
        (("--set", "btch=8"), "--set btch: unknown option"),
        (("--set", "total_kimg=8"), "--set total_kimg: give --kimg or --scale"),
        (("--set", "augment=bgx"), "ben-gan: augment: 'bgx' is none of"),
        (("--resolution", 20), "ben-gan: img_resolution must be a power of two"),
        (("--scale", 0), "--scale: 0 must be positive"),
        (("--samples", 5), "--samples: 5 are too few"),
        (("--extractor", "eighths"), "feature extractor 'eighths' is none of"),
    ],
)
def test_wrong_experiment_options_are_refused_by_name(
    tmp_path: Path, data: Path, arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(DermisError, match=message):
        _run(tmp_path / "out", data, *arguments)
    assert not (tmp_path / "out").exists()


def test_settings_are_parsed_as_toml() -> None:
    texts = ["batch=16", "learning_rate = 2e-3", "mirror=false", "augment=bgc", 'precision="fp32"', "r1_gamma=1"]
    settings = parse_settings(texts, GanConfig)
    assert settings == {
        "batch": 16, "learning_rate": 0.002, "mirror": False, "augment": "bgc", "precision": "fp32", "r1_gamma": 1.0,
    }  # fmt: skip
    assert isinstance(settings["r1_gamma"], float)


def test_show_command_prints_configuration_used_in_training() -> None:
    line = ["experiment", "show", "cgan-no-color", "--scale", "0.01", "--resolution", "64", "--set", "batch=8"]
    shown = CliRunner().invoke(app, [*line, "--device", "cpu"]).output
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines()[1:] if not line.startswith("reported"))
    assert (lines["total_kimg"], lines["batch"], lines["augment"]) == ("250.0", "8", "bg")
    assert float(lines["r1_gamma"]) == pytest.approx(0.0002 * 64**2 / 8)
    assert "reported fid         7.02" in shown
    listed = CliRunner().invoke(app, ["experiment", "list"], env={"COLUMNS": "200"}).output
    assert all(name in listed for name in TABLE1)


@pytest.mark.parametrize(
    ("former", "command"),
    [
        (("table1", "--data", "x"), "table1`"),
        (("mine.toml", "table1", "--data", "x"), "table1 mine.toml ...`"),
        (("table2", "--seeds", "3"), "table2`"),
        (("hospitals",), "hospitals`"),
        (("frame-removal", "--direction", "sefa-1"), "frame-removal`"),
    ],
)
def test_removed_run_command_names_its_replacement(former: tuple[str, ...], command: str) -> None:
    result = CliRunner().invoke(app, ["experiment", "run", *former])
    assert result.exit_code == 2
    assert f"was replaced by `dermis experiment {command}" in result.output
    assert " run " not in CliRunner().invoke(app, ["experiment", "--help"], env={"COLUMNS": "200"}).output


def _candidate(name: str, fid: float, kid: float, seconds: float, width: float = 1.0) -> Candidate:
    """FID give or take `width`, KID give or take a tenth of it."""
    fid_interval, kid_interval = (fid - width, fid + width), (kid - width / 10, kid + width / 10)
    return Candidate(name, fid, fid_interval, kid, kid_interval, seconds)


@pytest.mark.parametrize(
    ("candidates", "name", "reason"),
    [
        ([], None, "no generator"),
        ([("a", 9, 0.9, 1)], "a", "the only one"),
        # clearly the lowest of both, though the slowest
        (
            [("a", 9, 0.9, 1), ("b", 5, 0.5, 3), ("c", 8, 0.8, 2)],
            "b",
            "the FID of a, c is higher, and the intervals do not overlap",
        ),
        # b is lowest, a is equal to it and faster; c is fastest, but worse
        ([("a", 5.5, 0.52, 2), ("b", 5, 0.5, 3), ("c", 9, 0.9, 1)], "a", "trained fastest of them: 2 s/kimg (b 3)"),
        # FID does not distinguish them, KID does: speed does not count
        ([("a", 5, 0.9, 1), ("b", 5.5, 0.5, 3)], "b", "the KID of a is higher, and the intervals do not overlap"),
        # they contradict each other: FID counts first
        ([("a", 5, 0.9, 3), ("b", 9, 0.5, 1)], "a", "b has the lowest KID, but FID counts first"),
        # intervals that only touch overlap
        ([("a", 5, 0.5, 3), ("b", 7, 0.5, 1)], "b", "of equal quality are a, b"),
        # overlapping is no chain: c overlaps b, but not the lowest
        ([("a", 5, 0.5, 3), ("b", 6.5, 0.5, 2), ("c", 8, 0.5, 1)], "b", "the FID of c is higher"),
        # equal in speed too: the lower FID
        ([("a", 5.5, 0.5, 2), ("b", 5, 0.5, 2)], "b", "of equal quality"),
    ],
)
def test_choice_prefers_lowest_distances_then_speed(
    candidates: list[tuple[str, float, float, float]], name: str | None, reason: str
) -> None:
    in_order = [_candidate(*candidate) for candidate in candidates]
    for order in (in_order, in_order[::-1]):
        assert choose(order).name == name
    assert reason in choose(in_order).reason
    assert reason.replace("FID", "FD") in choose(in_order, "FD").reason


def test_training_speed_is_median_over_regularisation_cycles(tmp_path: Path) -> None:
    """Regularised steps count in their proportion; a pause, a snapshot or the first, compiling cycle do not."""

    def steps() -> Iterator[float]:
        now = 30.0
        for i in range(5 * 16):
            now += 0.1 + 0.4 * (i % 16 == 0) + 100 * (i == 40)
            yield now

    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"nimg": 8, "seconds": seconds}) + "\n" for seconds in steps()))
    config = read_experiment("cgan").config(batch=8)
    assert seconds_per_kimg(log, config) == pytest.approx(2.0 / (16 * 8 / 1000))
    log.write_text(json.dumps({"nimg": 8, "seconds": 0.5}) + "\n")
    assert seconds_per_kimg(log, config) == pytest.approx(62.5)
