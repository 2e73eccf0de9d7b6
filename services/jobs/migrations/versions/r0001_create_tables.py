"""Create the tables of version 0.1.0, which had no schema version. A database of that version has them already."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create each table that does not exist."""
    existing = set(sa.inspect(op.get_bind()).get_table_names())
    if "dermis_jobs" not in existing:
        op.create_table(
            "dermis_jobs",
            sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
            sa.Column("id", sa.String(40), nullable=False, unique=True),
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
            sa.Column("idempotency_key", sa.String(255), unique=True),
            sa.Column("body_hash", sa.String(64), nullable=False),
            sa.Column("created_at", sa.Float, nullable=False),
            sa.Column("started_at", sa.Float),
            sa.Column("finished_at", sa.Float),
            sqlite_autoincrement=True,
        )
        op.create_index("ix_dermis_jobs_state", "dermis_jobs", ["state"])
    if "dermis_shards" not in existing:
        op.create_table(
            "dermis_shards",
            sa.Column("job_id", sa.String(40), primary_key=True),
            sa.Column("shard", sa.Integer, primary_key=True),
            sa.Column("samples_done", sa.Integer, nullable=False),
            sa.Column("finished", sa.Boolean, nullable=False),
        )
    if "dermis_workers" not in existing:
        op.create_table(
            "dermis_workers",
            sa.Column("executor_id", sa.String(140), primary_key=True),
            sa.Column("lease_until", sa.Float, nullable=False),
        )
