"""Add the counters of quotas, and the estimated size of the files of each job. Earlier versions ignore both."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the table and add the column."""
    op.create_table(
        "dermis_quota_counters",
        sa.Column("tenant", sa.String(63), primary_key=True),
        sa.Column("quota", sa.String(40), primary_key=True),
        sa.Column("window_start", sa.BigInteger, nullable=False),
        sa.Column("used", sa.BigInteger, nullable=False),
    )
    op.add_column("dermis_jobs", sa.Column("reserved_bytes", sa.BigInteger))
