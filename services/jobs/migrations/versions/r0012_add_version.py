"""Add the version of dermis of each process that has a lease. Earlier versions ignore it, and their processes have none."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Add the column."""
    op.add_column("dermis_workers", sa.Column("version", sa.String(64)))
