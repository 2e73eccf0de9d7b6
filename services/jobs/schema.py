"""The version of the jobs database's schema, and its upgrade by Alembic when a worker starts.

`services.jobs.table` defines the current tables; each change of them is a revision in `migrations/versions`. Workers of the
previous version may run beside an upgraded one, so a revision only adds what an older worker can ignore.
"""

from __future__ import annotations

import logging
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from dermis.errors import DermisError

logger = logging.getLogger("dermis.jobs")

# Alembic's default name could belong to another application on the same database.
VERSION_TABLE = "dermis_schema_version"
_MIGRATIONS = Path(__file__).parent / "migrations"


class SchemaTooNewError(DermisError):
    """The tables were changed by a newer version of dermis."""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def current_revision(connection: sa.Connection) -> str | None:
    """The schema of the tables; None if there are none, or only those of version 0.1.0."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it logs two lines at each start
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()


def newest_revision() -> str:
    """The newest schema that this version knows."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


def upgrade(connection: sa.Connection) -> None:
    """Create the tables, or upgrade those of an earlier version.

    Args:
        connection: A connection inside a transaction. Either all revisions are applied in it, or none.

    Raises:
        SchemaTooNewError: If the database has a revision that this version does not know. Nothing was changed.
    """
    config = _config()
    config.attributes["connection"] = connection
    script = ScriptDirectory.from_config(config)
    before = current_revision(connection)
    known = [revision.revision for revision in script.walk_revisions()]  # newest first
    if before == known[0]:
        return
    if before is not None and before not in known:
        raise SchemaTooNewError(
            f"its tables have schema {before}, which a newer version of dermis made, and this version knows schemas up to "
            f"{known[0]}; start the newer version, or restore the backup that was made before the upgrade"
        )
    command.upgrade(config, "head")
    if before is not None:
        logger.info("jobs database upgraded", extra={"before": before, "schema": known[0]})
