"""Tests of several replicas on one PostgreSQL and one bucket: gateways without models, and workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from dermis_client import DermisClient
from typer.testing import CliRunner

from benchmarks.components import free_port
from commands.main import app
from dermis.bundle import open_bundle
from dermis.dataset.store import Store
from dermis.imaging import encode
from gated_dataset import REQUEST, make_directly
from launched_service import Launched, launching
from real_servers import running_moto, running_postgres, running_s3
from services.settings import SettingsError, read_settings
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"role": "worker"}, "DERMIS_ROLE=worker needs DERMIS_DATABASE_URL and DERMIS_STORAGE_URL"),
        ({"role": "gateway", "storage_url": "s3://b"}, "DERMIS_ROLE=gateway needs DERMIS_DATABASE_URL"),
        ({"inference": "false"}, "DERMIS_INFERENCE=false needs DERMIS_ROLE=gateway"),
        ({"database_url": "mysql://a/b"}, "^DERMIS_DATABASE_URL: write postgresql://"),
        ({"database_url": "postgresql://u:secret@host:port/x"}, "^DERMIS_DATABASE_URL: write postgresql://[^;]*FILE$"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"DERMIS_{name.upper()}", value)
    with pytest.raises(SettingsError, match=message):
        read_settings()


@pytest.fixture(params=[running_s3, running_moto], ids=["seaweedfs", "moto"])
def storage(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a folder of a bucket."""
    with request.param() as server:
        yield server.url("datasets")


@pytest.fixture
def shared(storage: str) -> Iterator[dict[str, str]]:
    """The settings of all replicas: one database and one bucket."""
    with running_postgres() as database:
        yield {"database_url": database.url, "storage_url": storage, "lease_seconds": "3"}


@pytest.fixture
def replica(tmp_path: Path, shared: dict[str, str]) -> Iterator[Callable[..., Launched]]:
    """A function that starts a replica with a data folder of its own."""
    replicas = launching(tmp_path)
    launch = next(replicas)

    def start(name: str, **settings: str) -> Launched:
        own = {"data_dir": str(tmp_path / name), "executor_id": name}
        return launch(str(tmp_path / "bundles"), free_port(), **shared, **own, **settings)

    yield start
    for _ in replicas:  # stops them
        pass


