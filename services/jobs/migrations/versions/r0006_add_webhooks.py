"""Add webhooks and their messages. Earlier versions ignore the tables, and send no messages about the jobs that they end."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "dermis_webhooks",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("url", sa.String(500), nullable=False),
        sa.Column("events", sa.JSON, nullable=False),
        sa.Column("secret", sa.String(100), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("disabled_at", sa.Float),
    )
    op.create_index("ix_dermis_webhooks_tenant", "dermis_webhooks", ["tenant"])
    op.create_table(
        "dermis_webhook_messages",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("endpoint", sa.String(40), nullable=False),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Float, nullable=False),
        sa.Column("outcome", sa.String(100)),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
    )
    op.create_index("ix_dermis_webhook_messages_endpoint", "dermis_webhook_messages", ["endpoint"])
    op.create_index("ix_dermis_webhook_messages_due", "dermis_webhook_messages", ["state", "due_at"])
