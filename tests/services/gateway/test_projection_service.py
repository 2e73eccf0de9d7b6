"""Tests of POST /v1/projections: durable, can be cancelled and deleted, and keeps nothing of the uploaded images."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dermis.authenticity.checker import Checker
from dermis.authenticity.training_map import training_map
from dermis.bundle import Bundle
from dermis.dataset.store import Store
from dermis.directions.edit import Edit, apply_edits
from dermis.errors import StorageError
from dermis.imaging import Images, decode, encode
from dermis.projection.result import from_bytes
from dermis.synthesizer import Synthesizer
from service_kit import Service, service, wait_for
from services.errors import InferenceUnavailableError
from services.inference.projections import ProjectionPreview
from tiny import make_bundle
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")


def noise(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, 40, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("bundles")
    made = make_complete_bundle(root / "made", noise(30)[:, :12, :12])
    make_bundle(root / "made" / "plain", name="plain", seed=1)
    return made


@pytest.fixture
def running(bundle: Bundle, tmp_path: Path) -> Iterator[Service]:
    bundles = f"{bundle.location},{Path(bundle.location).parent / 'plain'}"
    with service(bundles, tmp_path / "data", default_model="tiny", max_projection_images=20) as running_service:
        yield running_service


def ask(running: Service, images: Images, query: str = "steps=3", **headers: str) -> dict[str, Any]:
    files = [("files", (f"patient-{i}.png", encode(image), "image/png")) for i, image in enumerate(images)]
    answer = running.client.post(f"/v1/projections?{query}", files=files, headers=headers)
    assert answer.status_code == 202, answer.text
    content: dict[str, Any] = answer.json()
    assert answer.headers["Location"] == f"/v1/projections/{content['id']}"
    return content


def wait(running: Service, job: Mapping[str, Any]) -> dict[str, Any]:
    status: dict[str, Any] = {}
    path = f"/v1/projections/{job['id']}"
    wait_for(lambda: status.update(running.client.get(path).json()) or status["state"] in ("succeeded", "failed"))
    return status


def stored(running: Service, job: Mapping[str, Any]) -> list[str]:
    store = Store(f"{running.settings.storage}/{job['id']}")
    return store.entries()


def test_projection_returns_latents_and_removes_uploaded_images(
    running: Service, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        job = ask(running, noise(10), "steps=3&video=true&class=malignant")
        assert job["progress"]["images_total"] == 10 and job["data"] is None
        finished = wait(running, job)
    assert finished["state"] == "succeeded", finished
    assert finished["progress"] == {
        **finished["progress"],
        "images_done": 10,
        "steps_done": 30,
        "steps_total": 30,
    }
    assert running.projector.calls == 2  # eight at once, then two
    assert [row["index"] for row in finished["data"]] == list(range(10))
    row = finished["data"][9]
    assert (row["distance_name"], row["steps"], row["space"], row["start"]) == ("lite0", 3, "w+", "mean")
    files = {kind: running.client.get(path) for kind, path in row["files"].items()}
    assert {kind: answer.status_code for kind, answer in files.items()} == {"latents": 200, "image": 200, "video": 200}
    projection, origin = from_bytes(files["latents"].content, "x")
    assert origin == {"bundle": bundle.digest}
    assert np.array_equal(projection.image, decode(files["image"].content))
    assert b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in files["image"].content  # from a photograph
    assert getattr(Image.open(io.BytesIO(files["video"].content)), "n_frames", 1) >= 2
    assert not any("input" in name for name in stored(running, job))
    everything = caplog.text + running.client.get("/metrics").text + running.client.get("/v1/datasets").text
    assert "patient" not in everything and "dermis_projection_jobs" in everything
    assert running.client.get("/v1/datasets").json()["data"] == []  # it is no dataset, and there is no list
    assert running.client.get("/v1/projections").status_code == 405
    assert running.client.get(f"/v1/datasets/{job['id']}").status_code == 404
    assert running.client.get(f"/v1/projections/{job['id']}/files/projections.json").status_code == 404
    assert running.client.delete(f"/v1/projections/{job['id']}").status_code == 204
    assert stored(running, job) == [] and running.client.get(f"/v1/projections/{job['id']}").status_code == 404


@pytest.mark.full
def test_running_projection_shows_its_image_and_leaves_nothing(running: Service) -> None:
    picture = encode(noise(1, seed=9)[0])
    running.projector.previews = [ProjectionPreview(0, 40, [(1, 2.5), (40, 1.25)], picture)]
    running.projector.gate.clear()
    job = ask(running, noise(1))
    path = f"/v1/projections/{job['id']}"
    wait_for(lambda: running.client.get(path).json().get("previews"))
    address = f"{path}/files/preview-00000.png"
    assert running.client.get(path).json()["previews"] == [
        {
            "index": 0,
            "step": 40,
            "distance": 1.25,
            "distances": [{"step": 1, "distance": 2.5}, {"step": 40, "distance": 1.25}],
            "file": address,
        }
    ]
    shown = running.client.get(address)
    assert (shown.status_code, shown.content, shown.headers["cache-control"]) == (200, picture, "no-store")
    assert running.client.get(f"{path}/files/preview-00001.png").status_code == 404
    running.projector.gate.set()
    assert wait(running, job)["state"] == "succeeded"
    assert "preview" not in running.client.get(path).text
    assert running.client.get(address).status_code == 404
    assert not any("preview" in name for name in stored(running, job))


@pytest.mark.full
def test_preview_that_cannot_be_stored_does_not_stop_the_projection(
    running: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def refuse(self: Store, name: str, data: bytes) -> None:
        if "preview" in name:
            refused.append(name)
            raise StorageError(f"{name}: no space left", kind="storage-full")
        write(self, name, data)

    write = Store.write
    monkeypatch.setattr(Store, "write", refuse)
    running.projector.previews = [ProjectionPreview(0, 1, [(1, 2.0)], encode(noise(1)[0]))]
    running.projector.gate.clear()
    job = ask(running, noise(1))
    wait_for(lambda: refused)
    running.projector.gate.set()
    assert wait(running, job)["state"] == "succeeded"


def test_idempotency_key_returns_same_job_and_refuses_other_body(running: Service) -> None:
    first = ask(running, noise(1), **{"Idempotency-Key": "k"})
    again = ask(running, noise(1), **{"Idempotency-Key": "k"})
    assert again["id"] == first["id"]
    files = [("files", ("x.png", encode(noise(1, seed=4)[0]), "image/png"))]
    other = running.client.post("/v1/projections?steps=3", files=files, headers={"Idempotency-Key": "k"})
    assert other.status_code == 409
    assert wait(running, first)["state"] == "succeeded"
    folders = [path.name for path in Path(running.settings.storage).iterdir()]
    assert folders == [first["id"]]


def test_job_waits_for_unavailable_projector(running: Service) -> None:
    running.projector.failures.append(InferenceUnavailableError("away"))
    assert wait(running, ask(running, noise(1)))["state"] == "succeeded"
    assert running.projector.calls == 2


def test_deleting_running_projection_removes_its_images(running: Service) -> None:
    running.projector.previews = [ProjectionPreview(0, 1, [(1, 2.0)], encode(noise(1)[0]))]
    running.projector.gate.clear()
    job = ask(running, noise(2))
    wait_for(lambda: running.projector.calls == 1)
    assert any("input" in name for name in stored(running, job))
    wait_for(lambda: any("preview" in name for name in stored(running, job)))
    wait_for(lambda: running.client.get(f"/v1/projections/{job['id']}").json()["progress"]["steps_done"] == 1)
    assert running.client.get(f"/v1/projections/{job['id']}").json()["state"] == "running"
    assert running.client.delete(f"/v1/projections/{job['id']}").status_code == 204
    assert running.client.get(f"/v1/projections/{job['id']}").status_code == 404
    assert running.client.delete(f"/v1/projections/{job['id']}").status_code == 404
    wait_for(lambda: running.projector.cancelled and stored(running, job) == [])
    running.projector.gate.set()
    wait_for(lambda: not running.ctx.table.active())
    running.jobs.projections.remove_expired(3600)
    assert running.ctx.table.get(job["id"]) is None


def test_ended_projections_expire_and_datasets_do_not(running: Service) -> None:
    job = wait(running, ask(running, noise(1)))
    dataset = running.wait(running.ask({"model": "tiny", "classes": {"benign": 1}}))
    running.jobs.projections.remove_expired(3600)
    assert running.client.get(f"/v1/projections/{job['id']}").json()["expires_at"] > job["finished_at"]
    running.jobs.projections.remove_expired(-1)
    assert running.client.get(f"/v1/projections/{job['id']}").status_code == 404
    assert stored(running, job) == []
    assert running.client.get(dataset["links"]["self"]).status_code == 200


def test_projection_job_resumes_after_restart(bundle: Bundle, tmp_path: Path) -> None:
    with service(bundle.location, tmp_path / "data") as first:
        first.projector.gate.clear()
        job = ask(first, noise(9))
        wait_for(lambda: first.projector.calls == 1)
        first.ctx.stopping.set()
    with service(bundle.location, tmp_path / "data") as second:
        finished = wait(second, job)
        assert finished["state"] == "succeeded" and len(finished["data"]) == 9


def test_a_projection_can_be_edited(running: Service, bundle: Bundle) -> None:
    job = wait(running, ask(running, noise(2)))
    body = {
        "projections": [{"id": job["id"], "image": 1}],
        "sweep": {"direction": "axis-1", "strengths": [-1.0, 0.0, 1.0]},
    }
    rows = running.client.post("/v1/edits", json=body).json()["data"]
    latents = from_bytes(running.client.get(job["data"][1]["files"]["latents"]).content, "x")[0].ws[None]
    known = {direction.name: direction for direction in bundle.directions}
    moved = [apply_edits(latents, [Edit("axis-1", strength)], known) for strength in (-1.0, 0.0, 1.0)]
    with Synthesizer(bundle, device="cpu", threads=1) as synthesizer:
        expected = synthesizer.images_from_ws(np.concatenate(moved))
    import base64

    assert [np.array_equal(decode(base64.b64decode(r["b64"])), e) for r, e in zip(rows, expected, strict=True)] == [
        True
    ] * 3
    for row, strength in zip(rows, ("-1", "0", "1"), strict=True):
        data = base64.b64decode(row["b64"])
        assert b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in data
        assert f'dermis:edits="axis-1={strength}"'.encode() in data and b"dermis:seed" not in data
    placed = running.client.post("/v1/embeddings/projections", json={"projections": body["projections"]}).json()["data"]
    with Checker(bundle, device="cpu", threads=1) as checker:
        position = training_map(checker.index).project(checker.nearest(expected[1:2]).embeddings)
    np.testing.assert_allclose([placed[0]["position"]], position, atol=6e-4)  # where the reconstruction is
    assert placed[0].keys() == {"index", "position"}
    missing = {"projections": [{"id": f"pr_{'0' * 32}"}]}
    assert running.client.post("/v1/embeddings/projections", json=missing).status_code == 404
    for change, field in (
        ({"projections": [{"id": job["id"], "image": 2}]}, "projections.0.image"),
        ({"samples": [{"class": "benign"}]}, "body"),
        ({"model": "plain", "sweep": None}, "projections.0.id"),
    ):
        refused = running.client.post("/v1/edits", json={**body, **change})
        assert refused.status_code == 422 and field in str(refused.json()["errors"]), refused.text


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("class=naevus", 422, "class"),
        ("start=encoder", 422, "start"),
        ("steps=5000", 422, "steps"),
        ("schedule=slow", 422, "schedule"),
        ("model=nobody", 404, "model"),
    ],
)
def test_refused_projection_request_leaves_no_files(running: Service, query: str, status: int, field: str) -> None:
    files = [("files", ("x.png", encode(noise(1)[0]), "image/png"))]
    answer = running.client.post(f"/v1/projections?{query}", files=files)
    assert answer.status_code == status and field in answer.text
    many = [("files", ("x.png", encode(noise(1)[0]), "image/png"))] * 21
    assert running.client.post("/v1/projections", files=many).status_code == 422
    assert not list(Path(running.settings.storage).iterdir())


def test_upload_that_cannot_be_stored_leaves_no_job(running: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("the storage is full", kind="storage-full")

    monkeypatch.setattr("services.jobs.projection.write_inputs", full)
    files = [("files", ("x.png", encode(noise(1)[0]), "image/png"))]
    assert running.client.post("/v1/projections", files=files).status_code == 507
    assert running.ctx.table.active() == [] and not list(Path(running.settings.storage).iterdir())


@pytest.mark.full
def test_projection_succeeds_while_its_progress_is_unknown(running: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(_ticket: str) -> tuple[int, list[ProjectionPreview]]:
        raise InferenceUnavailableError("no answer")

    running.projector.gate.clear()
    monkeypatch.setattr(running.projector, "progress", silent)
    job = ask(running, noise(1))
    wait_for(lambda: running.projector.calls == 1)
    time.sleep(1.5)  # it has been called by then
    running.projector.gate.set()
    assert wait(running, job)["state"] == "succeeded"
