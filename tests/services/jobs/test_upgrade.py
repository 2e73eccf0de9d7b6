"""Tests that the present version finishes jobs that an earlier version left, with the bytes of undisturbed ones."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dermis.bundle import Bundle
from older_versions import BODIES, EXECUTOR, IDEMPOTENCY_KEY, SCHEMAS, STEPS, restore, uploads
from service_kit import Service, make_directly, service, wait_for
from services.audit import verification
from services.audit.trail import AuditTable
from services.jobs import schema, workflow


def files_of(running: Service, job_id: str) -> dict[str, bytes]:
    folder = Path(running.settings.storage) / job_id
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def wait_for_projection(running: Service, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = {}

    def has_ended() -> bool:
        job.update(running.client.get(f"/v1/projections/{job_id}").json())
        return job["state"] in ("succeeded", "failed")

    wait_for(has_ended)
    return job


def open_and_finish(
    url: str, bundle: Bundle, folder: Path, version: str, *, worker: str = EXECUTOR, projections: bool = True
) -> None:
    """Restore the jobs of an earlier version, let a service finish them, and compare their files with undisturbed ones."""
    storage = folder / "data" / "datasets"
    left = restore(version, url, storage, bundle.digest, projections=projections)
    values = {"database_url": url, "storage_url": str(storage), "executor_id": worker, "lease_seconds": 1.0}
    with service(bundle.location, folder / "data", **values) as running:
        for number, (dataset, body) in enumerate(zip(left.datasets, BODIES, strict=True)):
            ended = running.wait({"links": {"self": f"/v1/datasets/{dataset}"}})
            assert ended["state"] == "succeeded", ended["error"]
            assert (ended["progress"]["shards_done"], ended["progress"]["samples_done"]) == (6, 22)
            direct = make_directly(bundle, body | {"model": "tiny"}, folder / f"direct{number}")
            assert files_of(running, dataset) == direct
        assert running.generator.calls == 12  # all shards: the two finished ones are of an earlier format
        assert running.ask(BODIES[0], **{"Idempotency-Key": IDEMPOTENCY_KEY})["id"] == left.datasets[0]
        if projections:
            ended = wait_for_projection(running, left.projection)
            assert ended["state"] == "succeeded", ended["error"]
            again = running.client.post(f"/v1/projections?steps={STEPS}", files=uploads()).json()
            assert wait_for_projection(running, again["id"])["state"] == "succeeded"
            files = files_of(running, left.projection)
            assert len(files) > 20
            assert files == files_of(running, again["id"])
        with running.ctx.table._engine.connect() as connection:
            assert schema.current_revision(connection) == schema.newest_revision()
    with closing(AuditTable(url)) as trail, trail.snapshot() as snapshot:
        result = verification.verify(snapshot)
    assert result.intact, result.problems
    assert result.entries >= (4 if version >= "0005" else 1)  # three of the earlier version, and the repeated request


@pytest.mark.full
def test_datasets_of_version_0_1_0_are_finished(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dermis.report.sample.SAMPLE", 2)
    monkeypatch.setattr(workflow, "_STUCK_SWEEPS", 100)  # on a busy machine a workflow may begin late
    open_and_finish(f"sqlite:///{tmp_path}/jobs.sqlite", tiny_bundle, tmp_path, "0001", projections=False)


@pytest.mark.full
@pytest.mark.parametrize("worker", [EXECUTOR, "newer"])
@pytest.mark.parametrize("version", SCHEMAS)
def test_jobs_of_an_earlier_version_are_finished(
    version: str, worker: str, url: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """By a worker of the same name, which continues at once, and by another one, when the lease has run out."""
    open_and_finish(url, tiny_bundle, tmp_path, version, worker=worker)
