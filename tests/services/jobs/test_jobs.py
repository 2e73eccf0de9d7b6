"""Tests of dataset jobs: the same files after any interruption, and no files of jobs that do not succeed."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import REGISTRY

from dermis.bundle import Bundle
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from service_kit import Service, make_directly, service, wait_for
from services.errors import InferenceFailedError, InferenceUnavailableError
from services.gateway.auth.keys import KeyTable
from services.jobs import context, workflow
from services.jobs.database import writing
from services.jobs.executors import Executors
from services.jobs.lease import executor_slot
from services.jobs.table import IdempotencyConflictError, Job, JobTable, TooManyActiveError

REQUEST: dict[str, Any] = {"classes": {"benign": 70, "malignant": 30}, "seed": 3, "shard_size": 9}


def files_of(running: Service, dataset: dict[str, Any]) -> dict[str, bytes]:
    folder = Path(running.settings.storage) / dataset["id"]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(bundle: Bundle, folder: Path, **changes: Any) -> dict[str, bytes]:
    return make_directly(bundle, REQUEST | {"model": bundle.name} | changes, folder)


def test_a_job_makes_the_files_that_the_library_makes(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data", shard_concurrency=12) as running:
        formats = ("imagefolder", "webdataset", "parquet")
        for file_format, asked in [(name, running.ask(REQUEST | {"format": name})) for name in formats]:
            dataset = running.wait(asked)
            assert dataset["state"] == "succeeded"
            assert files_of(running, dataset) == expected(tiny_bundle, tmp_path / file_format, format=file_format)
            assert verify(Path(running.settings.storage) / dataset["id"]).ok
            assert (dataset["progress"]["samples_done"], dataset["progress"]["shards_done"]) == (100, 12)
            # Besides the job itself some shards can be left, whose end was still being recorded.
            wait_for(lambda asked=asked: len(workflow.DBOS.list_workflows(workflow_id_prefix=asked["id"])) <= 6)  # type: ignore[misc]


def test_job_of_stopped_service_resumes_at_next_start(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as running:
        running.generator.close_after = 4
        asked = running.ask(REQUEST)
        running.wait_for_shards(asked, 3)
    table = JobTable(running.settings.jobs_url)
    before = table.get(asked["id"])
    table.close()
    assert before is not None and before.state == "running"
    with service(tiny_bundle.location, tmp_path / "data") as running:
        dataset = running.wait(asked)
        assert dataset["state"] == "succeeded"
        assert files_of(running, dataset) == expected(tiny_bundle, tmp_path / "direct")
        # Finished shards were kept: fewer calls than the 12 of a whole dataset.
        assert running.generator.calls <= 9


@pytest.mark.full
def test_shards_that_another_version_made_are_made_again(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an upgrade of several replicas: some shards are of the former version when the new one finishes the dataset."""
    monkeypatch.setattr("dermis.dataset.shards.__version__", "0.0.1")
    with service(tiny_bundle.location, tmp_path / "data") as running:
        asked = running.ask(REQUEST)
        running.wait_for_shards(asked, 3)
        monkeypatch.undo()
        dataset = running.wait(asked)
        assert dataset["state"] == "succeeded"
        assert files_of(running, dataset) == expected(tiny_bundle, tmp_path / "direct")
        assert running.generator.calls >= 15


def test_another_worker_takes_over_a_job_for_its_tenant_when_a_lease_has_run_out(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"auth": "keys", "lease_seconds": 1}
    with service(tiny_bundle.location, tmp_path / "data", executor_id="first", **values) as running:
        owner, other = (headers_of(running, tenant) for tenant in ("radiology", "derma"))
        running.client.headers.update(owner)
        running.generator.close_after = 3
        asked = running.ask(REQUEST, **{"Idempotency-Key": "k"})
        running.wait_for_shards(asked, 2)
    storage = Path(running.settings.storage)
    leftovers = [f"tenants/radiology/ds_{'1' * 32}", f"tenants/derma/{asked['id']}", asked["id"], "tenants/Notes"]
    for each in leftovers:
        (storage / each).mkdir(parents=True)
    table = JobTable(running.settings.jobs_url)
    table.renew_lease("first", -5.0)  # as if it had been killed: it has not given back its lease
    table.close()
    takeovers = REGISTRY.get_sample_value("dermis_lease_takeovers_total") or 0.0
    with service(tiny_bundle.location, tmp_path / "data", executor_id="second", **values) as running:
        running.client.headers.update(owner)
        assert running.wait(asked)["state"] == "succeeded"
        assert (REGISTRY.get_sample_value("dermis_lease_takeovers_total") or 0.0) > takeovers
        folder = storage / "tenants" / "radiology" / asked["id"]
        assert list(storage.rglob(asked["id"])) == [folder]
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert files == expected(tiny_bundle, tmp_path / "direct")
        assert [(storage / each).exists() for each in leftovers] == [False, False, False, True]
        assert running.ask(REQUEST, **{"Idempotency-Key": "k"})["id"] == asked["id"]
        assert running.client.get(asked["links"]["self"], headers=other).status_code == 404
        assert running.client.get("/v1/datasets", headers=other).json()["data"] == []
        stored = sum(map(len, files.values()))
        assert [running.ctx.table.stored_bytes(tenant) for tenant in ("radiology", "derma")] == [stored, 0]
        with writing(running.ctx.table._engine) as connection:
            connection.execute(sa.text("UPDATE dermis_jobs SET stored_bytes = NULL"))  # as an earlier version
        wait_for(lambda: running.ctx.table.stored_bytes("radiology") == stored)


