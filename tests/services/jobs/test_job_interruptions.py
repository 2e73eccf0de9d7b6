"""Tests of jobs during interruptions of the database and the storage: a transient error never decides the outcome of a job."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

import flaky_storage
from benchmarks.components.postgres import Postgres
from dermis.bundle import Bundle, open_bundle
from dermis.dataset import shards
from dermis.dataset.store import Store, storage_error
from dermis.errors import BundleError, StorageError
from dermis.imaging import encode
from flaky_storage import EndpointConnectionError, failing
from service_kit import Service, make_directly, service, wait_for
from services import models
from services.errors import (
    BundleAwayError,
    DatabaseUnavailableError,
    InferenceMemoryError,
    InferenceUnavailableError,
    InferenceUnreachableError,
)
from services.jobs import context, execution, projection, workflow
from services.jobs.database import database_errors
from services.jobs.lease import Lease
from services.jobs.service import ProjectionJobs
from services.jobs.table import JobTable

REQUEST: dict[str, Any] = {"classes": {"benign": 70, "malignant": 30}, "seed": 3, "shard_size": 9}


@pytest.fixture(autouse=True)
def storage() -> Iterator[None]:
    flaky_storage.FlakyFileSystem.store.clear()
    flaky_storage.FlakyFileSystem.pseudo_dirs[:] = [""]
    yield


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_FIRST_PAUSE_SECONDS", 0.01)


def stored(running: Service, job_id: str) -> dict[str, bytes]:
    store = Store(f"{running.settings.storage}/{job_id}")
    return {name: store.read(name) for name in store.entries()}


def expected(bundle: Bundle, folder: Path, **changes: Any) -> dict[str, bytes]:
    return make_directly(bundle, REQUEST | {"model": bundle.name} | changes, folder)


def project(running: Service, images: int = 3, **headers: str) -> dict[str, Any]:
    squares = np.random.default_rng(0).integers(0, 256, (images, 20, 20, 3), dtype=np.uint8)
    files = [("files", (f"{i}.png", encode(square), "image/png")) for i, square in enumerate(squares)]
    answer = running.client.post("/v1/projections?steps=3", files=files, headers=headers)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def end_of(running: Service, job: Mapping[str, Any]) -> dict[str, Any]:
    path, last = f"/v1/projections/{job['id']}", {"state": None}
    wait_for(lambda: last.update(running.client.get(path).json()) or last["state"] in ("succeeded", "failed"))
    return last


def assert_says_that_the_database_is_away(running: Service, *paths: str) -> None:
    for path in ("/readyz", *paths):
        answer = running.client.get(path)
        assert answer.status_code == 503, answer.text
        assert answer.headers["Retry-After"]
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert "the jobs database cannot be reached" in answer.json()["detail"]
    assert running.client.post("/v1/datasets", json=REQUEST).status_code == 503
    assert running.client.get("/livez").status_code == 200
    assert running.client.get("/metrics").status_code == 200


@pytest.mark.full
@pytest.mark.parametrize(("mode", "seconds"), [("fast", 0.6), pytest.param("immediate", 3.0, marks=pytest.mark.full)])
def test_dataset_job_survives_database_restart(
    tiny_bundle: Bundle, tmp_path: Path, postgres: Postgres, mode: str, seconds: float
) -> None:
    with service(tiny_bundle.location, tmp_path / "data", database_url=postgres.url) as running:
        asked = running.ask(REQUEST)
        running.wait_for_shards(asked, 2)
        running.generator.gate.clear()
        postgres.stop(mode)
        assert_says_that_the_database_is_away(running, asked["links"]["self"], "/v1/datasets")
        running.generator.gate.set()  # the shards at work end while there is no database
        time.sleep(seconds)
        postgres.start()
        wait_for(lambda: running.client.get("/readyz").status_code == 200)
        dataset = running.wait(asked)
        assert dataset["state"] == "succeeded", dataset
        assert dataset["progress"]["samples_done"] == 100
        assert stored(running, asked["id"]) == expected(tiny_bundle, tmp_path / "direct")
        assert running.generator.calls <= 14  # 12 shards of one batch each: what was finished was not made again


@pytest.mark.full
def test_projection_job_survives_database_restart(tiny_bundle: Bundle, tmp_path: Path, postgres: Postgres) -> None:
    with service(tiny_bundle.location, tmp_path / "data", database_url=postgres.url) as running:
        alone = project(running)
        assert end_of(running, alone)["state"] == "succeeded"
        running.projector.gate.clear()
        job = project(running)
        wait_for(lambda: running.projector.calls == 2)
        postgres.stop("immediate")
        time.sleep(1.5)  # its progress has been requested by then
        running.projector.gate.set()
        postgres.start()
        assert end_of(running, job)["state"] == "succeeded"
        assert running.projector.calls == 2
        assert stored(running, job["id"]) == stored(running, alone["id"])


@pytest.mark.full
def test_jobs_survive_restarts_at_any_moment(tiny_bundle: Bundle, tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.url
    with service(tiny_bundle.location, tmp_path / "data", database_url=url, lease_seconds=3) as running:
        asked = [running.ask(REQUEST | {"seed": seed, "shard_size": 3}) for seed in range(4)]
        for mode in ("fast", "immediate", "fast", "immediate"):
            time.sleep(0.7)
            postgres.stop(mode)
            postgres.start()
        for seed, job in enumerate(asked):
            wait_for(lambda job=job: running.client.get(job["links"]["self"]).status_code == 200)  # type: ignore[misc]
            assert running.wait(job)["state"] == "succeeded"
            made = expected(tiny_bundle, tmp_path / f"direct{seed}", seed=seed, shard_size=3)
            assert stored(running, job["id"]) == made


START = """
import sys, threading
from pathlib import Path
from types import SimpleNamespace
from services.jobs.service import JobService
from services.jobs.table import JobTable
from services.settings import Settings
settings = Settings(_env_file=None, data_dir=Path(sys.argv[1]), database_url=sys.argv[2] or None)
ctx = SimpleNamespace(table=JobTable(settings.jobs_url), stopping=threading.Event(), submitting=set())
jobs = JobService(settings, ctx)
print("starting", flush=True)
sys.stdin.readline()
jobs.start()
assert jobs.not_ready() is None
print("up", flush=True)
sys.stdin.readline()
jobs.stop()
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ["postgresql", pytest.param("sqlite", marks=pytest.mark.full)])
def test_four_processes_may_start_at_once_on_an_empty_database(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    url = ""
    if kind == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
            connection.execute("CREATE DATABASE empty")
        url = server.url_of("empty")
    command = [sys.executable, "-c", START, str(tmp_path / "data"), url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    try:
        for process in processes:  # their imports take the most time, and not the same
            assert process.stdout.readline() == "starting\n"
        for process in processes:
            print(file=process.stdin, flush=True)
        lines = [process.stdout.readline() for process in processes]
        errors = [process.communicate("\n", timeout=60)[1] for process in processes]
        assert lines == ["up\n"] * 4, errors
        assert [process.returncode for process in processes] == [0] * 4, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (sa.exc.OperationalError("", None, sqlite3.OperationalError("database is locked")), True),
        (sa.exc.OperationalError("", None, sqlite3.OperationalError("database or disk is full")), False),
        (sa.exc.OperationalError("", None, psycopg.errors.AdminShutdown("terminating connection")), True),
        (sa.exc.InternalError("", None, psycopg.errors.ReadOnlySqlTransaction("a standby")), True),
        (sa.exc.TimeoutError("no connection is free"), True),
        (sa.exc.ProgrammingError("", None, psycopg.errors.SyntaxError("our fault")), False),
        (sa.exc.IntegrityError("", None, sqlite3.IntegrityError("twice")), False),
    ],
)
def test_database_errors_are_classified_as_transient_or_not(error: Exception, transient: bool) -> None:
    with pytest.raises(DatabaseUnavailableError if transient else type(error)), database_errors():
        raise error


