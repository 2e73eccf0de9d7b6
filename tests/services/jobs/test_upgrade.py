"""Tests that the present version finishes the jobs that an earlier version left unfinished, with the bytes of undisturbed ones."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest

from benchmarks.components.postgres import Postgres
from dermis.bundle import Bundle
from older_versions import BODIES, EXECUTOR, IDEMPOTENCY_KEY, SCHEMAS, STEPS, restore, uploads
from real_servers import running_postgres
from service_kit import Service, make_directly, service, wait_for
from services.audit import verification
from services.audit.trail import AuditTable
from services.jobs import schema


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    server: Postgres = request.getfixturevalue("postgres")
    name = f"empty{time.monotonic_ns()}"
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.url_of(name)


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


@pytest.mark.parametrize("worker", [EXECUTOR, pytest.param("newer", marks=pytest.mark.full)])
@pytest.mark.parametrize("version", SCHEMAS)
def test_jobs_of_an_earlier_version_are_finished(
    version: str, worker: str, url: str, tiny_bundle: Bundle, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    left = restore(version, url, data / "datasets", tiny_bundle.digest)
    values = {"database_url": url, "storage_url": str(data / "datasets"), "executor_id": worker, "lease_seconds": 1.0}
    with service(tiny_bundle.location, data, **values) as running:
        for number, (dataset, body) in enumerate(zip(left.datasets, BODIES, strict=True)):
            ended = running.wait({"links": {"self": f"/v1/datasets/{dataset}"}})
            assert ended["state"] == "succeeded", ended["error"]
            assert (ended["progress"]["shards_done"], ended["progress"]["samples_done"]) == (6, 22)
            direct = make_directly(tiny_bundle, body | {"model": "tiny"}, tmp_path / f"direct{number}")
            assert files_of(running, dataset) == direct
        assert running.generator.calls == 10  # 12 shards, of which the earlier version had finished two
        assert wait_for_projection(running, left.projection)["state"] == "succeeded"
        again = running.client.post(f"/v1/projections?steps={STEPS}", files=uploads()).json()
        assert wait_for_projection(running, again["id"])["state"] == "succeeded"
        assert files_of(running, left.projection) == files_of(running, again["id"])
        assert len(files_of(running, left.projection)) > 20
        # What the jobs of the earlier version belong to is kept as well.
        assert running.ask(BODIES[0], **{"Idempotency-Key": IDEMPOTENCY_KEY})["id"] == left.datasets[0]
        assert running.wait(running.ask(BODIES[0]))["state"] == "succeeded"
        with running.ctx.table._engine.connect() as connection:
            assert schema.current_revision(connection) == schema.newest_revision()
    with closing(AuditTable(url)) as trail, trail.snapshot() as snapshot:
        result = verification.verify(snapshot)
    assert result.intact, result.problems
    assert result.entries >= (6 if version >= "0005" else 3)
