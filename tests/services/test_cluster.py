"""Tests of several replicas on one PostgreSQL and one bucket: gateways without models, and workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from dermis_client import DermisClient
from typer.testing import CliRunner

from benchmarks.components import free_port
from commands.main import app
from dermis.bundle import Bundle, open_bundle
from dermis.cpus import available_cpus
from dermis.dataset.store import Store
from dermis.imaging import Images, encode
from gated_dataset import REQUEST, make_directly
from launched_service import Launched, launching
from real_servers import running_moto, running_postgres, running_s3
from services.inference.projections import ProjectionTask, project_images
from services.jobs.projection import IMAGES_PER_SHARD
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

    def start(name: str, command: Sequence[str] = ("-m", "services.serve"), **settings: str) -> Launched:
        own = {"data_dir": str(tmp_path / name), "executor_id": name}
        return launch(str(tmp_path / "bundles"), free_port(), command, **shared, **own, **settings)

    yield start
    for _ in replicas:  # stops them
        pass


def bundle_of_replicas(tmp_path: Path, training: Images) -> Path:
    """The folder of a bundle with all parts, in the folder that replicas serve."""
    made = Path(make_complete_bundle(tmp_path / "made", training).location)
    (tmp_path / "bundles").mkdir()
    return made.rename(tmp_path / "bundles" / "tiny")


@pytest.mark.full
def test_gateways_and_workers_make_the_files_of_one_machine(
    replica: Callable[..., Launched], shared: dict[str, str], storage: str, tmp_path: Path
) -> None:
    training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    bundle = bundle_of_replicas(tmp_path, training)
    gateway = {"role": "gateway", "inference": "false", "max_projection_steps": "10000"}
    first = replica("gateway-1", **gateway)
    second = replica("gateway-2", **gateway, download_url_seconds="60")
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
    worker = replica("worker-2", ("-m", "commands.main", "worker"))
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

    # Projections of images that a gateway without models has received: the files of one machine, from both gateways.
    images = training[:9]  # two parts
    files_of_form = [("files", encode(image)) for image in images]
    key = {"Idempotency-Key": "b"}
    asked = first.client.post("/v1/projections?steps=3", files=files_of_form, headers=key)
    assert asked.status_code == 202, asked.text
    path = asked.headers["Location"]
    assert second.client.post("/v1/projections?steps=3", files=files_of_form, headers=key).json()["id"] in path
    assert second.client.post("/v1/projections?steps=4", files=files_of_form, headers=key).status_code == 409
    second.wait_until(lambda: second.client.get(path).json()["state"] == "succeeded")
    projected = project_directly(open_bundle(bundle), images)
    for each in (first, second):
        rows = each.client.get(path).json()["data"]
        links = {url.rpartition("/")[2]: url for row in rows for url in row["files"].values() if url is not None}
        assert {name: each.client.get(url).content for name, url in links.items()} == projected
    assert set(Store(f"{storage}/{asked.json()['id']}").entries()) == {*projected, "projections.json"}

    # Deleted at another gateway while it runs: nothing is left.
    asked = first.client.post("/v1/projections?steps=10000", files=files_of_form)
    path, stopped_id = asked.headers["Location"], asked.json()["id"]
    second.wait_until(lambda: second.client.get(path).json().get("previews"))
    running = second.client.get(path).json()
    assert running["state"] == "running" and running["progress"]["images_done"] == 0
    assert rows_of(shared["database_url"], stopped_id) and Store(f"{storage}/{stopped_id}").entries()
    assert second.client.delete(path).status_code == 204
    assert [each.client.get(path).status_code for each in (first, second)] == [404, 404]
    second.wait_until(lambda: not rows_of(shared["database_url"], stopped_id))
    assert Store(f"{storage}/{stopped_id}").total_bytes() == 0


@pytest.mark.full
@pytest.mark.parametrize("storage", [running_s3], indirect=True, ids=["seaweedfs"])
def test_replicas_that_do_everything_share_their_datasets(
    replica: Callable[..., Launched], storage: str, tmp_path: Path
) -> None:
    training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    bundle = bundle_of_replicas(tmp_path, training)
    first, second = replica("replica-1"), replica("replica-2")
    direct = make_directly(open_bundle(bundle), tmp_path / "direct")
    for each in (first, second):
        each.wait_until(each.ready)

    # One dataset for one key, and its event stream at the replica that has not accepted it.
    key = {"Idempotency-Key": "a"}
    dataset = first.client.post("/v1/datasets", json=REQUEST, headers=key).json()
    assert second.client.post("/v1/datasets", json=REQUEST, headers=key).json()["id"] == dataset["id"]
    assert second.client.post("/v1/datasets", json=REQUEST | {"seed": 12}, headers=key).status_code == 409
    names, records = zip(*events(second.client, dataset), strict=True)
    assert names == ("progress",) * (len(names) - 1) + ("succeeded",)
    assert records[-1] == first.progress(dataset) == second.progress(dataset)
    for each in (first, second):
        files = each.client.get(dataset["links"]["files"]).json()["data"]
        assert {file["name"]: each.client.get(file["url"]).content for file in files} == direct

    # Cancelled at the replica that has not accepted it: the stream of the other one ends, and nothing is left.
    stopped = first.client.post("/v1/datasets", json=REQUEST | {"classes": {"benign": 50_000}}).json()
    second.wait_until(lambda: second.progress(stopped)["progress"]["samples_done"] > 0)
    assert second.client.delete(stopped["links"]["self"]).status_code == 202
    name, record = events(first.client, stopped)[-1]
    assert (name, record["state"]) == ("cancelled", "cancelled")
    assert second.progress(stopped) == record
    assert Store(f"{storage}/{stopped['id']}").total_bytes() == 0


def project_directly(bundle: Bundle, images: Images) -> dict[str, bytes]:
    """The files of a projection of images with three steps, as the library makes them in this process."""
    import torch

    from dermis.projection.projector import ImageProjector
    from dermis.projection.schedule import SCHEDULES

    task = ProjectionTask(replace(SCHEDULES["fast"], steps=3, start="mean"))
    files: dict[str, bytes] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(available_cpus())  # as the service does
    try:
        projector = ImageProjector(bundle, distance="lite0", device="cpu")
        for begin in range(0, len(images), IMAGES_PER_SHARD):
            part = images[begin : begin + IMAGES_PER_SHARD]
            made = project_images(projector, part, [None] * len(part), task, lambda steps: None)
            for number, each in enumerate(made, begin):
                files |= {f"{number:05d}.safetensors": each.result, f"{number:05d}.png": each.image}
    finally:
        torch.set_num_threads(threads)
    return files


def rows_of(database: str, job_id: str) -> list[str]:
    """The tables that have a row of a job, its parts or its workflows."""
    columns = {
        "dermis_jobs": "id",
        "dermis_shards": "job_id",
        "dbos.workflow_status": "workflow_uuid",
        "dbos.operation_outputs": "workflow_uuid",
    }
    engine = sa.create_engine(database)
    with engine.connect() as connection:
        counts = {
            table: connection.scalar(
                sa.text(f"SELECT count(*) FROM {table} WHERE {column} LIKE :ids"), {"ids": f"{job_id}%"}
            )
            for table, column in columns.items()
        }
    engine.dispose()
    return [table for table, count in counts.items() if count]


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
