"""Tests of the log as JSON: one object a line for every logger, with ids of requests and traces and without personal data."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service_kit import service
from services.logs import JsonFormatter, request_id
from tiny import make_bundle

ROOT = Path(__file__).parents[2]

# Everything that a process of the service can write, in a process of its own, because the configuration is one a process.
SCRIPT = """
import logging, sys, threading, warnings
logging.getLogger("bentoml").addHandler(logging.StreamHandler())
logging.getLogger("bentoml").propagate = False
from services import logs
logs.configure("INFO", "json")
logging.getLogger("dermis.http").info("request", extra={
    "id": "r1", "status": 200, "ms": 1.23456789, "subject": "Ada Lovelace", "client": "192.0.2.7", "time": "mine", "none": None,
    "job": "ds_" + "0" * 32, "path": "a\\nb\\ud800", "nan": float("nan"), "ready": True})
logging.getLogger("bentoml").warning("from %s", "BentoML")
logging.getLogger("uvicorn.error").error("from uvicorn")
logging.getLogger("sqlalchemy.pool").error("from a library, with dermis_sk_abcdefghijkl_" + "s" * 43)
warnings.warn("careful")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise ValueError("the end")
"""


def test_every_line_is_an_object() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    lines: list[dict[str, Any]] = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.stdout == ""
    assert [line["message"] for line in lines[1:4]] == [
        "from BentoML",
        "from uvicorn",
        "from a library, with dermis_sk_abcdefghijkl_...",
    ]
    assert [line["logger"] for line in lines[4:]] == ["py.warnings", "dermis.process", "dermis.process"]
    assert "ZeroDivisionError" in lines[5]["exception"] and "ValueError: the end" in lines[6]["exception"]
    first = lines[0]
    assert first.pop("time").endswith("Z") and len(lines) == 7
    assert first == {
        "level": "INFO",
        "logger": "dermis.http",
        "message": "request",
        "request_id": "r1",
        "status": 200,
        "ms": 1.23457,
        "time_": "mine",
        "job": "ds_000000...",
        "path": "a\nb\ud800",
        "nan": "nan",
        "ready": True,
    }
    assert "Ada" not in done.stderr and "192.0.2.7" not in done.stderr


@pytest.mark.full
def test_lines_of_a_request_have_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path / "tiny")
    formatter, seen = JsonFormatter(), []
    with service(tmp_path / "tiny", tmp_path / "data") as running:
        page = running.jobs.datasets.page

        def note(*arguments: Any, **options: Any) -> Any:
            seen.append(request_id.get())
            return page(*arguments, **options)

        running.jobs.datasets.page = note  # type: ignore[method-assign]
        monkeypatch.setattr(logging.getLogger("dermis.http"), "propagate", True)
        with caplog.at_level("INFO", logger="dermis.http"):
            running.client.get("/v1/datasets", headers={"X-Request-Id": "mine"})
    assert seen == ["mine"]
    lines = [json.loads(formatter.format(record)) for record in caplog.records if record.name == "dermis.http"]
    assert [line["request_id"] for line in lines] == ["mine"]
