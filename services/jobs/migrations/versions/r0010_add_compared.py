"""Add the answers on uploaded images that all replicas repeat. Earlier versions ignore them and keep their own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add the table."""
    op.create_table(
        "dermis_compared",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("index_digest", sa.String(80), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(32), nullable=False),
        sa.Column("distance", sa.Float, nullable=False),
        sa.Column("radius", sa.Float, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_dermis_compared_tenant", "dermis_compared", ["tenant", "number"])
    op.create_index("ix_dermis_compared_created_at", "dermis_compared", ["created_at"])
