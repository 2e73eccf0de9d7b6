"""Tests of `dermis admin status`: the state of a service that runs, of one that is down, and what prevents the reading."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

import dermis
from commands.main import app
from dermis.errors import DermisError
from service_kit import service
from services.jobs.statistics import Kind
from services.jobs.table import JobTable
from services.settings import Settings
from services.status import read_status
from tiny import make_bundle


def admin_status(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["admin", "status", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def state(*arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(admin_status("--json", *arguments))
    return document


@pytest.mark.full
def test_status_of_a_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "tiny")
    broken = make_bundle(tmp_path / "broken", name="broken")
    (Path(broken.location) / "bundle.json").write_text("{")
    data = tmp_path / "data"
    monkeypatch.setenv("DERMIS_BUNDLES", f"{tmp_path / 'tiny'},{tmp_path / 'broken'}")
    option = f"--data-dir={data}"
    with service(tmp_path / "tiny", data, executor_id="here") as running:
        running.generator.gate.clear()
        dataset = running.ask({"classes": {"benign": 6}, "shard_size": 3})
        running.wait(dataset, "running")
        during = state(option)
        running.generator.gate.set()
        running.wait(dataset)
    table = JobTable(f"sqlite:///{data / 'jobs.sqlite'}")  # a service that runs would remove the lease
    table.open()
    table.renew_lease("dead", -5.0)
    with table._engine.begin() as connection:  # as a process of an earlier version, beside one of this version
        connection.execute(sa.text("UPDATE dermis_workers SET version = NULL WHERE executor_id = 'dead'"))
    table.close()
    assert during["workers"][0]["state"] == "alive" and during["workers"][0]["active_jobs"] == 1
    assert during["workers"][0]["lease_seconds_left"] > 0
    assert during["jobs"]["dataset"]["running"] == 1 and during["jobs"]["dataset"]["unfinished_shards"] == 2
    assert during["running_shards"] >= 1
    before = {path: path.stat().st_mtime_ns for path in data.glob("jobs.sqlite")}
    after = state(option)
    assert {worker["name"]: worker["state"] for worker in after["workers"]} == {
        "dead": "lease expired",
        "here": "stopped",
    }
    assert [worker["version"] for worker in after["workers"]] == [None, dermis.__version__]
    assert after["jobs"]["dataset"]["succeeded"] == 1 and after["running_shards"] == 0
    assert after["storage"]["stored_bytes"] > 0 and after["storage"]["free_bytes"] > 0
    assert after["database"]["schema"] == after["database"]["newest_known_schema"]
    assert [entry["name"] for entry in after["bundles"]] == ["tiny", None]
    assert after["bundles"][0]["digest"] == bundle.digest and "bundle.json" in after["bundles"][1]["problem"]
    assert {path: path.stat().st_mtime_ns for path in data.glob("jobs.sqlite")} == before
    text = admin_status(option)
    rows = [line.split()[:3] for line in text.splitlines()]
    assert ["dead", "worker", "-"] in rows and ["here", "worker", dermis.__version__] in rows
    for part in ("lease expired", "tiny (16 px", "cannot be opened", "dataset", "schema 0"):
        assert part in text


def test_jobs_of_all_tenants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMIS_BUNDLES", str(tmp_path))
    ids = {name: f"{'pr' if name == 'c' else 'ds'}_{number:032x}" for number, name in enumerate("abcd")}
    kinds: dict[str, Kind] = {"a": "dataset", "b": "dataset", "c": "projection", "d": "dataset"}
    table = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    table.open()
    for name, tenant in zip("abcd", "xyyx", strict=True):
        model = ("tiny", "0")
        table.create(ids[name], {}, tenant=tenant, kind=kinds[name], model=model, samples=1, shards=1, body_hash=name)
    for name in "bc":
        table.record_error(ids[name], {"type": "urn:dermis:problem:storage-full", "detail": "no space"})
        table.finish(ids[name], "failed")
    table.close()
    assert "listed_jobs" not in state(f"--data-dir={tmp_path}")
    listed = state(f"--data-dir={tmp_path}", "--jobs=5")["listed_jobs"]
    assert [(job["id"], job["tenant"], job["state"]) for job in listed] == [
        (ids["a"], "x", "queued"),
        (ids["d"], "x", "queued"),
        ("pr_000000...", "y", "failed"),
        (ids["b"], "y", "failed"),
    ]
    assert listed[3]["error"] == "storage-full: no space" and listed[3]["finished_at"] and listed[0]["error"] is None
    text = admin_status(f"--data-dir={tmp_path}", "--jobs=1")
    assert f"dataset {ids['a']} of x: -" in text and "projection pr_000000... of y: storage-full: no space" in text
    assert ids["d"] not in text and ids["b"] not in text


def test_what_prevents_the_reading(tmp_path: Path) -> None:
    def status_of(**values: Any) -> None:
        read_status(Settings(_env_file=None, bundles=(str(tmp_path),), data_dir=tmp_path, **values))

    with pytest.raises(DermisError, match="there is no jobs database at"):
        status_of()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "jobs.sqlite").touch()
    with pytest.raises(DermisError, match="no tables that this version"):
        status_of()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("CREATE TABLE dermis_jobs (id INTEGER, state TEXT)")  # version 0.1.0 had no kinds
    with pytest.raises(DermisError, match="no tables that this version.*no such column"):
        status_of()
    (tmp_path / "other.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(DermisError, match="cannot be read: .*not a database"):
        status_of(database_url=f"sqlite:///{tmp_path / 'other.sqlite'}")
    with pytest.raises(DermisError, match=r"dermis:\*\*\*@127.0.0.1.*cannot be read"):
        status_of(database_url="postgresql://dermis:secret@127.0.0.1:1/dermis?connect_timeout=2")


def test_status_of_an_earlier_schema(tmp_path: Path) -> None:
    table = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    table.open()
    table.renew_lease("here", 30.0)
    table.close()
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("ALTER TABLE dermis_jobs DROP COLUMN trace_parent")
        for column in ("works", "version"):
            connection.execute(f"ALTER TABLE dermis_workers DROP COLUMN {column}")
        connection.execute("UPDATE dermis_schema_version SET version_num = '0007'")
    status = read_status(Settings(_env_file=None, bundles=(str(tmp_path),), data_dir=tmp_path))
    assert status.schema == "0007" and status.known_schema > "0007"
    assert [(worker.works, worker.version) for worker in status.statistics.workers] == [(True, None)]
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        assert connection.execute("SELECT version_num FROM dermis_schema_version").fetchone() == ("0007",)