@pytest.mark.full
def test_gateways_and_workers_make_the_files_of_one_machine(
    replica: Callable[..., Launched], shared: dict[str, str], storage: str, tmp_path: Path
) -> None:
    training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    made = Path(make_complete_bundle(tmp_path / "made", training).location)
    (tmp_path / "bundles").mkdir()
    bundle = made.rename(tmp_path / "bundles" / "tiny")
    first = replica("gateway-1", role="gateway", inference="false")
    second = replica("gateway-2", role="gateway", inference="false", download_url_seconds="60")
    direct = make_directly(open_bundle(bundle), tmp_path / "direct")
    for each in (first, second):
        each.wait_until(each.ready)

    # Accepted without a worker, once for both gateways, and shown by both.
    key = {"Idempotency-Key": "a"}
    dataset = first.client.post("/v1/datasets", json=REQUEST, headers=key).json()
    assert second.client.post("/v1/datasets", json=REQUEST, headers=key).json()["id"] == dataset["id"]
    assert second.progress(dataset)["state"] == "queued"
    image = {"model": "tiny", "classes": {"benign": 1}}
    refused = first.client.post("/v1/images", json=image)
    assert refused.status_code == 503
    assert "runs without the generator" in refused.json()["detail"]

    # A worker is killed; another one takes over; the event stream of a gateway lasts until the end.
    killed = replica("worker-1", role="worker")
    second.wait_until(lambda: second.progress(dataset)["progress"]["shards_done"] >= 3)
    os.kill(killed.process.pid, signal.SIGKILL)
    worker = replica("worker-2", role="worker")
    worker.wait_until(worker.ready)
    assert worker.client.get("/v1/datasets").status_code == 404
    assert "dermis_" in worker.client.get("/metrics").text
    names, records = zip(*events(second.client, dataset), strict=True)
    assert names == ("progress",) * (len(names) - 1) + ("succeeded",)
    assert records[-1] == second.progress(dataset) == first.progress(dataset)
    done = [record["progress"]["shards_done"] for record in records]
    assert done == sorted(done) and done[-1] == 20
    assert (records[-1]["state"], records[-1]["progress"]["samples_done"]) == ("succeeded", 500)
    files = first.client.get(dataset["links"]["files"]).json()["data"]
    assert {file["name"]: first.client.get(file["url"]).content for file in files} == direct

    # What an operator sees, from the database and the bucket alone.
    state = status(shared | {"bundles": str(bundle.parent)})
    processes = {(each["name"], each["role"], each["state"]) for each in state["workers"]}
    gateways = {("gateway-1", "gateway", "alive"), ("gateway-2", "gateway", "alive")}
    assert processes == gateways | {("worker-2", "worker", "alive")}
    assert state["jobs"]["dataset"]["succeeded"] == 1 and state["running_shards"] == 0
    stored = {"location": storage, "free_bytes": None, "problem": None}
    assert state["storage"] == stored | {"stored_bytes": sum(map(len, direct.values()))}
    away = status(shared | {"storage_url": "s3://no-such-bucket/datasets"})["storage"]
    assert "no-such-bucket" in away["problem"]
    assert state["database"]["schema"] == state["database"]["newest_known_schema"]
    assert [each["digest"] for each in state["bundles"]] == [open_bundle(bundle).digest]

    # Downloads past a gateway, also of the rest of a file.
    redirect = second.client.get(files[0]["url"])
    assert (redirect.status_code, redirect.headers["ETag"]) == (307, f'"{files[0]["sha256"]}"')
    assert second.client.head(files[0]["url"]).status_code == 200
    assert httpx.get(redirect.headers["Location"]).headers["Content-Disposition"].endswith(f'"{files[0]["name"]}"')
    largest = max(direct, key=lambda name: len(direct[name]))
    folder = tmp_path / "downloaded"
    folder.mkdir()
    (folder / f"{largest}.part").write_bytes(direct[largest][:5000])
    with DermisClient(str(second.client.base_url)) as client:
        client.datasets.retrieve(dataset["id"]).download(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == direct

    # Cancelled at another gateway than the one that accepted it: nothing is left.
    stopped = first.client.post("/v1/datasets", json=REQUEST | {"classes": {"benign": 50_000}}).json()
    first.wait_until(lambda: first.progress(stopped)["progress"]["samples_done"] > 0)
    assert second.client.delete(stopped["links"]["self"]).status_code == 202
    first.wait_until(lambda: first.progress(stopped)["state"] == "cancelled")
    assert Store(f"{storage}/{stopped['id']}").total_bytes() == 0

    # A projection of an image that a gateway without models has received.
    asked = first.client.post("/v1/projections?steps=3", files=[("files", encode(training[0]))])
    assert asked.status_code == 202, asked.text
    path = asked.headers["Location"]
    second.wait_until(lambda: second.client.get(path).json()["state"] == "succeeded")
    latents = second.client.get(path).json()["data"][0]["files"]
    assert all(second.client.get(url).status_code == 200 for url in latents.values() if isinstance(url, str))


def events(client: httpx.Client, dataset: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The names and data of the event stream of a dataset, until it ends."""
    with client.stream("GET", dataset["links"]["events"], timeout=300) as stream:
        fields = [line.partition(": ") for line in stream.iter_lines()]
    names = [value for name, _, value in fields if name == "event"]
    records = [json.loads(value) for name, _, value in fields if name == "data"]
    return list(zip(names, records, strict=True))


def status(settings: Mapping[str, str]) -> dict[str, Any]:
    """What `dermis admin status --json` prints with the settings of a service."""
    environment = {f"DERMIS_{name.upper()}": value for name, value in settings.items()}
    result = CliRunner().invoke(app, ["admin", "status", "--json"], env=environment, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.output)
    return document
