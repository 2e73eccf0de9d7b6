"""Unfinished jobs of earlier versions of dermis, as `record.py` recorded them, restored into a database and a storage.

- schema-0001.json: version 0.1.0, which had no schema version and its own names of queues.
- schema-0007.json: a state before 0.2.0 with tenants, audit trail and quotas, and the same names of queues.
- schema-0008.json: a later one, with queues that are divided between tenants.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from alembic import command
from dbos import run_dbos_database_migrations

from dermis.imaging import encode
from services.jobs import schema
from services.jobs.database import make_engine

FOLDER = Path(__file__).parent
SCHEMAS = ("0001", "0007", "0008")
EXECUTOR = "older"
IDEMPOTENCY_KEY = "monday"
BODIES: tuple[dict[str, Any], ...] = (
    {"classes": {"benign": 15, "malignant": 7}, "seed": 3, "shard_size": 4},
    {"classes": {"benign": 15, "malignant": 7}, "seed": 4, "shard_size": 4, "format": "webdataset"},
)
"""The requests of the datasets. The first one was begun, with two finished shards of six; the second one was queued."""
STEPS = 3
IMAGES = 10


def uploads() -> list[tuple[str, tuple[str, bytes, str]]]:
    """The images of the projection, as a multipart form."""
    squares = np.random.default_rng(0).integers(0, 256, (IMAGES, 20, 20, 3), dtype=np.uint8)
    return [("files", (f"{number}.png", encode(square), "image/png")) for number, square in enumerate(squares)]


@dataclass(frozen=True)
class Unfinished:
    """The ids of the restored jobs."""

    datasets: tuple[str, ...]
    projection: str


def restore(version: str, url: str, storage: Path, digest: str, *, projections: bool = True) -> Unfinished:
    """Fill an empty database and a storage with what an earlier version left when it was killed.

    Args:
        version: One of SCHEMAS.
        url: SQLAlchemy URL of the database.
        storage: The folder of the jobs' files.
        digest: Digest of the bundle that the jobs were made for.
        projections: Whether to restore the projection as well.
    """
    text = (FOLDER / f"schema-{version}.json").read_text()
    record = json.loads(text)
    record = json.loads(text.replace(record["digest"], digest))
    tables: dict[str, list[dict[str, Any]]] = record["tables"]
    ids = [row["id"] for row in tables["dermis_jobs"]]
    if not projections:
        tables = {name: [row for row in rows if ids[-1] not in json.dumps(row)] for name, rows in tables.items()}
    tables["dermis_workers"] = [{"executor_id": EXECUTOR, "lease_until": time.time() - 1}]
    run_dbos_database_migrations(system_database_url=url)
    engine = make_engine(url)
    with engine.begin() as connection:
        create_tables(connection, version)
        if version == "0001":  # version 0.1.0 did not record it
            connection.execute(sa.text(f"DROP TABLE {schema.VERSION_TABLE}"))
        for name, rows in tables.items():
            _insert(connection, name, rows)
    engine.dispose()
    for name, content in record["files"].items():
        if name.startswith(ids[-1]) and not projections:
            continue
        (storage / name).parent.mkdir(parents=True, exist_ok=True)
        (storage / name).write_bytes(base64.b64decode(content))
    return Unfinished(tuple(each for each in ids if each.startswith("ds_")), ids[-1])


def create_tables(connection: sa.Connection, version: str) -> None:
    """Create the tables of dermis with an earlier schema in an empty database, as the revisions up to it do.

    Args:
        connection: A connection inside a transaction.
        version: The schema.
    """
    config = schema._config()
    config.attributes["connection"] = connection
    command.upgrade(config, version)


def _insert(connection: sa.Connection, name: str, rows: list[dict[str, Any]]) -> None:
    """Replace the rows of a table, whose columns have the types of this database."""
    # DBOS has a schema of its own on PostgreSQL.
    is_postgresql = connection.dialect.name == "postgresql"
    place = "dbos" if is_postgresql and not name.startswith("dermis_") else None
    table = sa.Table(name, sa.MetaData(), schema=place, autoload_with=connection)
    connection.execute(table.delete())
    connection.execute(table.insert(), [_row(table, row) for row in rows])
    if is_postgresql and "sequence" in table.c:
        connection.execute(sa.text(f"SELECT setval('{name}_sequence_seq', {len(rows)})"))


def _row(table: sa.Table, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of SQLite, which has neither JSON nor truth values, for this table."""
    values = dict(row)
    for name, value in row.items():
        kind = table.c[name].type
        if isinstance(kind, sa.JSON):
            values[name] = sa.null() if value is None else json.loads(value)
        elif isinstance(kind, sa.Boolean) and value is not None:
            values[name] = bool(value)
    return values
