"""A training with `--log mlflow` against a real MLflow server, read through the server's REST interface.

MLFLOW_SERVER names the program `mlflow` of the package mlflow, in an environment of its own; mlflow-skinny has no server.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from benchmarks.components import free_port
from lesions import lesion

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        "MLFLOW_SERVER" not in os.environ, reason="MLFLOW_SERVER names no program with an MLflow server"
    ),
]
OPTIONS = ("--resolution", 8, "--channel-base", 64, "--channel-max", 8, "--z-dim", 8, "--w-dim", 8, "--batch", 2)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a new server, running, whose clients send it pictures."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    (tmp_path / "server").mkdir()
    places = ("--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "artifacts")
    process = subprocess.Popen(
        [os.environ["MLFLOW_SERVER"], "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *places],
        cwd=tmp_path / "server",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not _is_healthy(address):
            assert process.poll() is None and time.monotonic() < deadline, "mlflow server does not start"
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_healthy(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=10, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_runs_of_trainings_have_their_options_curves_and_pictures(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    def ask(route: str, **query: Any) -> Any:
        if route.endswith("search"):
            return httpx.post(f"{server}/api/2.0/mlflow/{route}", json=query, trust_env=False).raise_for_status().json()
        return httpx.get(f"{server}/api/2.0/mlflow/{route}", params=query, trust_env=False).raise_for_status().json()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "lesions")
    data, out = tmp_path / "data", tmp_path / "first-run"
    for index in range(8):
        (data / ("benign", "malignant")[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(lesion(index, 16)).save(data / ("benign", "malignant")[index % 2] / f"{index}.png")
    common = (
        "--data",
        data,
        "--out",
        out,
        "--cache",
        tmp_path / "cache",
        "--device",
        "cpu",
        "--log",
        "mlflow",
        *OPTIONS,
    )
    for options in (("--kimg", 0.08), ("--kimg", 0.12, "--resume")):
        status, _, err = run("train", "gan", *common, *options)
        assert status == 0 and "warning: --log" not in err, err

    experiment = ask("experiments/get-by-name", experiment_name="lesions")["experiment"]["experiment_id"]
    (found,) = ask("runs/search", experiment_ids=[experiment])["runs"]
    assert found["info"]["run_name"] == "first-run" and found["info"]["status"] == "FINISHED"
    parameters = {entry["key"]: entry["value"] for entry in found["data"]["params"]}
    config = json.loads((out / "config.json").read_text())
    assert parameters["batch"] == str(config["batch"]) == "2" and parameters["seed"] == "0"
    run_id = found["info"]["run_id"]
    curves = {entry["key"] for entry in found["data"]["metrics"]}
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"loss/G", "loss/D"} <= curves, curves
    points = ask("metrics/get-history", run_id=run_id, metric_key="loss/D")["metrics"]
    assert [int(point["step"]) for point in points] == [40, 80, 120] and len(lines) == 60
    pictures = {entry["path"] for entry in ask("artifacts/list", run_id=run_id, path="samples")["files"]}
    steps = (0, 80, 120)
    assert pictures == {f"samples/{step:09d}.png" for step in steps}
    kept = list((tmp_path / "server" / "artifacts").rglob("*.png"))
    assert {path.name for path in kept} == {f"{step:09d}.png" for step in steps}
    assert str(tmp_path) not in json.dumps({**found, "info": {**found["info"], "artifact_uri": ""}})
