"""The leases of workers and gateways in the jobs database, which show whose work others have to take over.

All functions work inside a writing transaction of the caller.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from dermis import __version__

# Time for which a process that has stopped is still known, so that its work is not taken for that of one that was lost.
_STOPPED_SECONDS = 3600.0

metadata = sa.MetaData()

_workers = sa.Table(
    "dermis_workers",
    metadata,
    sa.Column("executor_id", sa.String(140), primary_key=True),
    # The end of the lease, seconds since 1970. After a stop the negative time of the stop, so that an earlier version sees a
    # lease that has run out; 0: stopped under an earlier version.
    sa.Column("lease_until", sa.Float, nullable=False),
    sa.Column("works", sa.Boolean),  # false for a gateway, which runs no jobs; null: written by an earlier version
    sa.Column("version", sa.String(64)),  # of dermis; null: written by an earlier version
)


@dataclass(frozen=True)
class Executors:
    """Names of processes that run or submit jobs.

    Attributes:
        alive: Those whose lease has not run out.
        stopped: Those that have ended properly within the last hour.
    """

    alive: set[str]
    stopped: set[str]


def renew(connection: sa.Connection, executor_id: str, seconds: float, *, works: bool) -> None:
    """Extend the lease of a process, or begin it.

    Args:
        connection: A connection inside a writing transaction.
        executor_id: The name of the process.
        seconds: The length of the lease.
        works: Whether the process runs jobs; a gateway does not.
    """
    values = {"lease_until": time.time() + seconds, "works": works, "version": __version__}
    of_it = _workers.c.executor_id == executor_id
    if not connection.execute(sa.update(_workers).where(of_it).values(values)).rowcount:
        connection.execute(sa.insert(_workers).values(executor_id=executor_id, **values))


def stop(connection: sa.Connection, executor_id: str) -> None:
    """End the lease of a process that stops."""
    of_it = _workers.c.executor_id == executor_id
    connection.execute(sa.update(_workers).where(of_it).values(lease_until=-time.time()))


def read(connection: sa.Connection) -> Executors:
    """The processes with a lease, and those that have stopped. Rows of all others are removed."""
    now, until = time.time(), _workers.c.lease_until
    rows = connection.execute(sa.select(_workers.c.executor_id, until)).all()
    lost = (until > 0) & (until < now)
    forgotten = (until <= 0) & (until > _STOPPED_SECONDS - now)
    connection.execute(sa.delete(_workers).where(lost | forgotten))
    return Executors(
        alive={row.executor_id for row in rows if row.lease_until >= now},
        stopped={row.executor_id for row in rows if row.lease_until <= 0},
    )