class HttpError(Exception):
    """A driver's error with the status of the answer, as gcsfs and aiohttp have them."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class NoCredentialsError(Exception):
    """As botocore's."""


class CredentialRetrievalError(Exception):
    """As botocore's."""


class ClientError(Exception):
    """As botocore's."""

    def __init__(self, status: int) -> None:
        self.response: dict[str, dict[str, Any]] = {
            "Error": {"Code": "x"},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }


@pytest.mark.parametrize(
    ("error", "remote", "kind"),
    [
        (OSError(errno.ENOSPC, "full"), False, "storage-full"),
        (OSError(errno.EDQUOT, "full"), True, "storage-full"),
        (OSError(errno.ESTALE, "stale"), False, "storage-unavailable"),
        (OSError(errno.ENOTEMPTY, "written while it is removed"), False, "storage-unavailable"),
        (OSError(errno.EMFILE, "files"), False, "storage-unavailable"),
        (OSError(errno.EIO, "disk"), False, "storage"),
        (OSError(errno.EIO, "unknown code"), True, "storage-unavailable"),
        (OSError(errno.EBUSY, "SlowDown"), True, "storage-unavailable"),
        (OSError(errno.EINVAL, "InvalidBucketName"), True, "storage"),
        (OSError("connection lost"), True, "storage-unavailable"),
        (TimeoutError("slow"), True, "storage-unavailable"),
        (ConnectionResetError(), True, "storage-unavailable"),
        (PermissionError("AccessDenied"), True, "storage"),
        (FileNotFoundError("NoSuchBucket"), True, "storage"),
        (EndpointConnectionError("no route"), True, "storage-unavailable"),
        (HttpError(503), True, "storage-unavailable"),
        (HttpError(429), True, "storage-unavailable"),
        (HttpError(403), True, "storage"),
        (ClientError(500), True, "storage-unavailable"),
        (ClientError(400), True, "storage"),
        (NoCredentialsError(), True, "storage"),
        (CredentialRetrievalError("time-out"), True, "storage-unavailable"),
        (RuntimeError("..., but the refreshed credentials are still expired."), True, "storage-unavailable"),
        (EndpointConnectionError("no storage of ours"), False, None),
        (TypeError("our fault"), True, None),
    ],
)
def test_errors_of_a_storage_are_transient_final_or_unrelated(error: Exception, remote: bool, kind: str | None) -> None:
    storage_problem = storage_error(error, "s3://bucket/x", remote=remote)
    assert (None if storage_problem is None else storage_problem.kind) == kind


