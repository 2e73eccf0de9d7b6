"""Tests that a worker upgrades the jobs database of an earlier version, and that older workers continue to work with it."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import dermis
from benchmarks.components.postgres import Postgres
from dermis.errors import DermisError
from older_versions import create_tables
from services import compared_answers
from services.audit import trail as trail_module
from services.gateway.auth import keys as keys_module
from services.jobs import counters, executors
from services.jobs import tables as table_definitions
from services.jobs.database import make_engine
from services.jobs.schema import VERSION_TABLE, SchemaTooNewError, current_revision, newest_revision
from services.jobs.table import IdempotencyConflictError, JobTable, Kind
from services.serve import _prepare
from services.settings import Settings, SettingsError
from services.studies import tables as study_tables
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
    dataset, projection = table.get(DATASET), table.get(PROJECTION)
    assert dataset is not None and dataset.error is not None and projection is not None and projection.error is not None
    assert (dataset.sequence, projection.sequence) == (1, 2)
    assert dataset.error["instance"] == f"/v1/datasets/{DATASET}"
    assert projection.error["instance"] == f"/v1/projections/{PROJECTION}"
    assert (dataset.tenant, projection.tenant) == ("default", "default")
    assert table.find("default", "dataset", DATASET) == dataset
    assert table.find("default", "dataset", PROJECTION) is None and table.find("other", "dataset", DATASET) is None
    assert [job.id for job in table.page("default", "dataset", 10)] == [DATASET]
    assert table.page("other", "dataset", 10) == []
    assert table.statistics().counts["projection"]["failed"] == 1
    table.open()  # an upgraded database is left as it is
    table.close()


def test_upgrade_keeps_keys_and_order_and_makes_keys_unique_for_each_tenant(url: str) -> None:
    older = create_0_1_0(url)
    with older.begin() as connection:
        connection.execute(sa.text("UPDATE dermis_jobs SET idempotency_key = 'monday' WHERE sequence = 1"))
        connection.execute(sa.text("DELETE FROM dermis_jobs WHERE sequence = 2"))
    table = JobTable(url)
    table.open()

    def create(tenant: str, number: int, body_hash: str = "a") -> tuple[str, bool]:
        job, new = table.create(
            f"ds_{number:032x}",
            {},
            tenant=tenant,
            kind="dataset",
            model=("tiny", "0"),
            samples=1,
            shards=1,
            body_hash=body_hash,
            idempotency_key="monday",
        )
        assert job.tenant == tenant
        return job.id, new

    assert create("default", 3) == (DATASET, False)
    tenants = [f"tenant-{number}" for number in range(4)]
    made = {tenant: create(tenant, 10 + number)[0] for number, tenant in enumerate(tenants)}
    assert len(set(made.values())) == 4
    assert {tenant: create(tenant, 20)[0] for tenant in reversed(tenants)} == made
    with pytest.raises(IdempotencyConflictError):
        create("tenant-2", 21, body_hash="b")
    for tenant, job_id in made.items():
        assert [job.id for job in table.page(tenant, "dataset", 10)] == [job_id]
        assert [table.find(each, "dataset", job_id) is not None for each in tenants] == [
            each == tenant for each in tenants
        ]
    first = table.get(made["tenant-0"])
    assert first is not None and first.sequence == 3  # the number of a deleted job is not used again
    values = {"id": "ds_x", "state": "queued", "error": None}
    insert = sa.text(
        str(INSERT_0_1_0).replace("(id,", "(tenant, idempotency_key, id,").replace("(:id", "('tenant-1', 'monday', :id")
    )
    with pytest.raises(sa.exc.IntegrityError), older.begin() as connection:
        connection.execute(insert, values)
    older.dispose()
    table.close()


def test_calls_with_one_key_at_the_same_moment_make_one_job_for_each_tenant(url: str) -> None:
    table = JobTable(url)
    table.open()
    barrier, made = threading.Barrier(8), list[tuple[str, str, bool]]()

    def create(number: int) -> None:
        tenant = f"tenant-{number % 2}"
        barrier.wait(60)
        job, new = table.create(
            f"ds_{number}",
            {},
            tenant=tenant,
            kind="dataset",
            model=("tiny", "0"),
            samples=1,
            shards=1,
            body_hash="a",
            idempotency_key="k",
        )
        made.append((tenant, job.id, new))

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8 and len({(tenant, job_id) for tenant, job_id, _ in made}) == 2
    assert sum(new for *_, new in made) == 2
    table.close()


def test_statistics_count_what_is_left_of_all_tenants(url: str) -> None:
    table = JobTable(url)
    table.open()
    for number, (tenant, kind) in enumerate(
        [("a", "dataset"), ("b", "dataset"), ("b", "dataset"), ("a", "projection")]
    ):
        table.create(
            f"job{number}",
            {},
            tenant=tenant,
            kind=kind,  # type: ignore[arg-type]
            model=("tiny", "0"),
            samples=8,
            shards=4,
            body_hash="a",
            owner="here",
        )
    assert not table.is_begun("job0", 0)
    table.progress("job0", 0, 2, finished=True)
    table.progress("job0", 1, 1)
    assert table.is_begun("job0", 1) and not table.is_begun("job0", 2)
    table.request_cancel("job1")
    table.finish("job2", "succeeded", stored_bytes=7 << 32)
    table.renew_lease("here", 30.0)
    table.renew_lease("gone", -1.0)
    table.renew_lease("gateway", 30.0, works=False)
    statistics = table.statistics()
    assert {state: n for state, n in statistics.counts["dataset"].items() if n} == {
        "running": 1,
        "cancelling": 1,
        "succeeded": 1,
    }
    assert statistics.shards_left == {"dataset": 3, "projection": 4} and statistics.shards_begun == 1
    assert statistics.jobs_ending == {"dataset": 0, "projection": 0}
    assert "dataset" not in statistics.oldest and statistics.oldest_age("projection") >= 0
    assert [(worker.name, worker.works, worker.jobs) for worker in statistics.workers] == [
        ("gateway", False, 0),
        ("gone", True, 0),
        ("here", True, 3),
    ]
    assert statistics.live_workers == 1 and statistics.stored_bytes == 7 << 32
    table.return_shard("job0", 0)  # it is finished
    table.return_shard("job0", 1)
    table.return_shard("job0", 2)  # it was not begun
    assert table.is_begun("job0", 0) and not table.is_begun("job0", 1)
    returned = table.get("job0")
    assert returned is not None and (returned.samples_done, returned.shards_done) == (2, 1)
    for shard in (1, 2, 3):
        table.progress("job0", shard, 2, finished=True)
    assert table.statistics().jobs_ending == {"dataset": 1, "projection": 0}
    assert table.statistics().shards_left == {"dataset": 0, "projection": 4}
    table.close()


def test_stored_bytes_of_a_tenant_are_those_of_its_jobs(url: str) -> None:
    table = JobTable(url)
    table.open()
    jobs = [("a", "ds_1", 3 << 30), ("a", "pr_2", 5), ("b", "ds_3", 7), ("a", "ds_4", None), ("b", "ds_5", 11)]
    for tenant, job_id, size in jobs:
        kind: Kind = "projection" if job_id.startswith("pr") else "dataset"
        table.create(job_id, {}, tenant=tenant, kind=kind, model=("tiny", "0"), samples=1, shards=1, body_hash="a")
        table.finish(job_id, "succeeded", stored_bytes=size)
    table.delete("ds_5")
    assert [table.stored_bytes(tenant) for tenant in ("a", "b", "c")] == [(3 << 30) + 5, 7, 0]
    assert [job.id for job in table.unmeasured(10)] == ["ds_4"]
    table.set_stored_bytes("ds_4", 1)
    assert table.stored_bytes("a") == (3 << 30) + 6 and table.unmeasured(10) == []
    table.close()


def test_worker_of_version_0_1_0_runs_during_and_after_upgrade(url: str) -> None:
    """Its connections were opened before the upgrade, and it inserts jobs without a kind and leases without a version."""
    older = create_0_1_0(url)
    table = JobTable(url)
    table.open()
    begin = sa.text("INSERT INTO dermis_workers (executor_id, lease_until) VALUES (:name, :until)")
    with older.begin() as connection:
        connection.execute(begin, [{"name": name, "until": time.time() + 30} for name in ("old", "replaced")])
    table.renew_lease("replaced", 30.0)
    assert [(each.name, each.version) for each in table.statistics().workers] == [
        ("old", None),
        ("replaced", dermis.__version__),
    ]
    assert table.live_executors() == {"old", "replaced"}
    later = {f"ds_{'2' * 32}": "dataset", f"pr_{'3' * 32}": "projection"}
    for job_id in later:
        insert_0_1_0(older, job_id)
    assert {job.id: job.kind for job in table.active()} == later
    assert {job.tenant for job in table.active()} == {"default"}
    older.dispose()
    table.close()


VALUES_OF_TYPES: dict[type[sa.types.TypeEngine[Any]], object] = {
    sa.JSON: {"a": [1]},
    sa.LargeBinary: b"x" * 32,
    sa.Boolean: True,
    sa.Float: 1.5,
    sa.Integer: 1,
    sa.String: "x",
}
VALUES_OF_TABLES: dict[str, dict[str, object]] = {
    "dermis_jobs": {"id": DATASET, "kind": "dataset", "state": "succeeded"},
    "dermis_workers": {"executor_id": "older", "lease_until": 2.0**40},
}


def own_tables(connection: sa.Connection) -> dict[str, sa.Table]:
    """The tables of dermis as they are in the database, by name."""
    metadata = sa.MetaData()
    metadata.reflect(connection, only=lambda name, _: name.startswith("dermis_") and name != VERSION_TABLE)
    return dict(metadata.tables)


def value_of(column: sa.Column[Any]) -> object:
    own = VALUES_OF_TABLES.get(column.table.name, {})
    return own.get(column.name) or next(v for kind, v in VALUES_OF_TYPES.items() if isinstance(column.type, kind))


@pytest.mark.parametrize("version", ["0009", "0010", "0011"])  # test_upgrade.py has jobs of those before
def test_tables_of_a_development_version_are_upgraded_with_their_rows(version: str, url: str) -> None:
    engine = make_engine(url)
    with engine.begin() as connection:
        create_tables(connection, version)
        older = own_tables(connection)
        for each in older.values():
            connection.execute(each.delete())
            connection.execute(each.insert().values({column.name: value_of(column) for column in each.c}))
        rows = {name: connection.execute(each.select()).mappings().one() for name, each in older.items()}
    table = JobTable(url)
    table.open()
    with engine.connect() as connection:
        assert current_revision(connection) == newest_revision()
        assert changes_to_the_tables_of_the_code(connection) == []
        tables = own_tables(connection)
        for name, row in rows.items():
            after = connection.execute(tables[name].select()).mappings().one()
            assert {**after} == dict.fromkeys(after) | {**row}, name  # new columns are empty
        for name in tables.keys() - rows.keys():
            assert connection.execute(tables[name].select()).all() == [], name
    job = table.find("x", "dataset", DATASET)
    assert job is not None and (job.state, job.request, job.stored_bytes) == ("succeeded", {"a": [1]}, 1)
    assert [(worker.name, worker.works, worker.version) for worker in table.statistics().workers] == [
        ("older", True, None)
    ]
    table.close()
    engine.dispose()


def test_migrations_create_the_tables_that_the_code_defines(url: str) -> None:
    table = JobTable(url)
    table.open()
    with table._engine.connect() as connection:
        assert changes_to_the_tables_of_the_code(connection) == []
    table.close()


def changes_to_the_tables_of_the_code(connection: sa.Connection) -> list[Any]:
    """What would have to be changed in the database so that it has the tables that the code defines."""
    options = {"compare_type": True, "version_table": VERSION_TABLE}
    tables = [
        table_definitions.metadata,
        keys_module.metadata,
        trail_module.metadata,
        outbox.metadata,
        study_tables.metadata,
        counters.metadata,
        executors.metadata,
        compared_answers.metadata,
    ]
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), tables))


@pytest.mark.full
@pytest.mark.parametrize("prepare", [create_0_1_0, make_engine])
def test_many_workers_upgrade_database_at_once(url: str, prepare: Callable[[str], sa.Engine]) -> None:
    prepare(url).dispose()
    barrier, failures = threading.Barrier(6), list[BaseException]()

    def start() -> None:
        table = JobTable(url)
        try:
            barrier.wait(60)
            table.open()
            table.check()
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


def test_tables_of_a_process_share_their_connections_until_the_last_one_is_closed(url: str) -> None:
    jobs = JobTable(url)
    jobs.open()
    keys, hooks = keys_module.KeyTable(url), outbox.WebhookTable(url)
    other = JobTable(f"{url}?timeout=7" if "sqlite" in url else f"{url}_2")
    assert keys._engine is jobs._engine is hooks._engine is not other._engine
    pool = jobs._engine.pool
    assert isinstance(pool, sa.pool.QueuePool)
    for table in (other, jobs, keys):
        table.close()
        assert hooks.all("a") == [] and pool.checkedin() >= 1
    hooks.close()
    assert hooks._engine.pool is not pool and pool.checkedin() == 0
    again = JobTable(url)
    assert again._engine is not hooks._engine and again.active() == []
    again.close()


def test_new_sqlite_file_is_opened_while_another_process_locks_it(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "x.db", check_same_thread=False, isolation_level=None)
    other.execute("CREATE TABLE any (number)")
    other.execute("BEGIN IMMEDIATE")
    unlock = threading.Timer(0.3, other.rollback)
    unlock.start()
    engine = make_engine(f"sqlite:///{tmp_path / 'x.db'}")
    with engine.connect() as connection:
        assert connection.scalar(sa.text("PRAGMA journal_mode")) == "wal"
    engine.dispose()
    unlock.join()
    other.close()


def test_lock_of_a_lost_machine_is_released(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    table = JobTable(postgres.url)
    table.open()
    monkeypatch.setattr("services.jobs.database.IDLE_TRANSACTION_SECONDS", 1)
    lost = make_engine(postgres.url)
    with lost.connect() as connection:
        connection.execute(sa.text("LOCK TABLE dermis_workers"))  # and then nothing more is heard of it
        table.renew_lease("other", 30)
        connection.invalidate()
    lost.dispose()
    table.close()


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
