"""Rehearsals of backup and restore with the commands of docs/backup.md, while a service makes a dataset."""

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

import fsspec
import httpx
import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from benchmarks.components import free_port
from benchmarks.components.postgres import Postgres
from dermis.bundle import open_bundle
from dermis.imaging import encode
from gated_dataset import REQUEST, make_directly
from launched_service import ROOT, Launched
from real_servers import running_postgres, running_s3
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

SMALL = {"model": "tiny", "classes": {"benign": 5}, "seed": 1}
KINDS = ("sqlite", "postgresql", "bucket")
COMMANDS = {"sqlite": ("sqlite3", "sqlite3"), "bucket": ("rclone", "rclone")}


def documented(kind: str) -> tuple[list[str], list[str]]:
    """The commands of the documentation, for a backup and for its restore."""
    page = (ROOT / "docs/backup.md").read_text()
    blocks = re.findall(r"^```bash no-run\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2 * len(KINDS)
    number = KINDS.index(kind)
    return str(blocks[number]).splitlines(), str(blocks[len(KINDS) + number]).splitlines()


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


@pytest.fixture
def bucket(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The URL of a folder of a bucket, whose server rclone knows as `storage`."""
    if request.node.callspec.params["kind"] != "bucket":
        yield None
        return
    with running_s3() as server, pytest.MonkeyPatch.context() as patch:
        configuration = {"TYPE": "s3", "PROVIDER": "Other", "ENV_AUTH": "true", "ENDPOINT": server.endpoint}
        for name, value in configuration.items():
            patch.setenv(f"RCLONE_CONFIG_STORAGE_{name}", value)
        patch.delenv("AWS_CA_BUNDLE", raising=False)  # rclone 1.60 does not start with it
        yield server.url("places")


class Place:
    """A data folder, or a database and a storage, with the variables that name them."""

    def __init__(self, folder: Path, postgres: Postgres | None, bucket: str | None) -> None:
        folder.mkdir()
        self._folder = folder
        self.variables = {"DERMIS_DATA_DIR": str(folder / "data")}
        self.storage = str(folder / "data" / "datasets")
        if postgres is not None:
            with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {folder.name}".encode())
            url = postgres.url_of(folder.name)
            self.storage = str(folder / "storage") if bucket is None else f"{bucket}/{folder.name}"
            self.variables |= {"DERMIS_DATABASE_URL": url, "DERMIS_STORAGE_URL": self.storage}
            parsed = sa.make_url(url.replace("+psycopg", ""))
            self.variables |= {
                "DATABASE": parsed.set(password=None).render_as_string(),
                "PGPASSWORD": parsed.password or "",
            }
        if bucket is None:
            Path(self.storage).mkdir(parents=True)

    @property
    def settings(self) -> dict[str, str]:
        """The settings of a service here."""
        of_dermis = {name: value for name, value in self.variables.items() if name.startswith("DERMIS_")}
        return {name.removeprefix("DERMIS_").lower(): value for name, value in of_dermis.items()}

    def files(self) -> list[str]:
        """The paths of all files in the storage."""
        files, root = fsspec.core.url_to_fs(self.storage)
        files.invalidate_cache()
        return list(files.find(root))

    def remove(self) -> None:
        """Remove the data folder and the files in the storage, as when they are lost."""
        files, root = fsspec.core.url_to_fs(self.storage)
        files.rm(root, recursive=True)
        shutil.rmtree(self._folder)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "moment"),
    [("sqlite", "running"), ("sqlite", "ended between the copies"), ("postgresql", "running"), ("bucket", "running")],
)
def test_service_is_restored_from_a_backup_that_was_made_while_it_worked(
    kind: str,
    moment: str,
    postgres: Postgres | None,
    bucket: str | None,
    launch: Callable[..., Launched],
    tmp_path: Path,
) -> None:
    if kind in COMMANDS and shutil.which(COMMANDS[kind][0]) is None:
        pytest.skip(f"{COMMANDS[kind][0]} is not installed (Debian package {COMMANDS[kind][1]})")
    # rclone needs longer than tar, and the dataset has to be unfinished when it ends.
    request = REQUEST if kind != "bucket" else REQUEST | {"classes": {"benign": 1500, "malignant": 1000}}
    training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    made = Path(make_complete_bundle(tmp_path / "made", training).location)
    (tmp_path / "bundles").mkdir()
    bundle = made.rename(tmp_path / "bundles" / "tiny")
    old, new = (Place(tmp_path / name, postgres, bucket) for name in ("old", "new"))
    backup = tmp_path / "b"
    backup.mkdir()
    variables = {"BACKUP": str(backup)}
    running = launch(str(bundle.parent), free_port(), executor_id="one", **old.settings)
    running.wait_until(running.ready)
    finished = running.client.post("/v1/datasets", json=SMALL).json()
    running.wait_until(lambda: running.progress(finished)["state"] == "succeeded")
    kept = files_of(running.client, finished)
    photograph = [("files", ("a.png", encode(training[0]), "image/png"))]
    projection = running.client.post("/v1/projections?steps=1000", files=photograph).json()
    dataset = running.client.post("/v1/datasets", json=request).json()
    running.wait_until(lambda: running.progress(dataset)["progress"]["shards_done"] >= 4)
    head = trail_of(old)["head"]

    (of_database, of_files), restoring = documented(kind)
    run_commands([of_database], variables | old.variables)
    if moment != "running":
        running.wait_until(lambda: running.progress(dataset)["state"] == "succeeded")
    run_commands([of_files], variables | old.variables, accepted=(0, 1) if of_files.startswith("tar") else (0,))
    assert running.progress(dataset)["state"] == ("running" if moment == "running" else "succeeded")
    running.process.kill()
    running.process.wait()
    old.remove()

    assert restoring[-1] == "dermis audit verify"
    assert "intact" in run_commands(restoring, variables | new.variables)
    again = launch(str(bundle.parent), free_port(), executor_id="two", lease_seconds="3", **new.settings)
    direct = make_directly(open_bundle(bundle), tmp_path / "direct", request)
    again.wait_until(again.ready)
    assert files_of(again.client, finished) == kept
    again.wait_until(lambda: again.progress(dataset)["state"] in ("succeeded", "failed"))
    assert again.progress(dataset)["error"] is None
    assert files_of(again.client, dataset) == direct
    again.wait_until(lambda: again.client.get(f"/v1/projections/{projection['id']}").json()["state"] == "failed")
    error = again.client.get(f"/v1/projections/{projection['id']}").json()["error"]
    assert error["type"] == "urn:dermis:problem:upload-interrupted"
    assert not [path for path in new.files() if "/pr_" in path and path.endswith(".safetensors")]
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
