"""Add the trace context of the request that created a job. Earlier versions ignore it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column."""
    op.add_column("dermis_jobs", sa.Column("trace_parent", sa.String(55)))