@pytest.mark.parametrize(
    ("seconds", "change", "kind"),
    [
        (3600, 0, "storage-unavailable"),
        (-3600, 0, "storage-unavailable"),
        (0, -3600, "storage-unavailable"),  # corrected after the call was signed
        (60, 0, "storage"),
    ],
)
def test_refusal_because_of_a_wrong_clock_is_transient(seconds: float, change: float, kind: str) -> None:
    refused = ClientError(403)
    refused.response["ResponseMetadata"]["HTTPHeaders"] = {"date": formatdate(time.time() - seconds, usegmt=True)}
    error = PermissionError("Forbidden")
    error.__cause__ = refused
    storage_problem = storage_error(error, "s3://bucket/x", remote=True, clock_change=change)
    assert storage_problem is not None and storage_problem.kind == kind
    assert ("the clock of this machine" in str(storage_problem)) == (kind == "storage-unavailable")


@pytest.mark.full
@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "SlowDown"), EndpointConnectionError("s3.example.com")])
def test_dataset_job_survives_storage_failures(
    tiny_bundle: Bundle, tmp_path: Path, hurried: None, error: Exception
) -> None:
    calls = {"read": 0, "write": 0, "info": 0, "remove": 0}

    def fail(call: str, _path: str) -> Exception | None:
        calls[call] += 1
        return error if calls[call] % 5 == 2 else None

    with service(tiny_bundle.location, tmp_path / "data", storage_url="flaky://bucket/jobs") as running:
        asked = running.ask(REQUEST)
        with failing(fail):
            dataset = running.wait(asked)
        assert dataset["state"] == "succeeded", dataset
        assert stored(running, asked["id"]) == expected(tiny_bundle, tmp_path / "direct")
        assert min(calls.values()) > 0


