"""Counters of what tenants have used in the current minute or day, in the jobs database.

There is one row for each tenant and quota, with the window that it counts. Windows are minutes and days of UTC. All functions
work inside a transaction of the caller, so that a job is inserted and counted at once, or neither. The library `limits` cannot
do this: it keeps counters in Redis, Memcached, MongoDB or memory, not in SQL, and counts one quota at a time.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping

import sqlalchemy as sa

from services.quotas import QUOTAS, Quota, QuotaExceededError, QuotaUse

metadata = sa.MetaData()

_counters = sa.Table(
    "dermis_quota_counters",
    metadata,
    sa.Column("tenant", sa.String(63), primary_key=True),
    sa.Column("quota", sa.String(40), primary_key=True),
    sa.Column("window_start", sa.BigInteger, nullable=False),  # seconds since 1970
    sa.Column("used", sa.BigInteger, nullable=False),
)

_LOCK = 0x6465726D  # the first of two numbers of a lock of PostgreSQL; the second one is a hash of the tenant
_HASH_OFFSET = 1 << 31  # the lock takes signed numbers


def lock_tenant(connection: sa.Connection, tenant: str) -> None:
    """Let no other transaction check the quotas of this tenant until this one has ended.

    A writing transaction of SQLite is the only one anyway.
    """
    if connection.dialect.name == "postgresql":
        key = zlib.crc32(tenant.encode()) - _HASH_OFFSET
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock, :key)"), {"lock": _LOCK, "key": key})


def now() -> float:
    """Seconds since 1970. Tests replace it."""
    return time.time()


def use_of(connection: sa.Connection, tenant: str, name: str, quota: Quota) -> QuotaUse:
    """The use of a quota that has a window."""
    limit = quota.limit_of(name)
    start, used = _window(connection, tenant, name)
    return QuotaUse(name, limit, None if limit is None else used, start + (QUOTAS[name].seconds or 0))


def add(connection: sa.Connection, tenant: str, amounts: Mapping[str, int], quota: Quota) -> list[QuotaUse]:
    """Count a request in all of its quotas that have a limit, or in none. The tenant must be locked.

    Args:
        connection: A connection inside a writing transaction.
        tenant: The tenant.
        amounts: What the request needs by name of the quota, in counted units.
        quota: The quotas of the tenant.

    Returns:
        The use of each quota with a limit, with this request.

    Raises:
        QuotaExceededError: A quota would be exceeded. Nothing was changed.
    """
    limited = {name: amount for name, amount in amounts.items() if quota.limit_of(name) is not None}
    before = [use_of(connection, tenant, name, quota) for name in limited]
    for use in before:
        if (use.used or 0) + limited[use.name] > (use.limit or 0):
            raise QuotaExceededError(use, limited[use.name], now())
    after = []
    for use in before:
        used = (use.used or 0) + limited[use.name]
        _store(connection, tenant, use.name, int(use.resets_at or 0) - (use.kind.seconds or 0), used)
        after.append(QuotaUse(use.name, use.limit, used, use.resets_at))
    return after


def subtract(connection: sa.Connection, tenant: str, amounts: Mapping[str, int], counted_at: float) -> None:
    """Undo `add` for a request that has failed, as far as its window has not ended. The tenant must be locked.

    Args:
        connection: A connection inside a writing transaction.
        tenant: The tenant.
        amounts: What was counted by name of the quota.
        counted_at: Time before the call of `add`, as `now` returned it.
    """
    for name, amount in amounts.items():
        start, used = _window(connection, tenant, name)
        if used and start <= counted_at:
            _store(connection, tenant, name, start, max(0, used - amount))


def _window(connection: sa.Connection, tenant: str, name: str) -> tuple[int, int]:
    """The start of the current window and the use in it."""
    seconds = QUOTAS[name].seconds
    assert seconds is not None
    current = int(now()) // seconds * seconds
    row = connection.execute(
        sa.select(_counters.c.window_start, _counters.c.used).where(
            _counters.c.tenant == tenant, _counters.c.quota == name
        )
    ).one_or_none()
    # The clock of another replica may be slightly ahead, so that its window has begun already.
    if row is None or not current <= row.window_start <= current + seconds:
        return current, 0
    return int(row.window_start), int(row.used)


def _store(connection: sa.Connection, tenant: str, name: str, start: int, used: int) -> None:
    values = {"window_start": start, "used": used}
    condition = (_counters.c.tenant == tenant) & (_counters.c.quota == name)
    if not connection.execute(sa.update(_counters).where(condition).values(values)).rowcount:
        connection.execute(sa.insert(_counters).values(tenant=tenant, quota=name, **values))
