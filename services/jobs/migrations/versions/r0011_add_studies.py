"""Add the tables of reader studies. Earlier versions ignore them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "dermis_studies",
        sa.Column("id", sa.String(40), primary_key=True),
        sa.Column("tenant", sa.String(63), nullable=False, index=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("images", sa.Integer, nullable=False),
        sa.Column("real_source", sa.String(16), nullable=False),
        sa.Column("equal_classes", sa.Boolean, nullable=False),
        sa.Column("model_name", sa.String(64), nullable=False),
        sa.Column("model_digest", sa.String(64), nullable=False),
        sa.Column("class_names", sa.JSON, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("truncation_psi", sa.Float, nullable=False),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("prepared", sa.Integer, nullable=False),
        sa.Column("longest", sa.Integer, nullable=False),
        sa.Column("stored_bytes", sa.BigInteger, nullable=False),
        sa.Column("failures", sa.Integer, nullable=False),
        sa.Column("error", sa.String(500)),
        sa.Column("claimed_until", sa.Float, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("created_by", sa.String(300), nullable=False),
        sa.Column("opened_at", sa.Float),
        sa.Column("closed_at", sa.Float),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    op.create_table(
        "dermis_study_uploads",
        sa.Column("study", sa.String(40), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
    )
    op.create_table(
        "dermis_study_images",
        sa.Column("study", sa.String(40), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("truth", sa.String(16), nullable=False),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("source", sa.String(1000), nullable=False),
        sa.Column("prepared", sa.Boolean, nullable=False),
    )
    op.create_table(
        "dermis_study_invitations",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("study", sa.String(40), nullable=False, index=True),
        sa.Column("tenant", sa.String(63), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("label", sa.String(100), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
        sa.Column("first_used_at", sa.Float),
        sa.Column("last_used_at", sa.Float),
    )
    op.create_table(
        "dermis_study_answers",
        sa.Column("invitation", sa.String(16), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("study", sa.String(40), nullable=False, index=True),
        sa.Column("image", sa.Integer, nullable=False),
        sa.Column("answer", sa.String(16), nullable=False),
        sa.Column("confidence", sa.Integer, nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("changes", sa.Integer, nullable=False),
        sa.Column("answered_at", sa.Float, nullable=False),
    )
