"""Add the column `kind`, and correct the path in the errors of failed projections.

Version 0.1.0 recognised projections by the prefix of their id, and may run beside this version during a rolling upgrade.
It inserts jobs without a kind, so a trigger completes them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_KIND_OF_ID = "CASE WHEN substr({id}, 1, 3) = 'pr_' THEN 'projection' ELSE 'dataset' END"

_POSTGRESQL = (
    f"""
    CREATE FUNCTION dermis_jobs_kind() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        NEW.kind := {_KIND_OF_ID.format(id="NEW.id")};
        RETURN NEW;
    END
    $$
    """,
    """
    CREATE TRIGGER dermis_jobs_kind BEFORE INSERT ON dermis_jobs
    FOR EACH ROW WHEN (NEW.kind IS NULL) EXECUTE FUNCTION dermis_jobs_kind()
    """,
)
_SQLITE = (
    f"""
    CREATE TRIGGER dermis_jobs_kind AFTER INSERT ON dermis_jobs WHEN NEW.kind IS NULL
    BEGIN
        UPDATE dermis_jobs SET kind = {_KIND_OF_ID.format(id="NEW.id")} WHERE sequence = NEW.sequence;
    END
    """,  # noqa: S608
)

_jobs = sa.table("dermis_jobs", sa.column("id", sa.String), sa.column("kind", sa.String), sa.column("error", sa.JSON))


def upgrade() -> None:
    """Add the column, the trigger and the kinds of existing jobs."""
    connection = op.get_bind()
    op.add_column("dermis_jobs", sa.Column("kind", sa.String(16)))
    op.execute(f"UPDATE dermis_jobs SET kind = {_KIND_OF_ID.format(id='id')}")  # noqa: S608
    for statement in _POSTGRESQL if connection.dialect.name == "postgresql" else _SQLITE:
        op.execute(sa.text(statement))
    # Earlier builds of version 0.1.0 gave a failed projection the path of a dataset.
    failed = sa.select(_jobs.c.id, _jobs.c.error).where(_jobs.c.kind == "projection", _jobs.c.error.is_not(None))
    for job_id, error in connection.execute(failed).all():
        if isinstance(error, dict) and str(error.get("instance", "")).startswith("/v1/datasets/"):
            corrected = error | {"instance": f"/v1/projections/{job_id}"}
            connection.execute(sa.update(_jobs).where(_jobs.c.id == job_id).values(error=corrected))
