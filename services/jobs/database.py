"""The connection to the jobs database: the engine, what its errors mean, and the lock under which tables are created."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services.errors import DatabaseUnavailableError

UNREACHABLE = "the jobs database cannot be reached at the moment; try again"
_CONNECT_SECONDS = 10
_SCHEMA_LOCK = 0x6465726D6973  # any number that no other application on the database uses
_SCHEMA_LOCK_SECONDS = 300.0
_SCHEMA_POLL_SECONDS = 0.2
_READ_ONLY = "25006"  # a standby answers, as during a failover


def make_engine(url: str) -> sa.Engine:
    """The engine of the jobs table on SQLite or PostgreSQL."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        arguments = {} if "connect_timeout" in parsed.query else {"connect_timeout": _CONNECT_SECONDS}
        return sa.create_engine(parsed, pool_pre_ping=True, connect_args=arguments)
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, connect_args={"timeout": 30})

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, below
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        # A write takes SQLite's one write lock first: a read that later turns into a write could not wait for it.
        write = connection.get_execution_options().get("dermis_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


@contextmanager
def database_errors() -> Iterator[None]:
    """Raise DatabaseUnavailableError for what the same call may not raise later: a lost connection, a lock, a restart."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        if not _is_interruption(error):
            raise
        raise DatabaseUnavailableError(UNREACHABLE) from error


def _is_interruption(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether an error says that the database is away, restarting, locked or too busy."""
    if isinstance(error, sa.exc.TimeoutError):  # every connection is in use
        return True
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    text = str(error.orig)
    if "database or disk is full" in text or "no such table" in text:  # SQLite's, of the same class as a lock
        return False
    if error.connection_invalidated or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        return True
    return getattr(error.orig, "sqlstate", None) == _READ_ONLY


@contextmanager
def schema_lock(engine: sa.Engine) -> Iterator[None]:
    """Let one process at a time create or migrate tables, our own and those of DBOS.

    SQLite needs none: a transaction that creates tables takes its write lock first.
    """
    if engine.dialect.name != "postgresql":
        yield
        return
    with database_errors():
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with connection:
        deadline = time.monotonic() + _SCHEMA_LOCK_SECONDS
        try:
            # Asked for again and again: DBOS creates indexes concurrently, which waits for every statement that is at work,
            # one that waits for this lock included.
            while not connection.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": _SCHEMA_LOCK}):
                if time.monotonic() > deadline:
                    raise DatabaseUnavailableError("another process has been creating tables for minutes; start again")
                time.sleep(_SCHEMA_POLL_SECONDS)
            yield
        finally:
            connection.invalidate()  # closes the connection, which frees the lock even if the server has gone meanwhile
