"""End-to-end tests of the launched service: all its processes, the real generator, a kill and a restart."""

from __future__ import annotations

import csv
import io
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from benchmarks.components import free_port
from dermis.bundle import Bundle, open_bundle
from dermis.dataset.verify import verify
from dermis.imaging import decode
from gated_dataset import REQUEST, make_directly
from launched_service import Launched
from services.gateway.auth.keys import new_key
from tiny_index import make_complete_bundle

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("faiss", reason="FAISS is not installed")
pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


@pytest.mark.full
def test_killed_job_is_finished_by_two_workers_with_same_bytes(launch: Callable[..., Launched], tmp_path: Path) -> None:
    training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    bundle = Path(make_complete_bundle(tmp_path / "made", training).location)
    (tmp_path / "bundles").mkdir()
    bundle = bundle.rename(tmp_path / "bundles" / "tiny")
    port = free_port()
    first = launch(str(bundle.parent), port)
    first.wait_until(first.ready)
    assert listening_addresses(family(first.process)) == {("127.0.0.1", port)}
    asked = first.client.post("/v1/datasets", json=REQUEST, headers={"Idempotency-Key": "a"})
    assert asked.status_code == 202, asked.text
    dataset = asked.json()
    first.wait_until(lambda: first.progress(dataset)["progress"]["shards_done"] >= 4)
    first.process.kill()  # the launcher alone: its workers have to see for themselves
    first.process.wait()

    # Same port at once, and a second worker on the same data at another.
    again = launch(str(bundle.parent), port, lease_seconds="2", authenticity_uploads="true")
    other = launch(str(bundle.parent), free_port(), lease_seconds="2")
    direct = make_directly(open_bundle(bundle), tmp_path / "direct")
    again.wait_until(again.ready)
    assert (
        again.client.post("/v1/datasets", json=REQUEST, headers={"Idempotency-Key": "a"}).json()["id"] == dataset["id"]
    )
    again.wait_until(lambda: again.progress(dataset)["state"] == "succeeded")
    made = tmp_path / "data" / "datasets" / dataset["id"]
    assert {path.name: path.read_bytes() for path in made.iterdir()} == direct
    assert verify(made).ok

    # Another dataset, by both workers from the start: the same bytes; and one that is stopped leaves nothing.
    other.wait_until(other.ready)
    both = other.client.post("/v1/datasets", json=REQUEST).json()
    stopped = other.client.post("/v1/datasets", json=REQUEST | {"classes": {"benign": 50_000}}).json()
    assert other.client.delete(stopped["links"]["self"]).status_code == 202
    other.wait_until(lambda: other.progress(stopped)["state"] == "cancelled")
    assert not (tmp_path / "data" / "datasets" / stopped["id"]).exists()
    again.wait_until(lambda: again.progress(both)["state"] == "succeeded")
    files = again.client.get(both["links"]["files"]).json()["data"]
    assert {file["name"]: again.client.get(file["url"]).content for file in files} == direct

    # An image asked for alone is the one in the dataset, and is classified alone as it was there.
    row = list(csv.DictReader(io.StringIO(direct["metadata.csv"].decode())))[7]
    image = {"model": "tiny", "classes": {row["target"]: 1}, "seed": REQUEST["seed"], "start_index": int(row["index"])}
    image["edits"] = REQUEST["edits"]
    alone = again.client.post("/v1/images", json=image, headers={"Accept": "image/png"}).content
    assert alone in direct["data-00000-of-00020.tar"]
    answer = again.client.post("/v1/classifications", files=[("files", alone), ("files", alone)])
    assert answer.status_code == 200, answer.text
    assert [round(one["calibrated"], 6) for one in answer.json()["data"]] == [float(row["probability"])] * 2
    answer = again.client.post("/v1/authenticity", files=[("files", alone)])
    # Uploads are measured in float32, and distant images of datasets in bfloat16 where the processor has it.
    assert answer.json()["data"][0]["distance"] == pytest.approx(float(row["nearest_distance"]), abs=0.1), answer.text

    # Its projection by the real projector, edited back and forth by the real generator.
    asked = again.client.post("/v1/projections?steps=3", files=[("files", alone)])
    assert asked.status_code == 202, asked.text
    path = asked.headers["Location"]
    again.wait_until(lambda: again.client.get(path).json()["state"] == "succeeded")
    files = again.client.get(path).json()["data"][0]["files"]
    drawn = {"projections": [{"id": asked.json()["id"]}], "edits": [{"direction": "axis-0", "strength": 0.0}]}
    edited = again.client.post("/v1/edits", json=drawn, headers={"Accept": "image/png"}).content
    difference = decode(edited).astype(int) - decode(again.client.get(files["image"]).content)
    assert np.abs(difference).max() <= 12  # the projector draws by torch, the generator by what is fastest
    assert again.client.delete(path).status_code == 204

    # A changed bundle is noticed; the service stays up.
    weights = bundle / "generator.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again.wait_until(lambda: again.client.get("/readyz").status_code == 503)
    assert "generator.safetensors" in again.client.get("/readyz").json()["detail"]
    assert again.client.get("/livez").status_code == 200
    assert again.client.post("/v1/images", json=image).status_code == 503

    # After a signal to stop, it ends.
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(30) == 0
    assert "Traceback" not in again.log.read_text()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def listening_addresses(processes: list[psutil.Process]) -> set[tuple[str, int]]:
    """Where processes listen on TCP."""
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


