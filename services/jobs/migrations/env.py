"""Run revisions on the connection that `services.jobs.schema` opened, inside its transaction."""

from __future__ import annotations

from alembic import context

from services.jobs.schema import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
