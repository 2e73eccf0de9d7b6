"""Alembic's environment and revisions of the jobs database."""
