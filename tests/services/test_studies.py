"""Tests of reader studies: from the upload of real images to the results, and what readers cannot find out."""

from __future__ import annotations

import csv
import io
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from dermis.bundle import Bundle
from dermis.dataset.store import Store
from dermis.errors import StorageError
from dermis.imaging import decode, encode
from service_kit import Service, service, wait_for
from services.gateway.auth.principal import DEFAULT_SCOPES, SCOPES
from services.observed_store import ObservedStore
from services.studies import preparer, results

SEED = 987654321987  # long enough to be searched for in what readers get


def picture(number: int, side: int = 24) -> bytes:
    """A real image of another size than the bundle's; smooth ones are compressed better than generated noise."""
    ramp = np.linspace(0, 200, side, dtype=np.uint8)
    image = np.stack(
        [np.add.outer(ramp // 2, ramp // 2), np.full((side, side), number), np.full((side, side), 90)], axis=2
    )
    return encode(image.astype(np.uint8), "jpeg")


@pytest.fixture(scope="module")
def real_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for number, name in enumerate(("benign", "malignant", "benign", "malignant", "other")):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"patient-{number}.jpg").write_bytes(picture(number))
    return folder


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle, real_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    values = {"auth": "keys", "max_studies": 4, "max_study_images": 12, "study_real_images": f"derma={real_folder}"}
    quotas = {"small": {"stored_bytes": 2000}, "tight": {"stored_bytes": 100}}
    with service(tiny_bundle.location, tmp_path_factory.mktemp("data"), quotas=quotas, **values) as running:
        yield running


class Owner:
    """Someone with a key that has the scope of studies."""

    def __init__(self, served: Service, tenant: str) -> None:
        keys = served.client.app.state.context.auth.keys  # type: ignore[attr-defined]
        self._client = served.client
        self._key = keys.create(tenant=tenant, name="n", scopes=("studies",), created_by="test")[1]

    def send(self, method: str, path: str, **values: Any) -> Any:
        return self._client.request(method, path, headers={"Authorization": f"Bearer {self._key}"}, **values)

    def upload(self, study: dict[str, Any], class_name: str, *numbers: int) -> Any:
        files = [("files", ("name of a patient.jpg", picture(number), "image/jpeg")) for number in numbers]
        return self.send("post", f"/v1/studies/{study['id']}/images", params={"class": class_name}, files=files)

    def wait(self, study: dict[str, Any], state: str = "open") -> dict[str, Any]:
        path = f"/v1/studies/{study['id']}"
        wait_for(lambda: self.send("get", path).json()["state"] in (state, "failed"))
        body: dict[str, Any] = self.send("get", path).json()
        assert body["state"] == state, body
        return body

    def invite(self, study: dict[str, Any], label: str, **values: Any) -> dict[str, Any]:
        answer = self.send("post", f"/v1/studies/{study['id']}/invitations", json={"label": label, **values})
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body


class Reader:
    """Someone who has only the link."""

    def __init__(self, served: Service, invitation: dict[str, Any]) -> None:
        self._client, self.token = served.client, invitation["path"].partition("#")[2]

    def send(self, method: str, path: str, **values: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"}
        return self._client.request(method, f"/v1/reading{path}", headers=headers, **values)

    def image(self, position: int) -> bytes:
        answer = self.send("get", f"/images/{position}")
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store"), answer.text
        return bytes(answer.content)

    def answer(self, position: int, answer: str, confidence: int = 3, seconds: float = 1.5) -> Any:
        body = {"answer": answer, "confidence": confidence, "seconds": seconds}
        return self.send("put", f"/answers/{position}", json=body)


@pytest.fixture(scope="module")
def owner(served: Service) -> Owner:
    return Owner(served, "default")


@pytest.fixture(scope="module")
def study(owner: Owner) -> dict[str, Any]:
    """An open study of 8 images with uploaded real ones."""
    created = owner.send("post", "/v1/studies", json={"name": "Pilot", "images": 8, "seed": SEED})
    assert created.status_code == 201, created.text
    body: dict[str, Any] = created.json()
    assert (body["state"], created.headers["location"]) == ("collecting", f"/v1/studies/{body['id']}")
    refused = owner.send("post", f"/v1/studies/{body['id']}/open")
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "real_images")
    assert owner.upload(body, "benign", 1, 2, 3, 4).json()["added"] == 4
    assert owner.upload(body, "benign", 1, 2).json()["added"] == 0  # a repeated call
    uploaded = owner.upload(body, "malignant", 5, 6).json()
    assert {name: each["uploaded"] for name, each in uploaded["study"]["classes"].items()} == {
        "benign": 4,
        "malignant": 2,
    }
    assert owner.send("post", f"/v1/studies/{body['id']}/open").json()["state"] == "preparing"
    body = owner.wait(body)
    assert owner.upload(body, "benign", 7).status_code == 409
    return body


def truths(owner: Owner, study: dict[str, Any]) -> dict[int, str]:
    """The truth by number of the image, of the images that were answered."""
    rows = owner.send("get", f"/v1/studies/{study['id']}/answers").json()["data"]
    return {row["image"]: row["truth"] for row in rows}


def test_both_halves_have_the_same_classes_and_no_file_shows_what_it_is(
    served: Service, owner: Owner, study: dict[str, Any]
) -> None:
    assert study["classes"] == {
        "benign": {"uploaded": None, "real": 3, "generated": 3},
        "malignant": {"uploaded": None, "real": 1, "generated": 1},
    }
    reader = Reader(served, owner.invite(study, "A"))
    started = reader.send("get", "")
    assert started.json()["images"] == 8 and started.json()["answers"] == []
    images = []
    for position in range(1, 9):
        images.append(reader.image(position))
        assert reader.answer(position, "real").json()["answered"] == position
    assert len(set(images)) == 8
    for image in images:
        chunks, at = [], 8
        while at < len(image):
            (length,) = struct.unpack(">I", image[at : at + 4])
            chunks.append((image[at + 4 : at + 8], length))
            at += 12 + length
        # 16 rows of a filter and 16 x 3 values, in one block of deflate (5 bytes) and the zlib header and checksum (6).
        assert chunks == [(b"IHDR", 13), (b"IDAT", 16 * 49 + 11), (b"IEND", 0)]
        assert decode(image).shape == (16, 16, 3)
    answered = started.text + reader.send("get", "").text
    for secret in (str(SEED), "truth", "benign", "malignant", "patient", "seed"):
        assert secret not in answered
    truth = truths(owner, study)
    assert sorted(truth.values()) == ["generated"] * 4 + ["real"] * 4
    owner.send("delete", f"/v1/studies/{study['id']}/invitations/{reader.token.split('_')[2]}")


def test_reader_sees_only_the_next_image_and_continues_after_a_reload(
    served: Service, owner: Owner, study: dict[str, Any]
) -> None:
    reader, other = (Reader(served, owner.invite(study, label)) for label in ("B", "C"))
    assert reader.send("get", "/images/3").json()["type"].endswith("answer-order")
    assert reader.answer(2, "real").status_code == 409
    assert reader.answer(1, "generated", 5, 2.25).json() == {"answered": 1, "images": 8}
    for _ in range(3):  # changed, and sent again because the answer of the service was lost
        assert reader.answer(1, "real", 2, 3.5).json()["answered"] == 1
    again = Reader(served, {"path": f"/study#{reader.token}"}).send("get", "").json()
    assert again["answers"] == [{"position": 1, "answer": "real", "confidence": 2, "seconds": 3.5}]
    assert reader.send("get", "/images/3").status_code == 200  # loaded ahead
    assert reader.send("get", "/images/4").status_code == 409
    for position in (0, 9, 99):
        assert reader.send("get", f"/images/{position}").status_code in (404, 422)
    for wrong in ({"answer": "maybe"}, {"confidence": 6}, {"confidence": True}, {"seconds": -1}, {"seconds": 1e9}):
        body = {"answer": "real", "confidence": 3, "seconds": 1, **wrong}
        assert reader.send("put", "/answers/2", json=body).status_code == 422, wrong
    # Each reader has another order, so positions of two readers are different images.
    for each in (reader, other):
        for position in range(1, 9):
            assert each.answer(position, "real").status_code == 200
    rows = owner.send("get", f"/v1/studies/{study['id']}/answers").json()["data"]
    orders = [[row["image"] for row in rows if row["reader"] == label] for label in ("B", "C")]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == list(range(1, 9))
    assert next(row for row in rows if row["reader"] == "B" and row["position"] == 1)["changes"] == 2


def test_link_opens_one_study_until_it_is_revoked_and_nothing_else(
    served: Service, owner: Owner, study: dict[str, Any]
) -> None:
    invitation = owner.invite(study, "D")
    reader = Reader(served, invitation)
    assert reader.send("get", "").status_code == 200
    client = served.client
    bearer = {"Authorization": f"Bearer {reader.token}"}
    for path in ("/v1/studies", f"/v1/studies/{study['id']}", "/v1/models", "/v1/usage"):
        assert client.get(path, headers=bearer).status_code == 401, path
    wrong = [reader.token[:-1] + ("A" if reader.token[-1] != "A" else "B"), reader.token[:-1], "", "x" * 66]
    for token in wrong:
        assert Reader(served, {"path": f"#{token}"}).send("get", "").status_code == 401
    with sa.create_engine(served.settings.jobs_url).connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM dermis_study_invitations")).all()
    assert not any(reader.token[23:] in str(value) for row in rows for value in row)
    listed = owner.send("get", f"/v1/studies/{study['id']}/invitations")
    assert reader.token[23:] not in listed.text
    path = f"/v1/studies/{study['id']}/invitations/{invitation['id']}"
    assert owner.send("delete", path).json()["state"] == "revoked"
    trail = served.client.app.state.context.audit.writer.table  # type: ignore[attr-defined]
    recorded = [(entry.action, entry.object, entry.detail) for entry in trail.page(1000) if entry.object == study["id"]]
    for action in ("invitation.create", "invitation.revoke"):
        assert (action, study["id"], f"invitation {invitation['id']}") in recorded
    refused = reader.send("get", "")
    assert (refused.status_code, "revoked" in refused.json()["detail"]) == (401, True)
    expiring = Reader(served, owner.invite(study, "E", expires_in_days=1e-7))
    time.sleep(0.05)
    assert "expired" in expiring.send("get", "").json()["detail"]


def test_results_and_exports_are_those_of_the_answers(served: Service, owner: Owner, study: dict[str, Any]) -> None:
    """One reader is always right, the other always says generated."""
    for invitation in owner.send("get", f"/v1/studies/{study['id']}/invitations").json()["data"]:
        assert owner.send("delete", f"/v1/studies/{study['id']}/invitations/{invitation['id']}").status_code == 200
    created = owner.send("post", "/v1/studies", json={"name": "Second", "images": 4}).json()
    owner.upload(created, "benign", 1, 2)
    owner.send("post", f"/v1/studies/{created['id']}/open")
    owner.wait(created)
    for label in ("=1+1", "always"):
        reader = Reader(served, owner.invite(created, label))
        for position in range(1, 5):
            reader.answer(position, "generated", 4, 2.0 * position)
        if label == "=1+1":
            rows = owner.send("get", f"/v1/studies/{created['id']}/answers").json()["data"]
            for row in rows:
                reader.answer(row["position"], row["truth"], 5, 2.0 * row["position"])
    body = owner.send("get", f"/v1/studies/{created['id']}/results").json()
    first, second = body["readers"]
    assert (first["rates"]["accuracy"]["share"], second["rates"]["accuracy"]["share"]) == (1.0, 0.5)
    assert second["rates"]["sensitivity"]["count"] == 2 and second["rates"]["specificity"]["count"] == 0
    assert (first["auc"], second["auc"], second["median_seconds"]) == (1.0, 0.5, 5.0)
    assert body["rates"]["accuracy"]["count"] == 6 and body["rates"]["accuracy"]["total"] == 8
    # Fleiss (1971): P = (1 + 1 + 0 + 0) / 4, shares 6/8 and 2/8, so (1/2 - 5/8) / (1 - 5/8) = -1/3. Cohen (1960): 0.
    assert body["agreement"]["fleiss_kappa"] == pytest.approx(-1 / 3)
    assert body["agreement"]["pairs"] == [{"first": "=1+1", "second": "always", "kappa": 0.0}]
    for path in ("", "/results", "/answers", "/answers?format=csv", "/invitations"):
        assert owner.send("get", f"/v1/studies/{created['id']}{path}").headers["cache-control"] == "no-store", path
    text = owner.send("get", f"/v1/studies/{created['id']}/answers?format=csv")
    assert text.headers["content-type"].startswith("text/csv")
    table = list(csv.DictReader(io.StringIO(text.text)))
    assert len(table) == 8 and table[0]["reader"] == "'=1+1" and {row["right"] for row in table[:4]} == {"1"}
    closed = owner.send("post", f"/v1/studies/{created['id']}/close").json()
    assert closed["state"] == "closed" and reader.answer(1, "real").status_code == 409
    hidden = reader.send("get", "/images/1")
    assert hidden.status_code == 409 and "ended" in hidden.json()["detail"]
    assert len(reader.send("get", "").json()["answers"]) == 4
    assert owner.send("post", f"/v1/studies/{created['id']}/invitations", json={"label": "F"}).status_code == 409
    assert owner.send("delete", f"/v1/studies/{created['id']}").status_code == 204
    assert not (Path(served.settings.storage) / created["id"]).exists()
    assert owner.send("get", f"/v1/studies/{created['id']}/results").status_code == 404
    assert reader.send("get", "").status_code == 401


def test_folder_of_the_operator_is_for_its_tenant_only(served: Service, owner: Owner) -> None:
    derma = Owner(served, "derma")
    assert derma.send("get", "/v1/studies").json()["folder_of_real_images"]
    assert not owner.send("get", "/v1/studies").json()["folder_of_real_images"]
    body = {"name": "Folder", "images": 8, "real_images": "folder", "equal_classes": True}
    assert owner.send("post", "/v1/studies", json=body).status_code == 422
    study = derma.wait(derma.send("post", "/v1/studies", json=body).json())
    assert study["classes"]["malignant"] == {"uploaded": None, "real": 2, "generated": 2}
    assert owner.send("get", f"/v1/studies/{study['id']}").status_code == 404
    too_many = derma.send("post", "/v1/studies", json=body | {"images": 10})
    assert (too_many.status_code, len(derma.send("get", "/v1/studies").json()["data"])) == (422, 1)


def test_limits_and_quotas_are_kept(served: Service) -> None:
    small = Owner(served, "small")
    for wrong in ({"images": 3}, {"images": 14}, {"name": ""}, {"name": "a\nb"}, {"seed": -1}, {"real_images": "web"}):
        assert small.send("post", "/v1/studies", json={"name": "n", "images": 4, **wrong}).status_code == 422, wrong
    study = small.send("post", "/v1/studies", json={"name": "n", "images": 2}).json()
    assert small.upload(study, "benign", 1).status_code == 200
    refused = small.send("post", f"/v1/studies/{study['id']}/open")
    assert refused.json()["quota"]["name"] == "stored_bytes"
    assert small.upload(study, "nothing", 2).status_code == 422
    for _ in range(3):
        assert small.send("post", "/v1/studies", json={"name": "n", "images": 2}).status_code == 201
    assert small.send("post", "/v1/studies", json={"name": "n", "images": 2}).status_code == 429


def test_refused_and_failed_uploads_leave_neither_files_nor_rows(
    served: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(study: dict[str, Any], tenant: str = "") -> list[str]:
        folder = Path(served.settings.storage) / tenant / study["id"]
        return sorted(path.name for path in folder.rglob("*") if path.is_file())

    tight = Owner(served, "tight")
    study = tight.send("post", "/v1/studies", json={"name": "n", "images": 2}).json()
    for _ in range(2):
        assert tight.upload(study, "benign", 1, 2).json()["quota"]["name"] == "stored_bytes"
    assert stored(study, "tenants/tight") == []

    study = owner.send("post", "/v1/studies", json={"name": "n", "images": 4}).json()
    assert owner.upload(study, "benign", *range(0, 260, 20)).json()["type"].endswith("request-too-large")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "free_bytes", lambda self: 100)
        assert owner.upload(study, "benign", 1, 2).status_code == 507
    write, written = ObservedStore.write, []

    def fail(self: ObservedStore, name: str, data: bytes) -> None:
        if len(written) == 1:
            raise StorageError("no space left", "storage-full")
        written.append(name)
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(ObservedStore, "write", fail)
        assert owner.upload(study, "benign", 1, 2).status_code == 507
    assert len(written) == 1 and stored(study) == []
    counted = served.client.app.state.context.studies.table.get("default", study["id"])  # type: ignore[attr-defined]
    assert counted.stored_bytes == 0
    assert owner.upload(study, "benign", 1, 2).json()["added"] == 2
    assert len(stored(study)) == 2
    owner.send("delete", f"/v1/studies/{study['id']}")


def test_row_without_file_is_completed_and_file_without_row_is_removed(
    served: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process ends between rows and files, and a study is opened between the two steps of another call."""
    studies = served.client.app.state.context.studies  # type: ignore[attr-defined]
    study = owner.send("post", "/v1/studies", json={"name": "n", "images": 4}).json()
    folder = Path(served.settings.storage) / study["id"]
    assert owner.upload(study, "benign", 1, 2).json()["added"] == 2
    next(folder.glob("upload-*")).unlink()
    refused = owner.send("post", f"/v1/studies/{study['id']}/open").json()["errors"][0]
    assert (refused["field"], "upload them again" in refused["message"]) == ("real_images", True)
    size = studies.table.get("default", study["id"]).stored_bytes
    assert owner.upload(study, "benign", 1, 2).json()["added"] == 0
    assert len(list(folder.glob("upload-*"))) == 2
    assert studies.table.get("default", study["id"]).stored_bytes == size
    (folder / f"upload-{'0' * 64}.png").write_bytes(b"left over")
    write, opened = ObservedStore.write, []

    def open_before(self: ObservedStore, name: str, data: bytes) -> None:
        if name.startswith("upload-") and not opened:
            opened.append(studies.open(studies.table.get("default", study["id"])).state)
            wait_for(lambda: studies.table.get("default", study["id"]).state == "open")
        write(self, name, data)

    monkeypatch.setattr(ObservedStore, "write", open_before)
    late = owner.upload(study, "benign", 3)
    assert (late.status_code, opened) == (409, ["preparing"])
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == [f"{n:05d}.png" for n in range(4)]
    owner.send("delete", f"/v1/studies/{study['id']}")


def test_results_are_kept_until_an_answer_changes_and_few_are_computed_at_a_time(
    served: Service, owner: Owner, study: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, path = Reader(served, owner.invite(study, "R")), f"/v1/studies/{study['id']}/results"
    computed: list[str] = []
    compute = results.results_of
    monkeypatch.setattr(results, "results_of", lambda *args: computed.append(args[0].id) or compute(*args))
    reader.answer(1, "real", 2)
    first, second = (owner.send("get", path).json() for _ in range(2))
    assert first == second and computed == [study["id"]]
    reader.answer(1, "generated", 2)
    assert owner.send("get", path).json() != first and len(computed) == 2
    limit = served.client.app.state.context.limits.study_results  # type: ignore[attr-defined]
    with limit.hold("default"), limit.hold("default"), limit.hold("default"):
        busy = owner.send("get", path)
    assert (busy.status_code, busy.headers["retry-after"]) == (503, "5")
    assert owner.send("get", path).status_code == 200


def test_studies_are_no_default_scope() -> None:
    assert "studies" in SCOPES and "studies" not in DEFAULT_SCOPES


@pytest.mark.full  # two starts of a service
def test_interrupted_preparation_continues_and_expired_study_is_removed(
    tiny_bundle: Bundle, real_folder: Path, tmp_path: Path
) -> None:
    """The generator fails in the middle, and the service restarts."""
    folder = {"study_real_images": f"*={real_folder}"}
    body = {"name": "n", "images": 8, "real_images": "folder", "seed": 5}
    with service(tiny_bundle.location, tmp_path / "data", **folder) as running:
        running.generator.gate.clear()
        study = running.client.post("/v1/studies", json=body).json()
        time.sleep(0.2)
        assert running.client.get(f"/v1/studies/{study['id']}").json()["state"] == "preparing"
        token = running.client.post(f"/v1/studies/{study['id']}/invitations", json={"label": "A"}).json()["token"]
        waiting = running.client.get("/v1/reading", headers={"Authorization": f"Bearer {token}"})
        assert waiting.json()["state"] == "preparing"
        running.client.app.state.context.stopping.set()  # type: ignore[attr-defined]
    with service(tiny_bundle.location, tmp_path / "data", **folder) as running:
        path = f"/v1/studies/{study['id']}"
        wait_for(lambda: running.client.get(path).json()["state"] == "open")
        reader = Reader(running, {"path": f"/study#{token}"})
        assert len(reader.image(1)) == len(reader.image(2))
        with sa.create_engine(running.settings.jobs_url).begin() as connection:
            connection.execute(sa.text("UPDATE dermis_studies SET expires_at = 1"))
        assert reader.send("get", "").status_code == 401
        studies = running.client.app.state.context.studies  # type: ignore[attr-defined]
        assert [each.id for each in studies.table.to_delete()] == [study["id"]]
    with service(
        tiny_bundle.location, tmp_path / "data", max_studies=0
    ) as running:  # they expire also if new ones are off
        table = running.client.app.state.context.studies.table  # type: ignore[attr-defined]
        wait_for(lambda: not table.to_delete())
        assert not (Path(running.settings.storage) / study["id"]).exists()


def test_study_that_cannot_be_removed_does_not_keep_the_others(
    served: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    derma, studies = Owner(served, "derma-two"), served.client.app.state.context.studies  # type: ignore[attr-defined]
    made = [derma.send("post", "/v1/studies", json={"name": "n", "images": 4}).json()["id"] for _ in range(2)]
    stored = [study for study in (studies.table.get("derma-two", each) for each in made) if study is not None]
    monkeypatch.setattr(studies.table, "to_delete", lambda: stored)
    remove = preparer.remove_study

    def failing(table: Any, storage: str, study: Any) -> None:
        if study.id == made[0]:
            raise StorageError("no permission")
        remove(table, storage, study)

    monkeypatch.setattr(preparer, "remove_study", failing)
    preparer.StudyPreparer(studies.table, served.settings, served.models, None)._remove_ended()  # type: ignore[arg-type]
    assert [studies.table.get("derma-two", each) is None for each in made] == [False, True]
    studies.table.record_opened(made[1], 1)  # by a process that was preparing it: nothing is left to open
    assert derma.send("delete", f"/v1/studies/{made[0]}").status_code == 204


def test_study_whose_creation_was_interrupted_can_be_opened(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    derma, studies = Owner(served, "derma"), served.client.app.state.context.studies  # type: ignore[attr-defined]
    body = {"name": "Interrupted", "images": 4, "real_images": "folder"}
    with monkeypatch.context() as ending:  # as if the process ended before the images were chosen
        ending.setattr(studies, "_prepare", lambda *_: 1 / 0)
        ending.setattr(studies.table, "delete", lambda _: None)
        assert derma.send("post", "/v1/studies", json=body).status_code == 500
    listed = derma.send("get", "/v1/studies").json()["data"]
    (study,) = [each for each in listed if each["name"] == "Interrupted"]
    assert study["state"] == "collecting"
    assert derma.send("post", f"/v1/studies/{study['id']}/open").json()["state"] == "preparing"
    derma.wait(study)
    assert derma.send("delete", f"/v1/studies/{study['id']}").status_code == 204


def test_study_with_a_lasting_error_fails_in_the_end(served: Service) -> None:
    derma, table = Owner(served, "derma"), served.client.app.state.context.studies.table  # type: ignore[attr-defined]
    served.generator.gate.clear()
    try:
        study = derma.send("post", "/v1/studies", json={"name": "n", "images": 4, "real_images": "folder"}).json()
        for _ in range(3):  # each attempt begins and ends like this
            assert table.record_prepared(study["id"], {})
            table.record_failure(study["id"], "the storage could not be read or written", 3)
    finally:
        served.generator.gate.set()
    derma.wait(study, "failed")
    assert derma.send("delete", f"/v1/studies/{study['id']}").status_code == 204


def test_images_for_readers_are_limited_to_few_at_a_time(served: Service, owner: Owner, study: dict[str, Any]) -> None:
    reader = Reader(served, owner.invite(study, "L"))
    limit = served.client.app.state.context.limits.study_images  # type: ignore[attr-defined]
    with ExitStack() as held:
        for _ in range(6):
            held.enter_context(limit.hold("default"))
        busy = reader.send("get", "/images/1")
        assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
    reader.image(1)


def test_study_that_is_deleted_while_it_is_prepared_leaves_no_files(served: Service) -> None:
    derma = Owner(served, "derma")
    served.generator.gate.clear()
    calls = served.generator.calls
    study = derma.send("post", "/v1/studies", json={"name": "n", "images": 4, "real_images": "folder"}).json()
    time.sleep(1.3)  # the preparation has begun
    assert derma.send("delete", f"/v1/studies/{study['id']}").status_code == 204
    served.generator.gate.set()
    other = derma.wait(
        derma.send("post", "/v1/studies", json={"name": "m", "images": 4, "real_images": "folder"}).json()
    )
    folders = {path.name for path in (Path(served.settings.storage) / "tenants" / "derma").iterdir()}
    assert study["id"] not in folders and other["id"] in folders and served.generator.calls > calls


def test_page_of_readers_holds_no_secret_and_loads_nothing_from_elsewhere(served: Service) -> None:
    page = served.client.get("/study")
    assert page.status_code == 200 and "connect-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "no-referrer"
    script = served.client.get("/study/reader.js")
    style = served.client.get("/study/reader.css")
    assert "javascript" in script.headers["content-type"]
    for text in (page.text, script.text, style.text):
        assert "http://" not in text and "https://" not in text and "//cdn" not in text
