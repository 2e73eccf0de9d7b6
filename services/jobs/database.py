"""The connection to the jobs database: the engine, its transient errors, and the lock for changes of the schema."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from services import metrics
from services.errors import DatabaseUnavailableError

UNREACHABLE = "the jobs database cannot be reached at the moment; try again"
_CONNECT_SECONDS = 10
_KEEPALIVE_SECONDS = 10
IDLE_TRANSACTION_SECONDS = 30
"""Time after which PostgreSQL ends a session that has an open transaction and sends nothing."""
_LOCK_SECONDS = 20  # a call that waits longer for a lock is repeated as if the database could not be reached
_SQLITE_WAIT_SECONDS = 30.0
_SQLITE_POLL_SECONDS = 0.02
_SCHEMA_LOCK = 0x6465726D6973  # any number that no other application on the database uses
_SCHEMA_LOCK_SECONDS = 300.0
_SCHEMA_POLL_SECONDS = 0.2
# Connections of a process to PostgreSQL, for the tables of jobs, keys, webhooks and the audit trail together.
_IDLE_CONNECTIONS = 5
_MORE_CONNECTIONS = 25  # while there is much to do
_READ_ONLY = "25006"  # SQLSTATE of a standby server, which responds during a failover


@dataclass
class _SharedEngine:
    """An engine, and how often it was opened without being closed."""

    engine: sa.Engine
    users: int = 0


_shared: dict[str, _SharedEngine] = {}
_shared_lock = threading.Lock()


def open_engine(url: str) -> sa.Engine:
    """The engine of this process for a URL. All who open it share its connections; each calls `close_engine` once."""
    with _shared_lock:
        shared = _shared.get(url)
        if shared is None:
            shared = _shared[url] = _SharedEngine(make_engine(url))
        shared.users += 1
        return shared.engine


def close_engine(engine: sa.Engine) -> None:
    """Close the connections of an engine of `open_engine`, unless others still use it."""
    with _shared_lock:
        for url, shared in list(_shared.items()):
            if shared.engine is engine:
                shared.users -= 1
                if shared.users:
                    return
                del _shared[url]
    engine.dispose()


def make_engine(url: str) -> sa.Engine:
    """Create the SQLAlchemy engine for a URL of SQLite or PostgreSQL."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() != "sqlite":
        return _postgresql_engine(parsed)
    if parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed, connect_args={"timeout": _SQLITE_WAIT_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # _on_begin starts transactions, not the driver
        _use_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous=NORMAL")

    @sa.event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        # A write takes SQLite's only write lock at once: a read that later turns into a write could not wait for it.
        write = connection.get_execution_options().get("dermis_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def connection_options(url: sa.URL) -> dict[str, int]:
    """The options with which the driver of PostgreSQL notices that the server is lost, except those that the URL has."""
    options = {
        "connect_timeout": _CONNECT_SECONDS,
        "keepalives_idle": _KEEPALIVE_SECONDS,
        "keepalives_interval": _KEEPALIVE_SECONDS,
        "keepalives_count": 3,
        "tcp_user_timeout": 1000 * IDLE_TRANSACTION_SECONDS,
    }
    return {name: value for name, value in options.items() if name not in url.query}


def _postgresql_engine(url: sa.URL) -> sa.Engine:
    engine = sa.create_engine(
        url,
        pool_pre_ping=True,
        pool_size=_IDLE_CONNECTIONS,
        max_overflow=_MORE_CONNECTIONS,
        connect_args=connection_options(url),
    )

    @sa.event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        # A machine that is lost cannot close its connections: the server would keep their locks for hours.
        values = {
            "idle_in_transaction_session_timeout": f"'{IDLE_TRANSACTION_SECONDS}s'",
            "lock_timeout": f"'{_LOCK_SECONDS}s'",
            "tcp_keepalives_idle": _KEEPALIVE_SECONDS,
            "tcp_keepalives_interval": _KEEPALIVE_SECONDS,
            "tcp_keepalives_count": 3,
        }
        with connection.cursor() as cursor:
            cursor.execute("; ".join(f"SET {name} = {value}" for name, value in values.items()))
        connection.commit()

    return engine


def _use_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Switch a database to the write-ahead log, as the first connection to a new file does.

    SQLite does not wait here for a connection that is going to write, whatever the time limit, so connections of several
    processes that open a new file at once would fail.
    """
    deadline = time.monotonic() + _SQLITE_WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(_SQLITE_POLL_SECONDS)


@contextmanager
def database_errors() -> Iterator[None]:
    """Raise DatabaseUnavailableError for transient errors: a lost connection, a lock, a restart of the server."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        if not _is_interruption(error):
            raise
        raise DatabaseUnavailableError(UNREACHABLE) from error


@contextmanager
def reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection for queries. Transient errors are DatabaseUnavailableError."""
    with _observed("read"), database_errors(), engine.connect() as connection:
        yield connection


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """Open a connection with a transaction that writes. Transient errors are DatabaseUnavailableError."""
    with (
        _observed("write"),
        database_errors(),
        engine.connect().execution_options(dermis_write=True) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def _observed(access: str) -> Iterator[None]:
    """Measure a transaction, with the time until it has a connection and a lock."""
    started, outcome = time.perf_counter(), "ok"
    try:
        yield
    except DatabaseUnavailableError:
        outcome = "unavailable"
        raise
    finally:
        metrics.database_seconds.labels(access, outcome).observe(time.perf_counter() - started)


def time_of(connection: sa.Connection) -> float:
    """Seconds since 1970 by the clock of PostgreSQL, which all replicas share; with SQLite by that of this machine."""
    if connection.dialect.name != "postgresql":
        return time.time()
    return float(connection.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")) or 0.0)


def _is_interruption(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether an error says that the database cannot be reached, restarts, is locked or is too busy."""
    if isinstance(error, sa.exc.TimeoutError):  # all connections are in use
        return True
    if not isinstance(error, sa.exc.DBAPIError):
        return False
    text = str(error.orig)
    if "database or disk is full" in text or "no such table" in text:  # SQLite has one class for these and for locks
        return False
    if error.connection_invalidated or isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError):
        return True
    return getattr(error.orig, "sqlstate", None) == _READ_ONLY


@contextmanager
def schema_lock(engine: sa.Engine) -> Iterator[None]:
    """Let only one process at a time create or change tables, our own and those of DBOS.

    On SQLite this does nothing: a transaction that changes tables takes the write lock first.

    Raises:
        DatabaseUnavailableError: If another process has held the lock for minutes.
    """
    if engine.dialect.name != "postgresql":
        yield
        return
    with database_errors():
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    with connection:
        deadline = time.monotonic() + _SCHEMA_LOCK_SECONDS
        try:
            # Polled, because DBOS creates indexes concurrently, which waits for all running statements of other
            # processes, and so for one that waits for this lock.
            while not connection.scalar(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": _SCHEMA_LOCK}):
                if time.monotonic() > deadline:
                    raise DatabaseUnavailableError("another process has been creating tables for minutes; start again")
                time.sleep(_SCHEMA_POLL_SECONDS)
            yield
        finally:
            connection.invalidate()  # closes the connection, which releases the lock even if the server was lost meanwhile


def complete_sqlite() -> None:
    """Define `unixepoch('subsec')` in SQLite before 3.42, which does not have it.

    DBOS uses it from Python 3.12 on in defaults of its tables; without it each insertion fails. Debian 12 has SQLite 3.40.
    """
    if sqlite3.sqlite_version_info < (3, 42) and not sa.event.contains(sa.Engine, "connect", _define_unixepoch):
        sa.event.listen(sa.Engine, "connect", _define_unixepoch)


def _define_unixepoch(connection: Any, _record: object) -> None:
    if hasattr(connection, "create_function"):  # SQLite
        connection.create_function("unixepoch", -1, _unixepoch)


def _unixepoch(*modifiers: str) -> float | int:
    return round(time.time(), 3) if "subsec" in modifiers else int(time.time())
