"""Add the tenant and the stored bytes of each job, and make idempotency keys unique for each tenant.

Existing jobs, and those that version 0.1.0 inserts, belong to the tenant `default`. SQLite cannot drop a constraint, so there
the table is copied; the column that tells the order of jobs keeps its next number.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_COLUMNS = (
    "sequence, id, kind, state, request, model_name, model_digest, samples_total, shards_total, samples_done, shards_done, "
    "rate, rate_time, rate_samples, error, owner, idempotency_key, body_hash, created_at, started_at, finished_at"
)


def upgrade() -> None:
    """Add the columns and the indexes, and drop the constraint on the idempotency key alone."""
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        _copy_table(connection)
    else:
        op.add_column("dermis_jobs", sa.Column("tenant", sa.String(63), nullable=False, server_default="default"))
        op.add_column("dermis_jobs", sa.Column("stored_bytes", sa.BigInteger))
        for constraint in sa.inspect(connection).get_unique_constraints("dermis_jobs"):
            if constraint["column_names"] == ["idempotency_key"]:
                op.drop_constraint(str(constraint["name"]), "dermis_jobs", type_="unique")
    op.create_index("ix_dermis_jobs_tenant", "dermis_jobs", ["tenant", "kind", "sequence"])
    op.create_index("uq_dermis_jobs_tenant_key", "dermis_jobs", ["tenant", "idempotency_key"], unique=True)


def _copy_table(connection: sa.Connection) -> None:
    triggers = connection.scalars(
        sa.text("SELECT sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'dermis_jobs'")
    ).all()
    op.create_table(
        "dermis_jobs_new",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False, unique=True),
        sa.Column("tenant", sa.String(63), nullable=False, server_default="default"),
        sa.Column("kind", sa.String(16)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.JSON, nullable=False),
        sa.Column("model_name", sa.String(64), nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("samples_total", sa.Integer, nullable=False),
        sa.Column("shards_total", sa.Integer, nullable=False),
        sa.Column("samples_done", sa.Integer, nullable=False),
        sa.Column("shards_done", sa.Integer, nullable=False),
        sa.Column("rate", sa.Float),
        sa.Column("rate_time", sa.Float),
        sa.Column("rate_samples", sa.Integer),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("owner", sa.String(140)),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("finished_at", sa.Float),
        sa.Column("stored_bytes", sa.BigInteger),
        sqlite_autoincrement=True,
    )
    op.execute(f"INSERT INTO dermis_jobs_new ({_COLUMNS}) SELECT {_COLUMNS} FROM dermis_jobs")  # noqa: S608
    op.execute("DELETE FROM sqlite_sequence WHERE name = 'dermis_jobs_new'")
    op.execute(
        "INSERT INTO sqlite_sequence (name, seq) SELECT 'dermis_jobs_new', seq FROM sqlite_sequence WHERE name = 'dermis_jobs'"
    )
    op.drop_table("dermis_jobs")
    op.rename_table("dermis_jobs_new", "dermis_jobs")
    op.create_index("ix_dermis_jobs_state", "dermis_jobs", ["state"])
    for statement in triggers:
        op.execute(sa.text(statement.replace(":", r"\:")))
