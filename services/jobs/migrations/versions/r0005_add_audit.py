"""Add the audit trail. Earlier versions ignore its tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the tables, and the row of the head."""
    op.create_table(
        "dermis_audit",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("time", sa.String(27), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("outcome", sa.Integer, nullable=False),
        sa.Column("subject", sa.String(300)),
        sa.Column("tenant", sa.String(63)),
        sa.Column("route", sa.String(200)),
        sa.Column("object", sa.String(100)),
        sa.Column("client", sa.String(64)),
        sa.Column("request_id", sa.String(128)),
        sa.Column("detail", sa.String(300)),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("signature", sa.String(64)),
    )
    op.create_index("ix_dermis_audit_time", "dermis_audit", ["time"])
    head = op.create_table(
        "dermis_audit_head",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.bulk_insert(head, [{"id": 1, "number": 0, "hash": "0" * 64}])