@pytest.mark.full
@pytest.mark.parametrize("command", [["-m", "services.serve"], ["-m", "bentoml", "serve", "services.service:Gateway"]])
def test_service_opens_only_gateway_port_and_stops_in_time(
    launch: Callable[..., Launched], tmp_path: Path, command: list[str]
) -> None:
    training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
    bundle = Path(make_complete_bundle(tmp_path / "tiny", training).location)
    port = free_port()
    settings = {"shutdown_seconds": "12", "stop_pause_seconds": "3", "max_projection_steps": "10000"}
    first = launch(str(bundle), port, command=command, **settings)
    first.wait_until(first.ready)
    processes = family(first.process)
    assert len(processes) >= 7
    assert listening_addresses(processes) == {("127.0.0.1", port)}
    (scratch,) = (tmp_path / "data" / "run").glob("start-*")
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700

    # A projection, heat maps and a dataset at work.
    size = {"model": "tiny", "classes": {"benign": 1}}
    image = first.client.post("/v1/images", json=size, headers={"Accept": "image/png"}).content
    projection = first.client.post("/v1/projections?steps=10000", files=[("files", image)] * 8).headers["Location"]
    dataset = first.client.post("/v1/datasets", json=REQUEST | {"classes": {"benign": 50_000}}).json()

    def heat_maps() -> None:
        with suppress(httpx.HTTPError):
            while first.client.post("/v1/classifications?heat_map=xrai", files=[("files", image)] * 4):
                pass

    thread = threading.Thread(target=heat_maps)
    thread.start()
    first.wait_until(lambda: first.client.get(projection).json()["progress"]["steps_done"] > 0)
    first.wait_until(lambda: first.progress(dataset)["progress"]["shards_done"] >= 1)
    processes = family(first.process)
    first.process.send_signal(signal.SIGTERM)
    while (stopping := first.client.get("/readyz")).status_code == 200:
        pass  # the signal is on its way
    assert (stopping.status_code, "stopping" in stopping.text) == (503, True)
    first.process.wait(12 + 10)
    thread.join()
    assert not [process for process in processes if process.is_running()]
    assert not scratch.exists()
    with socket.create_server(("127.0.0.1", port)):  # with SO_REUSEADDR, as every server
        pass

    # The jobs continue at the next start.
    done = len(list((tmp_path / "data" / "datasets" / dataset["id"]).glob("*.tar")))
    second = launch(str(bundle), port, command=command, **settings)
    second.wait_until(second.ready)
    second.wait_until(lambda: second.progress(dataset)["progress"]["shards_done"] > done)
    second.wait_until(lambda: second.client.get(projection).json()["progress"]["steps_done"] > 0)
    assert second.client.get(projection).json()["state"] == "running"


@pytest.mark.full
@pytest.mark.parametrize("command", [["-m", "services.serve"], ["-m", "bentoml", "serve", "services.service:Gateway"]])
def test_open_service_needs_keys_and_logs_none(
    launch: Callable[..., Launched], tiny_bundle: Bundle, tmp_path: Path, command: list[str]
) -> None:
    admin = new_key()
    (tmp_path / "admin-key").write_text(admin)
    settings = {"host": "0.0.0.0", "auth": "keys", "bootstrap_key_file": str(tmp_path / "admin-key")}
    service = launch(str(tiny_bundle.location), free_port(), command=command, **settings, log_level="DEBUG")
    service.wait_until(service.ready)
    client = service.client
    assert client.get("/v1/models").status_code == 401
    headers = {"Authorization": f"Bearer {admin}"}
    made = client.post("/v1/admin/keys", json={"tenant": "lab", "name": "n"}, headers=headers).json()
    own = {"Authorization": f"Bearer {made['key']}"}
    assert client.post("/v1/images", json={"classes": {"benign": 1}}, headers=own).status_code == 200
    assert client.get("/v1/models", headers=headers).status_code == 403
    assert client.delete(f"/v1/admin/keys/{made['id']}", headers=headers).status_code == 200
    service.wait_until(lambda: client.get("/v1/models", headers=own).status_code == 401, seconds=30)
    log = service.log.read_text()
    assert f"tenant=lab subject=key:{made['id']}" in log
    assert not any(text[23:] in log for text in (admin, made["key"]))


@pytest.mark.full
def test_failed_start_prints_one_line_with_its_cause(tmp_path: Path) -> None:
    def run(**settings: str) -> str:
        environment = os.environ | {"DERMIS_DATA_DIR": str(tmp_path / "data")} | settings
        done = subprocess.run(
            [sys.executable, "-m", "services.serve"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        return line

    assert "DERMIS_PORT" in run(DERMIS_PORT="99999")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "in use" in run(DERMIS_PORT=str(taken.getsockname()[1]))
    (tmp_path / "file").write_text("")
    assert "DERMIS_DATA_DIR" in run(DERMIS_DATA_DIR=str(tmp_path / "file"))
    assert "database" in run(DERMIS_DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
