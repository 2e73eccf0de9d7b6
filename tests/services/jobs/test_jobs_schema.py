"""Tests that a worker upgrades the jobs database of an earlier version, and that older workers continue to work with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from dermis.errors import DermisError
from postgres import Postgres, running_postgres
from services.audit import trail as trail_module
from services.gateway.auth import keys as keys_module
from services.jobs import table as table_module
from services.jobs.database import make_engine
from services.jobs.schema import VERSION_TABLE, SchemaTooNewError
from services.jobs.table import JobTable
from services.serve import _prepare
from services.settings import Settings, SettingsError
from services.webhooks import outbox

# What version 0.1.0 created, before the schema had a version.
TABLES_0_1_0 = (
    """
    CREATE TABLE dermis_jobs (
        sequence {sequence}, id VARCHAR(40) NOT NULL, state VARCHAR(16) NOT NULL, request JSON NOT NULL,
        model_name VARCHAR(64) NOT NULL, model_digest VARCHAR(64) NOT NULL, samples_total INTEGER NOT NULL,
        shards_total INTEGER NOT NULL, samples_done INTEGER NOT NULL, shards_done INTEGER NOT NULL, rate FLOAT,
        rate_time FLOAT, rate_samples INTEGER, error JSON, owner VARCHAR(140), idempotency_key VARCHAR(255),
        body_hash VARCHAR(64) NOT NULL, created_at FLOAT NOT NULL, started_at FLOAT, finished_at FLOAT,
        UNIQUE (id), UNIQUE (idempotency_key)
    )
    """,
    "CREATE INDEX ix_dermis_jobs_state ON dermis_jobs (state)",
    """
    CREATE TABLE dermis_shards (
        job_id VARCHAR(40) NOT NULL, shard INTEGER NOT NULL, samples_done INTEGER NOT NULL, finished BOOLEAN NOT NULL,
        PRIMARY KEY (job_id, shard)
    )
    """,
    "CREATE TABLE dermis_workers (executor_id VARCHAR(140) NOT NULL, lease_until FLOAT NOT NULL, PRIMARY KEY (executor_id))",
)
SEQUENCE = {"sqlite": "INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "postgresql": "SERIAL PRIMARY KEY"}
INSERT_0_1_0 = sa.text(
    "INSERT INTO dermis_jobs (id, state, request, model_name, model_digest, samples_total, shards_total, samples_done, "
    "shards_done, error, body_hash, created_at) VALUES (:id, :state, '{}', 'tiny', '0', 8, 1, 0, 0, :error, 'a', 1.0)"
)
DATASET, PROJECTION = f"ds_{'0' * 32}", f"pr_{'1' * 32}"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite"
    server: Postgres = request.getfixturevalue("postgres")
    name = f"empty{time.monotonic_ns()}"
    with psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return server.url_of(name)


def create_0_1_0(url: str) -> sa.Engine:
    """Fill a database as version 0.1.0 did. The first builds of it gave failed projections the path of a dataset."""
    engine = make_engine(url)
    with engine.begin() as connection:
        for statement in TABLES_0_1_0:
            connection.execute(sa.text(statement.format(sequence=SEQUENCE[engine.dialect.name])))
    insert_0_1_0(engine, DATASET, error=f"/v1/datasets/{DATASET}")
    insert_0_1_0(engine, PROJECTION, error=f"/v1/datasets/{PROJECTION}")
    return engine


def insert_0_1_0(engine: sa.Engine, job_id: str, *, error: str | None = None) -> None:
    problem = {"type": "urn:dermis:problem:internal", "title": "x", "status": 500, "detail": "y", "instance": error}
    with engine.begin() as connection:
        values = {"id": job_id, "state": "failed" if error else "queued", "error": error and json.dumps(problem)}
        connection.execute(INSERT_0_1_0, values)


def test_database_of_version_0_1_0_is_upgraded(url: str) -> None:
    create_0_1_0(url).dispose()
    table = JobTable(url)
    table.open()
    dataset, projection = table.get(DATASET, "dataset"), table.get(PROJECTION, "projection")
    assert dataset is not None and dataset.error is not None and projection is not None and projection.error is not None
    assert (dataset.sequence, projection.sequence) == (1, 2)
    assert dataset.error["instance"] == f"/v1/datasets/{DATASET}"
    assert projection.error["instance"] == f"/v1/projections/{PROJECTION}"
    assert table.get(PROJECTION, "dataset") is None
    assert [job.id for job in table.page("dataset", 10)] == [DATASET]
    assert table.count_by_state("projection")["failed"] == 1
    table.open()  # an upgraded database is left as it is
    table.close()


def test_worker_of_version_0_1_0_runs_during_and_after_upgrade(url: str) -> None:
    """Its connections were opened before the upgrade, and it inserts jobs without a kind."""
    older = create_0_1_0(url)
    table = JobTable(url)
    table.open()
    later = {f"ds_{'2' * 32}": "dataset", f"pr_{'3' * 32}": "projection"}
    for job_id in later:
        insert_0_1_0(older, job_id)
    assert {job.id: job.kind for job in table.active()} == later
    older.dispose()
    table.close()


def test_migrations_create_the_tables_that_the_code_defines(url: str) -> None:
    table = JobTable(url)
    table.open()
    with table._engine.connect() as connection:
        options = {"compare_type": True, "version_table": VERSION_TABLE}
        tables = [table_module._metadata, keys_module.metadata, trail_module.metadata, outbox.metadata]
        assert compare_metadata(MigrationContext.configure(connection, opts=options), tables) == []
    table.close()


@pytest.mark.parametrize("prepare", [create_0_1_0, make_engine])
def test_many_workers_upgrade_database_at_once(url: str, prepare: Callable[[str], sa.Engine]) -> None:
    prepare(url).dispose()
    barrier, failures = threading.Barrier(6), list[BaseException]()

    def start() -> None:
        table = JobTable(url)
        try:
            barrier.wait(60)
            table.open()
            table.count_by_state("dataset")
        except BaseException as error:
            failures.append(error)
        finally:
            table.close()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_upgrade_that_fails_changes_nothing(url: str) -> None:
    engine = create_0_1_0(url)
    with engine.begin() as connection:  # a trigger of the same name stops the second revision after it added the column
        if engine.dialect.name == "sqlite":
            body = "CREATE TRIGGER dermis_jobs_kind AFTER DELETE ON dermis_jobs BEGIN SELECT 1; END"
        else:
            body = "CREATE FUNCTION dermis_jobs_kind() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'"
        connection.execute(sa.text(body))
    table = JobTable(url)
    with pytest.raises((DermisError, sa.exc.SQLAlchemyError)):
        table.open()
    table.close()
    assert "kind" not in {column["name"] for column in sa.inspect(engine).get_columns("dermis_jobs")}
    assert VERSION_TABLE not in sa.inspect(engine).get_table_names()
    engine.dispose()


def test_database_of_newer_version_is_refused_with_advice(url: str, tmp_path: Path) -> None:
    table = JobTable(url)
    table.open()
    with table._engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(SchemaTooNewError, match="start the newer version, or restore the backup"):
        table.open()
    table.close()
    settings = Settings(_env_file=None, data_dir=tmp_path / "data", database_url=url)
    with pytest.raises(SettingsError, match="the jobs database cannot be opened: its tables have schema 9999"):
        _prepare(settings)