@pytest.mark.full
@pytest.mark.parametrize("away", ["stale", "unmounted"])
def test_job_waits_while_the_folder_of_its_bundle_is_away(
    tiny_bundle: Bundle,
    tmp_path: Path,
    hurried: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    away: str,
) -> None:
    def stale(_location: str) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    folder = Path(shutil.copytree(tiny_bundle.location, tmp_path / "bundle"))
    monkeypatch.setattr(models, "_CHECK_SECONDS", 0.0)
    with service(folder, tmp_path / "data") as running:
        running.generator.gate.clear()
        asked = running.ask(REQUEST)
        wait_for(lambda: running.client.get(asked["links"]["self"]).json()["state"] == "running")
        with monkeypatch.context() as patch:
            if away == "stale":
                patch.setattr(models, "_fingerprint", stale)
            else:
                folder.rename(tmp_path / "away")
            running.generator.gate.set()
            wait_for(lambda: "work waits" in caplog.text)
            refused = running.client.post("/v1/datasets", json=REQUEST)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5"), refused.text
            assert "cannot be read at the moment" in refused.json()["detail"]
            if away == "unmounted":
                (tmp_path / "away").rename(folder)
        assert running.wait(asked)["state"] == "succeeded"


def test_folder_of_a_bundle_that_comes_back_during_a_check_is_checked_again(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, away = Path(shutil.copytree(tiny_bundle.location, tmp_path / "bundle")), tmp_path / "away"
    monkeypatch.setattr(models, "_CHECK_SECONDS", 0.0)
    served = models.ServedModels([str(folder)], tiny_bundle.name)
    folder.rename(away)

    def come_back(location: str) -> Bundle:
        away.rename(folder)
        monkeypatch.setattr(models, "open_bundle", open_bundle)
        raise BundleError(f"{location}: is not a folder")

    monkeypatch.setattr(models, "open_bundle", come_back)
    with pytest.raises(BundleAwayError):
        served.serving(tiny_bundle.name)
    assert served.serving(tiny_bundle.name).digest == tiny_bundle.digest
    (folder / "generator.safetensors").write_bytes(b"damaged")
    with pytest.raises(BundleError, match="is not what the service loaded"):
        served.serving(tiny_bundle.name)


@pytest.mark.full
@pytest.mark.parametrize("moment", ["before", "during"])
def test_dataset_waits_for_space_for_temporary_files(
    tiny_bundle: Bundle,
    tmp_path: Path,
    hurried: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    def retries() -> float:
        return REGISTRY.get_sample_value("dermis_shard_retries_total", {"kind": "dataset"}) or 0.0

    write, full, before = shards.container_writer, [1, 2, 3], retries()

    def fill(*arguments: Any) -> Any:
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    with service(tiny_bundle.location, tmp_path / "data", storage_url="flaky://bucket/jobs") as running:
        with monkeypatch.context() as patch:
            if moment == "before":
                patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, free=1000))
            else:
                patch.setattr(shards, "container_writer", fill)
            asked = running.ask(REQUEST)
            wait_for(lambda: caplog.text.count("work waits") >= 3)
            assert running.client.get(asked["links"]["self"]).json()["state"] in ("queued", "running")
            if moment == "during":
                wait_for(lambda: not full)
        assert running.wait(asked)["state"] == "succeeded"
        # Only a shard that has begun counts when it begins again, not each look for space.
        assert retries() == before + (3 if moment == "during" else 0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1000, free=1000))
        failed = running.wait(running.ask(REQUEST | {"seed": 4}))  # it can never fit
        assert failed["error"]["type"] == "urn:dermis:problem:storage-full"


