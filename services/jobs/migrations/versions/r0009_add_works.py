"""Add whether a process that has a lease runs jobs, which a gateway does not. Earlier versions ignore it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the column."""
    op.add_column("dermis_workers", sa.Column("works", sa.Boolean))
