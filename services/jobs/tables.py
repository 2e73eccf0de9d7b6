"""The tables of jobs. A change of a table needs a revision in `migrations/versions` (see `schema`)."""

from __future__ import annotations

import sqlalchemy as sa

from services.tenants import DEFAULT_TENANT

metadata = sa.MetaData()

jobs = sa.Table(
    "dermis_jobs",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),  # order of arrival, for the cursor
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("tenant", sa.String(63), nullable=False, server_default=DEFAULT_TENANT),
    sa.Column("kind", sa.String(16)),  # never null: a trigger completes what a worker of version 0.1.0 inserts
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("model_name", sa.String(64), nullable=False),
    sa.Column("model_digest", sa.String(64), nullable=False),
    sa.Column("samples_total", sa.Integer, nullable=False),
    sa.Column("shards_total", sa.Integer, nullable=False),
    sa.Column("samples_done", sa.Integer, nullable=False, default=0),
    sa.Column("shards_done", sa.Integer, nullable=False, default=0),
    sa.Column("rate", sa.Float),  # images/s, smoothed
    sa.Column("rate_time", sa.Float),  # when, and at how many samples, `rate` was last updated
    sa.Column("rate_samples", sa.Integer),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("owner", sa.String(140)),  # the worker that runs the workflow; its lease is in `dermis_workers`
    sa.Column("idempotency_key", sa.String(255)),
    sa.Column("body_hash", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("stored_bytes", sa.BigInteger),  # of the files of a job that has succeeded; null until they are measured
    sa.Column("reserved_bytes", sa.BigInteger),  # estimate that counts until `stored_bytes` is measured
    sa.Column("trace_parent", sa.String(55)),  # W3C traceparent of the request, for the spans of the job
    sa.Index("ix_dermis_jobs_tenant", "tenant", "kind", "sequence"),
    sa.Index("uq_dermis_jobs_tenant_key", "tenant", "idempotency_key", unique=True),
    sqlite_autoincrement=True,  # numbers of deleted jobs are not used again, so cursors stay valid
)

shards = sa.Table(
    "dermis_shards",
    metadata,
    sa.Column("job_id", sa.String(40), primary_key=True),
    sa.Column("shard", sa.Integer, primary_key=True),
    sa.Column("samples_done", sa.Integer, nullable=False),
    sa.Column("finished", sa.Boolean, nullable=False),
)
