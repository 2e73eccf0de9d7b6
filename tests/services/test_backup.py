"""Rehearsals of backup and restore with the commands of docs/deployment.md, while a service makes a dataset."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest

from benchmarks.components import free_port
from benchmarks.components.postgres import Postgres
from dermis.bundle import open_bundle
from dermis.imaging import encode
from gated_dataset import REQUEST, make_directly
from launched_service import ROOT, Launched
from real_servers import running_postgres
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

SMALL = {"model": "tiny", "classes": {"benign": 5}, "seed": 1}
COMMANDS = {"sqlite": ("sqlite3", "sqlite3"), "postgresql": ("pg_dump", "postgresql-client")}


def documented(number: int) -> list[str]:
    """The lines of one of the blocks of commands in the section on backups: SQLite, PostgreSQL, and restoring both."""
    section = (ROOT / "docs/deployment.md").read_text().partition("\n## Backup\n")[2]
    blocks = re.findall(r"^```bash no-run\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    return str(blocks[number]).splitlines()


def run_commands(lines: list[str], values: Mapping[str, str], *, accepted: tuple[int, ...] = (0,)) -> str:
    """Run commands in a shell; its output. `accepted` are the statuses of the last one that are no failure."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/lib/postgresql/15/bin"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DERMIS_")}
    command = ["bash", "-euc", "\n".join(lines)]
    done = subprocess.run(command, env=environment | {"PATH": path} | values, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in accepted, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def postgres(request: pytest.FixtureRequest) -> Iterator[Postgres | None]:
    if request.node.callspec.params["kind"] == "sqlite":
        yield None
        return
    with running_postgres() as server:
        yield server


class Place:
    """A data folder, or a database and a storage, with the variables that name them."""

    def __init__(self, folder: Path, postgres: Postgres | None, database: str) -> None:
        folder.mkdir()
        self.variables = {"DERMIS_DATA_DIR": str(folder / "data")}
        self.storage = folder / "data" / "datasets"
        if postgres is not None:
            with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {database}".encode())
            url = postgres.url_of(database)
            self.storage = folder / "storage"
            self.variables |= {"DERMIS_DATABASE_URL": url, "DERMIS_STORAGE_URL": str(self.storage)}
            self.variables["DATABASE"] = url.replace("+psycopg", "")
        self.storage.mkdir(parents=True)

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a service here."""
        named = {name.removeprefix("DERMIS_").lower(): value for name, value in self.variables.items()}
        return {name: value for name, value in named.items() if name != "database"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "moment"),
    [("sqlite", "running"), ("sqlite", "ended between the copies"), ("postgresql", "running")],
)
def test_service_is_restored_from_a_backup_that_was_made_while_it_worked(
    kind: str, moment: str, postgres: Postgres | None, launch: Callable[..., Launched], tmp_path: Path
) -> None:
    program, package = COMMANDS[kind]
    if kind == "sqlite" and shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian package {package})")
    training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    made = Path(make_complete_bundle(tmp_path / "made", training).location)
    (tmp_path / "bundles").mkdir()
    bundle = made.rename(tmp_path / "bundles" / "tiny")
    old, new, backup = (
        Place(tmp_path / "old", postgres, "old"),
        Place(tmp_path / "new", postgres, "new"),
        tmp_path / "b",
    )
    backup.mkdir()
    variables = {"BACKUP": str(backup)}
    running = launch(str(bundle.parent), free_port(), executor_id="one", **old.settings)
    running.wait_until(running.ready)
    finished = running.client.post("/v1/datasets", json=SMALL).json()
    running.wait_until(lambda: running.progress(finished)["state"] == "succeeded")
    kept = files_of(running.client, finished)
    photograph = [("files", ("a.png", encode(training[0]), "image/png"))]
    projection = running.client.post("/v1/projections?steps=1000", files=photograph).json()
    dataset = running.client.post("/v1/datasets", json=REQUEST).json()
    running.wait_until(lambda: running.progress(dataset)["progress"]["shards_done"] >= 4)
    head = trail_of(old)["head"]

    of_database, of_files = documented(0 if kind == "sqlite" else 1)
    run_commands([of_database], variables | old.variables)
    if moment != "running":
        running.wait_until(lambda: running.progress(dataset)["state"] == "succeeded")
    run_commands([of_files], variables | old.variables, accepted=(0, 1))
    assert running.progress(dataset)["state"] == ("running" if moment == "running" else "succeeded")
    running.process.kill()
    running.process.wait()
    shutil.rmtree(tmp_path / "old")

    lines = documented(2 if kind == "sqlite" else 3)
    assert lines[-1] == "dermis audit verify"
    assert "intact" in run_commands(lines, variables | new.variables)
    again = launch(str(bundle.parent), free_port(), executor_id="two", lease_seconds="3", **new.settings)
    direct = make_directly(open_bundle(bundle), tmp_path / "direct")
    again.wait_until(again.ready)
    assert files_of(again.client, finished) == kept
    again.wait_until(lambda: again.progress(dataset)["state"] in ("succeeded", "failed"))
    assert again.progress(dataset)["error"] is None
    assert files_of(again.client, dataset) == direct
    again.wait_until(lambda: again.client.get(f"/v1/projections/{projection['id']}").json()["state"] == "failed")
    error = again.client.get(f"/v1/projections/{projection['id']}").json()["error"]
    assert error["type"] == "urn:dermis:problem:upload-interrupted"
    assert not list(new.storage.rglob("pr_*/*.safetensors"))
    again.client.post("/v1/datasets", json=SMALL)
    result = trail_of(new, "--head", head)
    assert result["intact"] and result["entries"] >= 4, result


def files_of(client: httpx.Client, dataset: Mapping[str, Any]) -> dict[str, bytes]:
    listed = client.get(dataset["links"]["files"]).json()["data"]
    return {file["name"]: client.get(file["url"]).content for file in listed}


def trail_of(place: Place, *options: str) -> dict[str, Any]:
    """What `dermis audit verify --json` prints."""
    result: dict[str, Any] = json.loads(
        run_commands([" ".join(["dermis", "audit", "verify", "--json", *options])], place.variables)
    )
    return result