def headers_of(running: Service, tenant: str) -> dict[str, str]:
    """The credentials of a new key of a tenant."""
    table = KeyTable(running.settings.jobs_url)
    _, text = table.create(tenant=tenant, name="n", scopes=("datasets:read", "datasets:write"), created_by="test")
    table.close()
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.full
def test_job_of_live_worker_is_not_taken_over(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data", executor_id="first") as running:
        running.generator.close_after = 3
        asked = running.ask(REQUEST)
        running.wait_for_shards(asked, 3)
        wait_for(lambda: running.ctx.table.statistics().shards_begun)
    table = JobTable(running.settings.jobs_url)
    takeovers = REGISTRY.get_sample_value("dermis_lease_takeovers_total")
    retries = REGISTRY.get_sample_value("dermis_shard_retries_total", {"kind": "dataset"})
    assert table.statistics().shards_begun == 0
    table.renew_lease("first", 3600)
    with service(tiny_bundle.location, tmp_path / "data", executor_id="second", lease_seconds=1) as running:
        workflow.sweep()
        workflow.sweep()
        shards = running.client.get(asked["links"]["self"]).json()["progress"]["shards_done"]
        table.drop_lease("first")
        dataset = running.wait(asked)
        assert dataset["state"] == "succeeded"
        assert shards < 12
        assert dataset["progress"]["samples_done"] == 100
    # It has stopped, and was not lost.
    assert REGISTRY.get_sample_value("dermis_lease_takeovers_total") == takeovers
    assert REGISTRY.get_sample_value("dermis_shard_retries_total", {"kind": "dataset"}) == retries
    table.close()


def test_work_is_stopped_although_another_part_of_the_service_fails_to_stop(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close_and_fail(*arguments: Any) -> None:
        close(*arguments)
        raise RuntimeError("audit")

    with pytest.raises(RuntimeError, match="audit"), service(tiny_bundle.location, tmp_path / "data") as running:
        writer = running.client.app.state.context.audit.writer  # type: ignore[attr-defined]
        close = writer.close
        monkeypatch.setattr(writer, "close", close_and_fail)
    assert not any(thread.name == "dermis-lease" for thread in threading.enumerate())


def test_a_cancelled_job_stops_soon_and_leaves_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as running:
        asked = running.ask({"classes": {"benign": 1000}, "shard_size": 10})
        running.wait_for_shards(asked, 2)
        assert running.client.delete(asked["links"]["self"]).status_code == 202
        dataset = running.wait(asked)
        assert dataset["state"] == "cancelled"
        assert dataset["progress"]["samples_done"] < 1000
        assert list(Path(running.settings.storage).iterdir()) == []
        # Later jobs are not delayed.
        assert running.wait(running.ask(REQUEST))["state"] == "succeeded"


def test_full_disk_fails_job_and_next_job_succeeds(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as running:
        write = Store.write

        def full(store: Store, name: str, data: bytes) -> None:
            if "shard-00002" in name:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(store, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", full)
            dataset = running.wait(running.ask(REQUEST))
        assert dataset["state"] == "failed"
        assert dataset["error"]["type"] == "urn:dermis:problem:storage-full"
        assert list(Path(running.settings.storage).iterdir()) == []
        assert running.wait(running.ask(REQUEST))["state"] == "succeeded"


def test_a_disk_that_is_nearly_full_refuses_new_work(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with service(tiny_bundle.location, tmp_path / "data") as running:
        monkey = pytest.MonkeyPatch()
        monkey.setattr(Store, "free_bytes", lambda _store: 1000)
        try:
            answer = running.client.post("/v1/datasets", json=REQUEST)
        finally:
            monkey.undo()
        assert answer.status_code == 507
        assert running.client.get("/v1/datasets").json()["data"] == []


@pytest.mark.full
def test_job_retries_failing_generator_a_limited_number_of_times(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "_FIRST_PAUSE_SECONDS", 0.01)
    few = REQUEST | {"shard_size": 50}
    with service(tiny_bundle.location, tmp_path / "data", shard_concurrency=1) as running:
        running.generator.failures += [InferenceUnavailableError("restarting"), InferenceFailedError("once")]
        assert running.wait(running.ask(few))["state"] == "succeeded"
        running.generator.failures += [InferenceFailedError("always")] * 3
        dataset = running.wait(running.ask(few | {"seed": 4}))
        assert dataset["state"] == "failed"
        assert dataset["error"]["type"] == "urn:dermis:problem:internal"
        assert "always" not in dataset["error"]["detail"]


def test_start_removes_unfinished_files_of_unknown_jobs_and_no_dataset(
    tiny_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = tmp_path / "data" / "datasets"
    with service(tiny_bundle.location, tmp_path / "data") as running:
        finished = running.wait(running.ask({"classes": {"benign": 1}}))["id"]
    for lost in (tmp_path / "data").glob("jobs.sqlite*"):
        lost.unlink()
    unfinished = f"ds_{'0' * 32}"
    (storage / unfinished / ".partial").mkdir(parents=True)
    (storage / "notes").mkdir()
    with service(tiny_bundle.location, tmp_path / "data") as running:  # the database is empty
        assert {path.name for path in storage.iterdir()} == {"notes", finished, unfinished}
        assert any("was the database lost?" in record.getMessage() for record in caplog.records)
        new = running.wait(running.ask({"classes": {"benign": 1}}))["id"]
    with service(tiny_bundle.location, tmp_path / "data"):
        assert {path.name for path in storage.iterdir()} == {"notes", finished, new}
        assert (storage / finished / "manifest.json").exists()


def test_worker_names_are_distinct_and_reused_after_process_end(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; from services.jobs.lease import executor_slot\n"
        "with executor_slot(Path(sys.argv[1])) as name: print(name, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        taken = other.stdout.readline().strip()
        with executor_slot(tmp_path) as mine:
            assert mine != taken
        other.kill()
        other.wait()
    with executor_slot(tmp_path) as mine:
        assert mine == taken


@pytest.fixture
def table(tmp_path: Path) -> JobTable:
    job_table = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite")
    job_table.open()
    return job_table


def create(table: JobTable, job_id: str, **values: Any) -> tuple[Job, bool]:
    return table.create(
        job_id,
        {},
        kind="dataset",
        model=("tiny", "0"),
        samples=10,
        shards=2,
        **({"tenant": "a", "body_hash": "a"} | values),
    )


def test_job_table_enforces_idempotency_keys_and_active_limit(table: JobTable) -> None:
    job, new = create(table, "ds_1", idempotency_key="k")
    assert new
    assert create(table, "ds_2", idempotency_key="k") == (job, False)
    with pytest.raises(IdempotencyConflictError):
        create(table, "ds_2", idempotency_key="k", body_hash="b")
    with pytest.raises(TooManyActiveError, match="of this tenant"):
        create(table, "ds_2", max_active=1)
    assert create(table, "ds_3", tenant="b", max_active=1)[1]  # what one tenant has queued does not block another
    with pytest.raises(TooManyActiveError):
        create(table, "ds_4", tenant="b", max_active=1)
    table.finish("ds_1", "failed")
    assert create(table, "ds_2", max_active=1)[1]


def test_job_sums_do_not_depend_on_order_of_progress_reports(table: JobTable) -> None:
    create(table, "ds_1")
    table.progress("ds_1", 0, 3)
    table.progress("ds_1", 1, 5, finished=True)
    table.progress("ds_1", 0, 1)  # a worker died; its shard starts over
    table.progress("ds_1", 1, 2)  # a second worker on a finished shard
    job = table.get("ds_1")
    assert job is not None
    assert (job.state, job.samples_done, job.shards_done) == ("running", 6, 1)
    table.progress("ds_1", 0, 5, finished=True)
    table.finish("ds_1", "succeeded")
    table.finish("ds_1", "failed")
    table.progress("ds_1", 0, 5, finished=True)  # a worker that was taken over
    job = table.get("ds_1")
    assert job is not None
    assert (job.state, job.samples_done, job.shards_done) == ("succeeded", 10, 2)


def test_many_threads_write_without_losing_a_count(table: JobTable) -> None:
    create(table, "ds_1")
    threads = [threading.Thread(target=table.progress, args=("ds_1", shard, shard)) for shard in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job = table.get("ds_1")
    assert job is not None
    assert job.samples_done == sum(range(20))


def test_a_lease_runs_out(table: JobTable) -> None:
    table.renew_lease("a", 60)
    table.renew_lease("b", 0.05)
    wait_for(lambda: table.live_executors() == {"a"})
    assert table.executors() == Executors({"a"}, set())
    table.drop_lease("a")
    assert table.executors() == table.executors() == Executors(set(), {"a"})  # it has stopped, and was not lost
    with writing(table._engine) as connection:
        connection.execute(sa.text(f"UPDATE dermis_workers SET lease_until = {3601 - time.time()}"))
    assert table.executors() == Executors(set(), {"a"}) and table.executors() == Executors(set(), set())
    table.renew_lease("a", 60)
    assert table.live_executors() == {"a"}
