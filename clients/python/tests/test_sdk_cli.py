"""Tests of `dermis-client`: what it prints to stdout and stderr, and its exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from dermis_client import cli
from fake_gateway import FakeGateway, Fault
from PIL import Image

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("datasets", "list") -> status, stdout, stderr."""
    monkeypatch.setenv("DERMIS_BASE_URL", gateway.url)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dermis-client", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


CREATE = ("datasets", "create", "--classes", "malignant=2,benign=2", "--seed", "7")


def test_dataset_commands_work_from_create_to_delete(gateway: FakeGateway, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "lesions"
    status, printed, err = run(*CREATE, "--format", "imagefolder", "--wait", "--out", str(out), "--extract")
    assert status == 0 and "error" not in err
    identifier = next(iter(gateway.datasets))
    assert printed.splitlines() == [
        f"{identifier} succeeded",
        f"{out}: 4 images in images.zip, 5 files checked, all hashes match",
        f"images unpacked into {out / 'images'}",
    ]
    assert run("verify", str(out)) == (0, f"{out}: 4 files checked, all hashes match\n", "")
    (out / "metadata.csv").write_text("changed")
    assert run("verify", str(out))[:2] == (1, "changed metadata.csv\n")
    assert run("datasets", "download", identifier, "--out", str(out))[0] == 0
    assert run("datasets", "list")[1].splitlines()[1].split()[:4] == [
        identifier,
        "succeeded",
        "4/4",
        "malignant=2,benign=2",
    ]
    assert "succeeded" in run("datasets", "show", identifier)[1]
    assert run("datasets", "wait", identifier)[0] == 0
    assert run("datasets", "cancel", identifier)[1] == f"{identifier} succeeded\n"
    assert run("datasets", "delete", identifier)[1] == f"{identifier} deleted\n"
    assert not gateway.datasets


def test_filter_options_are_sent_unchanged(gateway: FakeGateway, run: Run) -> None:
    assert run(*CREATE, "--keep", "agreeing", "--tries", "8", "--min-probability", "0.25")[0] == 0
    assert run(*CREATE, "--no-score")[0] == 0
    assert run(*CREATE)[0] == 0
    sent = [dataset["request"].get("classifier") for dataset in gateway.datasets.values()]
    assert sent == [{"keep": "agreeing", "tries": 8, "min_probability": 0.25}, {"score": False}, None]


def test_json_is_one_document_on_stdout(gateway: FakeGateway, run: Run, tmp_path: Path) -> None:
    created = json.loads(run(*CREATE, "--out", str(tmp_path / "d"), "--json")[1])
    assert created["state"] == "succeeded" and len(created["download"]["files"]) == 5
    assert json.loads(run("--json", "models")[1])[0]["invented_later"] == {"x": 1}
    assert json.loads(run("datasets", "list", "--json")[1])[0]["id"] == created["id"]
    assert json.loads(run("verify", str(tmp_path / "d"), "--json")[1])["ok"] is True
    images = json.loads(run("images", "--classes", "benign=1", "--out", str(tmp_path), "--json")[1])
    assert images["images"][0]["class"] == "benign"


def test_usage_command_shows_the_quotas(run: Run) -> None:
    assert run("usage")[1].splitlines() == [
        "tenant: a",
        "datasets are deleted 30 days after their end",
        "QUOTA           USED     LIMIT     LEFT  UNIT    STARTS AGAIN",
        "images_per_day  12       1,000     988   images  2026-11-30 00:00:00 UTC",
        "stored_bytes    123,456  no limit  -     bytes   -",
    ]
    assert json.loads(run("usage", "--json")[1])["quotas"][0]["remaining"] == 988


def test_images_command_saves_images_and_grid(run: Run, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    status, printed, _ = run(
        "images", "--classes", "malignant=4", "--seed", "1", "--out", str(tmp_path / "out"), "--grid", str(grid)
    )
    assert status == 0 and len(printed.splitlines()) == 5
    assert Image.open(grid).size == (18, 18) and len(list((tmp_path / "out").glob("malignant_1_*.png"))) == 4


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("datasets", "create", "--classes", "malignant"), 1, "malignant=500,benign=500"),
        (("datasets", "create", "--classes", "a=1,a=2"), 1, "twice"),
        (("datasets", "create", "--classes", "melanoma=1"), 1, "--classes.melanoma: unknown class"),
        (("datasets", "create", "--classes", "benign=1", "--extract"), 1, "--out"),
        (("datasets", "create", "--classes", "benign=1", "--truncation-psi", "nan"), 1, "--truncation-psi: must be"),
        (("datasets", "create", "--classes", "benign=1", "--seed", "x"), 2, "--seed"),
        (("datasets", "show", "ds_none"), 1, "404 not-found"),
        (("datasets", "show", "../x"), 1, "dataset id"),
        (("datasets", "download", "ds_none", "--out", "x"), 1, "404"),
        (("images", "--classes", "benign=1"), 1, "--grid"),
        (("images", "--classes", "benign=1", "--grid", "x.txt"), 1, ".png"),
        (("verify", "nowhere"), 1, "manifest.json"),
        (("models", "--base-url", "ftp://x"), 1, "--base-url: "),
        (("models", "--nonsense"), 2, "--nonsense"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_an_error_is_one_line_on_stderr(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result[:2] == (status, "")
    assert re.fullmatch(r"error: [^\n]+\n", result[2]) and message in result[2]
    assert not list(tmp_path.iterdir())


def test_unknown_command_gets_at_most_one_suggestion(run: Run) -> None:
    status, out, err = run("dataset")
    assert (status, out) == (2, "") and err.startswith("error: No such command 'dataset'")
    assert err.count("datasets") <= 1 and "dermis-client --help" in err
    status, out, err = run()
    assert status == 2 and "Usage" in out + err and "Traceback" not in err


@pytest.mark.parametrize(
    ("field", "message", "expected"),
    [
        ("classifier.min_probability", "must be at most 1", "--min-probability: must be at most 1"),
        ("classifier.keep", "none was kept", "--keep: none was kept"),
        ("privacy.tries", "must be at least 1", "--gate-tries: must be at least 1"),
        ("edits.0.direction", "unknown", "--edit: unknown"),
        ("classes.naevus", "unknown class", "--classes.naevus: unknown class"),
        (
            "classifier",
            "min_probability must not be above max_probability",
            "--min-probability must not be above --max-",
        ),
    ],
)
def test_service_errors_name_command_line_option(
    gateway: FakeGateway, run: Run, field: str, message: str, expected: str
) -> None:
    body = {"type": "urn:dermis:problem:invalid-request", "detail": f"{field}: {message}"}
    for detail in (body, {**body, "detail": "No.", "errors": [{"field": field, "message": message}]}):
        gateway.faults = [Fault("POST /v1/datasets", status=422, body=json.dumps(detail).encode())]
        status, _, err = run(*CREATE)
        assert status == 1 and expected in err


def test_a_closed_pipe_ends_the_program_without_a_stack_trace(gateway: FakeGateway) -> None:
    for _ in range(30):
        gateway.finished()
    environment = os.environ | {"DERMIS_BASE_URL": gateway.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dermis_client.cli", "datasets", "list", "--json"]
    done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_failed_dataset_is_an_error(gateway: FakeGateway, run: Run) -> None:
    gateway.outcome = "failed"
    status, printed, err = run(*CREATE, "--wait")
    assert (status, printed) == (1, "") and "disk is full" in err.splitlines()[-1]


@pytest.mark.full
@pytest.mark.parametrize("stage", ["waiting", "downloading"])
def test_ctrl_c_prints_how_to_continue(gateway: FakeGateway, tmp_path: Path, stage: str) -> None:
    if stage == "waiting":
        gateway.ticks, gateway.tick_seconds = 4, 60.0
    else:
        gateway.faults = [Fault("GET .*images.zip", silent=60.0)]
    environment = os.environ | {"DERMIS_BASE_URL": gateway.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "dermis_client.cli", *CREATE, "--out", str(tmp_path / "d")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        deadline = time.monotonic() + 120
        while not gateway.requests("GET .*/events" if stage == "waiting" else "GET .*images.zip"):
            assert program.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=120)
    identifier = next(iter(gateway.datasets))
    again = f"dermis-client datasets {'wait' if stage == 'waiting' else 'download'} {identifier}"
    assert program.returncode == 130
    assert again in err and "Traceback" not in err


def test_repeated_requests_are_on_stderr_and_unknown_choices_are_refused(gateway: FakeGateway, run: Run) -> None:
    gateway.faults = [Fault("GET /v1/models", status=503)]
    status, out, err = run("models")
    assert status == 0 and "demo" in out and err.startswith("GET /v1/models: attempt 2 of 4 follows in ")
    for option, choices in (("--keep", "all, agreeing"), ("--gate", "min_distance"), ("--on-reject", "resample")):
        status, _, err = run(*CREATE, option, "other")
        assert status == 2 and f"Invalid value for '{option}'" in err and choices.split(", ")[0] in err
    assert not gateway.requests("POST")
