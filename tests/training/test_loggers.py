"""Tests of the loggers of a training: what they store, what they never store, and that their failure ends no training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dermis.errors import TrainingError
from dermis.image_metadata import ImageOrigin
from dermis.imaging import encode
from training.loggers import Loggers, check_loggers, open_loggers, without_secrets

SECRET = "s3cr3t-value"
PICTURE = encode(np.full((8, 8, 3), 200, np.uint8), origin=ImageOrigin("demo"))


class Broken:
    """A logger that fails at a step."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.calls += 1
        if step >= self.at:
            raise ConnectionError(f"https://me:{SECRET}@mlflow.example/api is down, key {SECRET}\nmore")

    def image(self, name: str, png: bytes, step: int) -> None:
        self.calls += 1

    def close(self) -> None:
        raise OSError("disk full")


class Kept:
    def __init__(self) -> None:
        self.points: list[tuple[dict[str, float], int]] = []

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.points.append((dict(values), step))

    def image(self, name: str, png: bytes, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def test_failing_logger_is_left_out_with_one_warning_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    warnings: list[str] = []
    broken, kept = Broken(at=2), Kept()
    with Loggers({"mlflow": lambda: broken, "tensorboard": lambda: kept}, warnings.append) as loggers:
        for step in (1, 2, 3):
            loggers.scalars({"loss": 0.5}, step)
    assert broken.calls == 2 and [step for _, step in kept.points] == [1, 2, 3]
    assert warnings == [
        "warning: --log mlflow: https://***@mlflow.example/api is down, key *** more; the training continues without it"
    ]


def test_logger_that_cannot_be_opened_or_closed_ends_nothing() -> None:
    def fail() -> Any:
        raise ConnectionError("no server")

    warnings: list[str] = []
    with Loggers({"mlflow": fail, "wandb": lambda: Broken(at=9)}, warnings.append) as loggers:
        assert loggers
    assert [text.split(":")[1].strip() for text in warnings] == ["--log mlflow", "--log wandb"]


def test_names_and_packages_are_checked_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="--log: neptune is none of tensorboard, mlflow, wandb"):
        check_loggers(["neptune"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"--log mlflow: needs the package mlflow: pip install"):
        check_loggers(["mlflow"])


def test_short_values_of_the_environment_are_not_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "a")
    assert without_secrets(ValueError("a bad value")) == "a bad value"


def write_run(name: str, out: Path, step: int) -> None:
    with open_loggers([name], out, step, {"seed": 7, "batch": 16}) as loggers:
        assert loggers
        loggers.scalars({"loss/G": 0.25, "loss/D": 1.5}, step + 10)
        loggers.image("samples", PICTURE, step + 10)
        assert loggers, "no logger has failed"


@pytest.mark.full
def test_mlflow_run_is_continued_in_the_file_of_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for step in (0, 10):
        write_run("mlflow", tmp_path, step)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("dermis").experiment_id])
    assert run.data.params == {"seed": "7", "batch": "16"} and run.info.status == "FINISHED"
    assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "loss/G")] == [
        (10, 0.25),
        (20, 0.25),
    ]
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "mlflow").rglob("*.png")}
    assert pictures == {"000000010.png": PICTURE, "000000020.png": PICTURE}  # with its metadata
    assert not any(str(tmp_path) in value for value in run.data.tags.values())


@pytest.mark.full
def test_wandb_writes_offline_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setattr("sys.argv", ["dermis", "--password", SECRET])
    write_run("wandb", tmp_path, 0)
    files = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    (run,) = [path.read_bytes() for path in files if path.suffix == ".wandb"]
    assert all(name in run for name in (b"loss/G", b"loss/D", b"samples", b"batch", b"seed"))
    assert [path.read_bytes() for path in files if path.suffix == ".png"] == [PICTURE]
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    kept = (tmp_path / "wandb-run").read_text()
    write_run("wandb", tmp_path, 10)
    assert (tmp_path / "wandb-run").read_text() == kept