@pytest.mark.full
def test_projection_is_not_repeated_after_storage_failure(tiny_bundle: Bundle, tmp_path: Path, hurried: None) -> None:
    refusals = 5

    def fail(call: str, path: str) -> Exception | None:
        nonlocal refusals
        if call == "write" and path.endswith("/00001.png") and refusals:
            refusals -= 1
            return EndpointConnectionError("s3.example.com")
        return None

    with service(tiny_bundle.location, tmp_path / "data", storage_url="flaky://bucket/jobs") as running:
        with failing(fail):
            job = end_of(running, project(running))
        assert job["state"] == "succeeded", job
        assert (running.projector.calls, refusals) == (1, 0)


@pytest.mark.parametrize("kind", ["datasets", "projections"])
def test_job_error_names_job_without_location_or_driver_message(
    tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    secret = "arn:aws:s3:::bucket denied for user 123"

    def fail(call: str, path: str) -> Exception | None:
        final = call == "write" and not path.endswith(("input-00000.png", "input-00001.png", "input-00002.png"))
        return PermissionError(errno.EACCES, secret) if final or call == "remove" else None

    with service(tiny_bundle.location, tmp_path / "data", storage_url="flaky://bucket/jobs") as running:
        with failing(fail):
            asked = running.ask(REQUEST) if kind == "datasets" else project(running)
            job = running.wait(asked) if kind == "datasets" else end_of(running, asked)
        assert job["state"] == "failed"
        assert job["error"]["instance"] == f"/v1/{kind}/{asked['id']}"
        shown = str(job["error"]).replace(job["error"]["instance"], "")
        assert all(word not in shown for word in ("bucket", "flaky", "arn", "denied", "123", ".partial", asked["id"]))
        assert any(
            secret
            in str(getattr(record, "error", "")) + record.getMessage() + str(record.exc_info and record.exc_info[1])
            for record in caplog.records
        )


def test_calls_get_503_while_the_storage_cannot_be_reached(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data", storage_url="flaky://bucket/jobs") as running:
        dataset = running.wait(running.ask(REQUEST))
        with failing(lambda _call, _path: EndpointConnectionError("s3.example.com")):
            files = [("files", ("x.png", encode(np.zeros((9, 9, 3), np.uint8)), "image/png"))]
            answers = [
                running.client.get(f"{dataset['links']['self']}/files"),
                running.client.post("/v1/projections?steps=3", files=files),
                running.client.delete(dataset["links"]["self"]),
            ]
        for answer in answers:
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5"), answer.text
            assert "s3.example.com" not in answer.text and "bucket" not in answer.text
        # Nothing remains of work that failed: sweeps complete it.
        running.jobs.datasets.remove_expired()
        assert running.client.get(dataset["links"]["self"]).status_code == 404
        workflow.sweep()
        assert [name for name in flaky_storage.names() if "ds_" in name or "input" in name] == []


@pytest.mark.full
@pytest.mark.parametrize("headers", [{"Idempotency-Key": "k"}, {}], ids=["key", "no key"])
def test_interrupted_projection_upload_fails_and_can_be_repeated(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    options = {"storage_url": "flaky://bucket/jobs", "quotas": {"*": {"projections_per_day": 2}}}
    with service(tiny_bundle.location, tmp_path / "data", **options) as running:
        with monkeypatch.context() as patch:
            # As if the process ended in the middle of the upload.
            write = Store.write

            def killed(store: Store, name: str, data: bytes) -> None:
                if name.endswith("input-00001.png"):
                    raise RuntimeError("killed")
                write(store, name, data)

            patch.setattr(Store, "write", killed)
            patch.setattr(ProjectionJobs, "_remove_begun", lambda *_: None)
            files = [("files", (f"{i}.png", encode(np.zeros((9, 9, 3), np.uint8)), "image/png")) for i in range(2)]
            sent = running.client.post("/v1/projections?steps=3", files=files, headers=headers)
            assert sent.status_code == 500
        left = running.ctx.table.page("default", "projection", 1)[0]
        workflow.sweep()
        job = running.client.get(f"/v1/projections/{left.id}").json()
        assert (job["state"], job["error"]["type"]) == ("failed", "urn:dermis:problem:upload-interrupted")
        assert job["error"]["instance"] == f"/v1/projections/{left.id}"
        assert flaky_storage.names() == []
        # The first attempt is not counted any more: otherwise this one would exceed the quota.
        again = running.client.post("/v1/projections?steps=3", files=files, headers=headers)
        assert again.status_code == 202, again.text
        assert end_of(running, again.json())["state"] == "succeeded"


@pytest.mark.full
def test_repeated_upload_stores_images_that_the_first_call_could_not(tiny_bundle: Bundle, tmp_path: Path) -> None:
    options = {"storage_url": "flaky://bucket/jobs", "quotas": {"*": {"projections_per_day": 3}}}
    with service(tiny_bundle.location, tmp_path / "data", **options) as running:
        away = failing(lambda call, _path: EndpointConnectionError("away") if call in ("write", "remove") else None)
        with away, pytest.raises(AssertionError, match="not-ready"):
            project(running, **{"Idempotency-Key": "k"})
        job = project(running, **{"Idempotency-Key": "k"})
        workflow.sweep()
        assert end_of(running, job)["state"] == "succeeded"
        (use,) = running.ctx.table.use("default", running.settings.quota_of("default"), ["projections_per_day"])
        assert use.used == 3  # once


@pytest.mark.full
def test_late_failure_of_a_first_upload_does_not_end_the_job_that_a_repeated_one_was_given(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = threading.Event(), threading.Event()
    write_inputs = projection.write_inputs

    def write(*arguments: Any) -> None:
        if begun.is_set():
            write_inputs(*arguments)
            return
        begun.set()
        ended.wait(60)
        raise StorageError("s3://bucket: timeout", kind="storage-unavailable")

    monkeypatch.setattr(projection, "write_inputs", write)
    with service(tiny_bundle.location, tmp_path / "data") as running:
        running.projector.gate.clear()
        key, refused = {"Idempotency-Key": "k"}, threading.Event()

        def send() -> None:
            with pytest.raises(AssertionError, match="not-ready"):
                project(running, **key)
            refused.set()

        first = threading.Thread(target=send)
        first.start()
        assert begun.wait(60)
        job = project(running, **key)
        ended.set()
        first.join()
        assert refused.is_set()
        running.projector.gate.set()
        assert end_of(running, job)["state"] == "succeeded"


@pytest.mark.full
def test_sweep_ignores_projection_whose_images_are_being_stored(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arriving, arrived = threading.Event(), threading.Event()
    write_inputs = projection.write_inputs

    def slowly(*arguments: Any) -> None:
        arriving.set()
        arrived.wait(60)
        write_inputs(*arguments)

    monkeypatch.setattr(projection, "write_inputs", slowly)
    with service(tiny_bundle.location, tmp_path / "data") as running:
        jobs: list[dict[str, Any]] = []
        sender = threading.Thread(target=lambda: jobs.append(project(running)))
        sender.start()
        assert arriving.wait(60)
        workflow.sweep()
        arrived.set()
        sender.join()
        assert end_of(running, jobs[0])["state"] == "succeeded"


@pytest.mark.full
def test_failed_workflow_restarts_and_keeps_finished_shards(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = {"shard": 1, "finish": 1}
    repeated_shards: list[int] = []

    def failing_once(name: str, function: Callable[..., str]) -> Callable[..., str]:
        def call(*arguments: Any) -> str:
            if not failures["finish"]:
                if name == "shard":
                    repeated_shards.append(arguments[2])
                else:
                    time.sleep(1)  # time for shards that would run beside it, and write files that it does not remove
            if failures[name] and (name == "finish" or arguments[2] == 7):
                failures[name] -= 1
                raise psycopg.errors.ReadOnlySqlTransaction("as DBOS passes it on")
            return function(*arguments)

        return call

    monkeypatch.setattr(workflow, "_STUCK_SWEEPS", 100)  # on a busy machine a workflow may begin late
    monkeypatch.setattr(execution, "run_shard", failing_once("shard", execution.run_shard))
    monkeypatch.setattr(execution, "finish", failing_once("finish", execution.finish))
    with service(tiny_bundle.location, tmp_path / "data", lease_seconds=1) as running:
        dataset = running.wait(running.ask(REQUEST))
        assert dataset["state"] == "succeeded", dataset
        assert failures == {"shard": 0, "finish": 0}
        assert repeated_shards == []
        assert stored(running, dataset["id"]) == expected(tiny_bundle, tmp_path / "direct")
        assert running.generator.calls == 12


@pytest.mark.parametrize("step", ["run_shard", "finish"])
def test_workflow_that_always_fails_ends_as_failed_job(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr(workflow, "_MAX_RESTARTS", 2)
    monkeypatch.setattr(workflow, "_STUCK_SWEEPS", 100)  # on a busy machine a workflow may begin late

    def broken(*_: Any) -> str:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(execution, step, broken)
    with service(tiny_bundle.location, tmp_path / "data", lease_seconds=1) as running:
        dataset = running.wait(running.ask(REQUEST))
        assert dataset["state"] == "failed"
        assert "a fault of ours" not in str(dataset["error"])
        assert list(Path(running.settings.storage).iterdir()) == []


@pytest.mark.full
def test_sweep_with_stale_job_list_keeps_files_of_ended_job(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as running:
        running.generator.gate.clear()
        asked = running.ask(REQUEST)
        seen = running.ctx.table.active()
        running.generator.gate.set()
        assert running.wait(asked)["state"] == "succeeded"
        wait_for(lambda: (status := workflow.DBOS.get_workflow_status(asked["id"])) and status.status == "SUCCESS")
        monkeypatch.setattr(running.ctx.table, "active", lambda: seen)
        workflow.sweep()
        assert running.client.get(asked["links"]["self"]).json()["state"] == "succeeded"
        assert stored(running, asked["id"]) == expected(tiny_bundle, tmp_path / "direct")


def test_sweep_with_stale_list_does_not_resume_what_another_worker_runs(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers list the workflows of a lost one, and the other one has resumed them already."""
    with service(tiny_bundle.location, tmp_path / "data") as running:
        running.generator.gate.clear()
        asked = running.ask(REQUEST)
        find, resumed = workflow.DBOS.list_workflows, list[str]()
        wait_for(lambda: len(find(status="PENDING", workflow_id_prefix=asked["id"])) >= 2)
        stale = find(status="PENDING")
        for each in stale:
            each.executor_id = "lost"
        monkeypatch.setattr(workflow, "_resume", lambda status: resumed.append(status.workflow_id))
        patched = lambda **options: stale if options.get("status") == "PENDING" else find(**options)  # noqa: E731
        monkeypatch.setattr(workflow.DBOS, "list_workflows", patched)
        workflow.sweep()
        assert stale and resumed == []


def test_late_error_of_second_worker_does_not_change_ended_job(tmp_path: Path) -> None:
    table = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite")
    table.open()
    for job_id in ("ds_1", "ds_2"):
        table.create(
            job_id, {}, kind="dataset", tenant="default", model=("tiny", "0"), samples=1, shards=1, body_hash="a"
        )
    table.finish("ds_1", "succeeded")
    table.record_error("ds_1", {"title": "late"})
    table.record_error("ds_2", {"title": "early"})
    table.finish("ds_2", "succeeded")
    one, two = table.get("ds_1"), table.get("ds_2")
    assert one is not None and two is not None
    assert (one.state, one.error) == ("succeeded", None)
    assert (two.state, two.error) == ("queued", {"title": "early"})
    table.close()


@pytest.mark.full
def test_unreachable_service_is_retried_longer_than_unavailable(
    tiny_bundle: Bundle, tmp_path: Path, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_UNAVAILABLE_SECONDS", 0.0)
    few = REQUEST | {"shard_size": 100}
    with service(tiny_bundle.location, tmp_path / "data", shard_concurrency=1) as running:
        running.generator.failures += [InferenceUnreachableError("restarting")] * 5
        assert running.wait(running.ask(few))["state"] == "succeeded"
        running.generator.failures += [InferenceUnavailableError("no such model at /srv/models")] * 2
        dataset = running.wait(running.ask(few | {"seed": 4}))
        assert dataset["state"] == "failed"
        assert dataset["error"]["type"] == "urn:dermis:problem:not-ready"
        assert "/srv" not in dataset["error"]["detail"]


LACKS, AWAY = InferenceMemoryError("the projector has too little memory"), InferenceUnreachableError("away")


@pytest.mark.parametrize(
    ("answers", "call_seconds", "ends_after"),
    [
        ([LACKS] * 20, 1, None),  # less than five minutes
        ([LACKS] * 1000, 1, (300, 330)),
        ([LACKS] * 1000, 900, (1800, 1830)),  # repeated once, however long a call takes
        ([LACKS] * 20 + [AWAY] * 100 + [LACKS] * 20, 1, None),
        ([AWAY] * 1000, 1, None),
    ],
)
def test_call_that_lacks_memory_is_repeated_for_some_minutes(
    answers: list[Exception],
    call_seconds: float,
    ends_after: tuple[float, float] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, left = 0.0, list(answers)

    def pause(seconds: float) -> bool:
        nonlocal now
        now += seconds
        return False

    def answer(*_: Any) -> str:
        pause(call_seconds)
        if left:
            raise left.pop()
        return "done"

    monkeypatch.setattr(context, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(context, "run_on_loop", answer)
    monkeypatch.setattr(context, "must_stop", lambda *_: False)
    ctx: Any = SimpleNamespace(stopping=SimpleNamespace(wait=pause))
    if ends_after is None:
        assert context.call_with_retry(ctx, "ds_1", lambda: None) == "done"  # type: ignore[arg-type, return-value]
        return
    with pytest.raises(InferenceMemoryError) as caught:
        context.call_with_retry(ctx, "ds_1", lambda: None)  # type: ignore[arg-type, return-value]
    assert ends_after[0] < now < ends_after[1]
    problem = execution._problem_of_job(SimpleNamespace(id="ds_1", kind="dataset"), caught.value)  # type: ignore[arg-type]
    assert problem.type == "urn:dermis:problem:not-ready" and "too little memory" in str(problem.detail)


def test_leases_are_invalid_until_database_is_available_again() -> None:
    class Table:
        away = False

        def renew_lease(self, _executor_id: str, _seconds: float, *, works: bool) -> None:
            assert works
            if self.away:
                raise DatabaseUnavailableError("away")

        def drop_lease(self, _executor_id: str) -> None:
            pass

    table, valid_leases = Table(), list[bool]()
    lease = Lease(table, "a", 0.6, works=True, sweep=valid_leases.append)  # type: ignore[arg-type]
    lease.start()
    try:
        wait_for(lambda: valid_leases)
        table.away = True
        wait_for(lambda: valid_leases[-1] is False)
        table.away = False
        wait_for(lambda: valid_leases[-1] is True)
        assert valid_leases[0] is True
    finally:
        lease.stop()
