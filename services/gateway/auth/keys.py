"""API keys: their format, the table that stores their hashes, and the copy of the table that requests are compared with.

A key is `dermis_sk_<id>_<secret>`. The id (12 characters) identifies the key in lists and logs. The secret has 256 random bits,
so the table stores the plain SHA-256 of a key: a slow hash, as for passwords, protects secrets that can be guessed, and nobody
can try 2^256 values. The key itself is shown once and stored nowhere.

`python -m services.gateway.auth.keys` prints a new key that is not stored, for DERMIS_BOOTSTRAP_KEY_FILE.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from dermis.errors import DermisError
from services.data_folder import restrict_new_files
from services.errors import DatabaseUnavailableError
from services.gateway.auth.principal import unknown_scopes
from services.jobs.database import UNREACHABLE, close_engine, open_engine, reading, writing
from services.jobs.table import JobTable
from services.settings import Settings, SettingsError
from services.tenants import DEFAULT_TENANT, is_tenant

logger = logging.getLogger("dermis.auth")

PREFIX = "dermis_sk_"
DEFAULT_OVERLAP_SECONDS = 86_400.0
MAX_LIFETIME_SECONDS = 10 * 366 * 86_400.0
_KEY = re.compile(r"dermis_sk_([a-z0-9]{12})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[a-z0-9]{12}")
_ID_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
_MAX_NAME = 200
# Age at which the copy of the table is read again, so the longest time until a revocation is effective on every replica.
_CACHE_SECONDS = 2.0
# Age at which it is read again for an id that it does not contain. A request with such an id waits until then: a new key works
# at once, and all requests with invented ids together cause at most four queries a second.
_UNKNOWN_SECONDS = 0.25
# Time for which the last copy is used while the database cannot be reached.
_STALE_SECONDS = 60.0
# Age at which all rows are read again although none was added or revoked.
_RELOAD_SECONDS = 60.0
_LAST_USE_SECONDS = 60.0
# An ended key is remembered for this time, so that the answer can say why it is refused.
_ENDED_SECONDS = 90 * 86_400.0

metadata = sa.MetaData()

_keys = sa.Table(
    "dermis_api_keys",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("tenant", sa.String(63), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),  # SHA-256 of the whole key
    sa.Column("scopes", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("created_by", sa.String(300), nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
    sa.Column("last_used_at", sa.Float),  # written at most once a minute
    sa.Column("replaces", sa.String(16)),  # the key that a rotation replaced with this one
)


class KeyRefusedError(DermisError):
    """A key cannot be created with these values.

    Attributes:
        field: The value that is not valid.
        message: What to use instead.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


class KeyEndedError(DermisError):
    """A key cannot be rotated, because it has ended or was rotated already."""


class UnknownKeyError(DermisError):
    """There is no key with this id."""


@dataclass(frozen=True)
class ApiKey:
    """One row of the table. Times are seconds since 1970 (UTC)."""

    id: str
    tenant: str
    name: str
    hash: str
    scopes: tuple[str, ...]
    created_at: float
    created_by: str
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    replaces: str | None

    @property
    def prefix(self) -> str:
        """The part of the key that is not secret."""
        return PREFIX + self.id

    @property
    def allows(self) -> str:
        """Tenant and scopes, for the audit trail."""
        return f"tenant {self.tenant}: {' '.join(self.scopes)}"

    def state(self, now: float | None = None) -> Literal["active", "expired", "revoked"]:
        """`active`, `expired` or `revoked`."""
        if self.revoked_at is not None:
            return "revoked"
        expired = self.expires_at is not None and self.expires_at <= (time.time() if now is None else now)
        return "expired" if expired else "active"


def new_key() -> str:
    """A new random key, which is not stored."""
    identifier = "".join(secrets.choice(_ID_LETTERS) for _ in range(12))
    return f"{PREFIX}{identifier}_{secrets.token_urlsafe(32)}"


def key_id(text: str) -> str | None:
    """The id in a key; None if the text does not have the form of a key."""
    parts = _KEY.fullmatch(text)
    return None if parts is None else parts[1]


def hash_of(text: str) -> str:
    """The hash under which a key is stored."""
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def read_key_file(path: Path) -> str:
    """Read a key from a file, such as a Kubernetes secret.

    Raises:
        SettingsError: The file cannot be read or contains no key. The message does not contain the content.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
        raise SettingsError(f"DERMIS_BOOTSTRAP_KEY_FILE: {path} cannot be read: {reason}") from None
    if key_id(text) is None:
        raise SettingsError(
            f"DERMIS_BOOTSTRAP_KEY_FILE: {path} contains no API key; write one with `dermis keys generate > {path}`"
        )
    return text


class KeyTable:
    """The table of API keys in the jobs database. Methods may be called from any thread; `JobTable.open` creates the table."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)

    @property
    def location(self) -> str:
        """URL of the database, without a password."""
        return self._engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Close the connections, unless another table of this process uses them."""
        close_engine(self._engine)

    def create(
        self,
        *,
        tenant: str,
        name: str,
        scopes: Sequence[str],
        created_by: str,
        lifetime_seconds: float | None = None,
    ) -> tuple[ApiKey, str]:
        """Create a key.

        Args:
            tenant: The tenant whose data the key can use.
            name: A name for people, such as that of the program that uses it.
            scopes: What the key allows.
            created_by: Subject of the creator.
            lifetime_seconds: Time until it expires; None for a key that does not expire.

        Returns:
            The row, and the key, which cannot be read again.

        Raises:
            KeyRefusedError: A value is not valid.
        """
        _check(tenant, name, scopes, lifetime_seconds)
        now = time.time()
        text = new_key()
        values = _row(
            text, tenant, name, scopes, created_by, now, None if lifetime_seconds is None else now + lifetime_seconds
        )
        with writing(self._engine) as connection:
            connection.execute(sa.insert(_keys).values(values))
            return _get(connection, values["id"]), text

    def add_bootstrap_key(self, text: str) -> bool:
        """Store the first key of a deployment, with the scope `admin`, unless a key with its id is stored already.

        A bootstrap key that was revoked stays revoked.

        Returns:
            Whether it was stored.

        Raises:
            SettingsError: Another key with this id is stored.
        """
        values = _row(text, DEFAULT_TENANT, "bootstrap", ("admin",), "DERMIS_BOOTSTRAP_KEY_FILE", time.time(), None)
        try:
            with writing(self._engine) as connection:
                row = connection.execute(sa.select(_keys).where(_keys.c.id == values["id"])).one_or_none()
                if row is None:
                    connection.execute(sa.insert(_keys).values(values))
                    return True
        except IntegrityError:  # another replica inserted it at the same moment
            return False
        if not hmac.compare_digest(row.hash, values["hash"]):
            raise SettingsError(
                f"DERMIS_BOOTSTRAP_KEY_FILE: another key {values['id']} exists; generate a new bootstrap key"
            )
        return False

    def all(self, tenant: str | None = None) -> list[ApiKey]:
        """All keys of a tenant or of all tenants, newest first."""
        query = sa.select(_keys).order_by(_keys.c.created_at.desc(), _keys.c.id)
        if tenant is not None and not is_tenant(tenant):
            return []  # PostgreSQL refuses some texts, such as a null character
        if tenant is not None:
            query = query.where(_keys.c.tenant == tenant)
        with reading(self._engine) as connection:
            return [_key_of(row) for row in connection.execute(query)]

    def changes(self) -> tuple[int, int]:
        """A value that differs after a key was created, rotated or revoked: the numbers of all keys and of revoked keys.

        Numbers, not times, because the clocks of replicas differ.
        """
        with reading(self._engine) as connection:
            row = connection.execute(
                sa.select(sa.func.count(), sa.func.count(_keys.c.revoked_at)).select_from(_keys)
            ).one()
        return row[0], row[1]

    def usable(self) -> dict[str, ApiKey]:
        """Keys by id: the active ones, and those that ended in the last 90 days."""
        earliest = time.time() - _ENDED_SECONDS
        query = sa.select(_keys).where(
            sa.or_(_keys.c.revoked_at.is_(None), _keys.c.revoked_at > earliest),
            sa.or_(_keys.c.expires_at.is_(None), _keys.c.expires_at > earliest),
        )
        with reading(self._engine) as connection:
            return {row.id: _key_of(row) for row in connection.execute(query)}

    def get(self, identifier: str) -> ApiKey:
        """The key with this id.

        Raises:
            UnknownKeyError: There is none.
        """
        _check_id(identifier)
        with reading(self._engine) as connection:
            return _get(connection, identifier)

    def revoke(self, identifier: str) -> ApiKey:
        """Revoke a key. A key that is revoked already is not changed.

        Raises:
            UnknownKeyError: There is no such key.
        """
        _check_id(identifier)
        with writing(self._engine) as connection:
            condition = (_keys.c.id == identifier) & _keys.c.revoked_at.is_(None)
            connection.execute(sa.update(_keys).where(condition).values(revoked_at=time.time()))
            return _get(connection, identifier)

    def rotate(
        self, identifier: str, *, created_by: str, overlap_seconds: float = DEFAULT_OVERLAP_SECONDS
    ) -> tuple[ApiKey, str]:
        """Replace a key: a new one with the same tenant, name, scopes and lifetime, and an end of the old one.

        Args:
            identifier: Id of the old key.
            created_by: Subject of the caller.
            overlap_seconds: Time for which the old key still works.

        Returns:
            The new row, and the new key, which cannot be read again.

        Raises:
            UnknownKeyError: There is no such key.
            KeyEndedError: The key has ended, or was rotated already.
        """
        if not 0 <= overlap_seconds <= MAX_LIFETIME_SECONDS:
            raise KeyRefusedError("overlap_seconds", "use 0 or more seconds")
        _check_id(identifier)
        text = new_key()
        now = time.time()
        with writing(self._engine) as connection:
            # Of two calls at the same moment one waits here (PostgreSQL), and then sees the key of the other one.
            row = connection.execute(sa.select(_keys).where(_keys.c.id == identifier).with_for_update()).one_or_none()
            if row is None:
                raise _unknown(identifier)
            old = _key_of(row)
            if old.state(now) != "active":
                raise KeyEndedError(f"the key {old.id} is {old.state(now)}; create a new one")
            successor = connection.scalar(sa.select(_keys.c.id).where(_keys.c.replaces == old.id))
            if successor is not None:
                raise KeyEndedError(f"the key {old.id} was replaced by {successor}; rotate that one")
            expires_at = None if old.expires_at is None else now + (old.expires_at - old.created_at)
            values = _row(text, old.tenant, old.name, old.scopes, created_by, now, expires_at)
            connection.execute(sa.insert(_keys).values(values | {"replaces": old.id}))
            end = now + overlap_seconds if old.expires_at is None else min(old.expires_at, now + overlap_seconds)
            connection.execute(sa.update(_keys).where(_keys.c.id == old.id).values(expires_at=end))
            return _get(connection, values["id"]), text

    def record_uses(self, uses: Mapping[str, float]) -> None:
        """Record when keys were last used: seconds since 1970 by id."""
        with writing(self._engine) as connection:
            for identifier, moment in uses.items():
                connection.execute(sa.update(_keys).where(_keys.c.id == identifier).values(last_used_at=moment))


@contextmanager
def opened_keys(settings: Settings) -> Iterator[KeyTable]:
    """The keys of a deployment, for a program beside the service. Tables that do not exist are created.

    Raises:
        SettingsError: The jobs database cannot be opened.
    """
    restrict_new_files()
    try:
        jobs = JobTable(settings.jobs_url)
        jobs.open()
        jobs.close()
        table = KeyTable(settings.jobs_url)
    except Exception as error:  # every database driver has its own
        raise SettingsError(
            f"the jobs database cannot be opened: {str(error.__cause__ or error).splitlines()[0]}"
        ) from None
    try:
        yield table
    finally:
        table.close()


class KeyCache:
    """The keys of the table, read at most every two seconds, so that a request needs no query. Use it on one event loop.

    A request with an unknown key therefore costs one hash and one look-up, and at most four queries a second are made for all
    such requests together.
    """

    def __init__(self, table: KeyTable, clock: Callable[[], float] = time.monotonic) -> None:
        self._table, self._clock = table, clock
        self._keys: Mapping[str, ApiKey] = {}
        self._changes: tuple[int, int] | None = None
        self._read_at = self._failed_at = self._loaded_at = float("-inf")
        self._lock = asyncio.Lock()
        self._uses: dict[str, float] = {}  # id -> time of a use that is not in the table
        self._recorded: dict[str, float] = {}  # id -> time of the last use that was written
        self._writing: asyncio.Task[None] | None = None

    async def find(self, text: str, *, however_old: bool = False) -> ApiKey | None:
        """The key with this text, whether or not it has ended; None if there is none.

        Args:
            text: The key.
            however_old: Whether a key of the last copy is returned while the table cannot be read, however old the copy is.

        Raises:
            DatabaseUnavailableError: The table cannot be read, and the last copy is too old.
        """
        identifier = key_id(text)
        if identifier is None:
            return None
        try:
            await self._read_for(identifier)
        except DatabaseUnavailableError:
            if not however_old or identifier not in self._keys:
                raise
        key = self._keys.get(identifier)
        if not hmac.compare_digest(hash_of(text), "" if key is None else key.hash):
            return None
        return key

    def record_use(self, key: ApiKey) -> None:
        """Record that a key is used now. It is written to the table in the background, at most once a minute."""
        now = time.time()
        if now - max(self._recorded.get(key.id, 0.0), key.last_used_at or 0.0) < _LAST_USE_SECONDS:
            return
        self._recorded[key.id] = now
        self._uses[key.id] = now
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_uses())

    def invalidate(self) -> None:
        """Read the table again at the next request, because this process has changed it."""
        self._read_at = float("-inf")

    async def close(self) -> None:
        """Wait until the last uses are written."""
        if self._writing is not None:
            await self._writing

    async def _read_for(self, identifier: str) -> None:
        """Read the table if the copy is too old for a request with this id."""
        if self._clock() - self._read_at > _CACHE_SECONDS:
            await self._read(self._read_at)
        elif identifier not in self._keys:
            read_at = self._read_at
            await asyncio.sleep(max(0.0, read_at + _UNKNOWN_SECONDS - self._clock()))
            await self._read(read_at)

    async def _read(self, read_at: float) -> None:
        async with self._lock:
            if self._read_at != read_at:  # another request has read it meanwhile
                return
            now = self._clock()
            if now - self._failed_at < _CACHE_SECONDS:  # else every request would wait for a connection
                self._check_age(now)
                return
            try:
                changes = await asyncio.to_thread(self._table.changes)
                if changes != self._changes or now - self._loaded_at > _RELOAD_SECONDS:
                    self._keys = await asyncio.to_thread(self._table.usable)
                    self._changes, self._loaded_at = changes, now
                    self._recorded = {name: moment for name, moment in self._recorded.items() if name in self._keys}
            except DatabaseUnavailableError:
                self._failed_at = self._clock()
                self._check_age(now)
            else:
                self._read_at = now

    def _check_age(self, now: float) -> None:
        if now - self._read_at > _STALE_SECONDS:
            raise DatabaseUnavailableError(UNREACHABLE)

    async def _write_uses(self) -> None:
        while self._uses:
            uses, self._uses = self._uses, {}
            try:
                await asyncio.to_thread(self._table.record_uses, uses)
            except Exception as error:  # the time of the last use is information only
                logger.warning("last use of API keys not written", extra={"error": type(error).__name__})


def _check(tenant: str, name: str, scopes: Sequence[str], lifetime_seconds: float | None) -> None:
    if not is_tenant(tenant):
        raise KeyRefusedError(
            "tenant", "use 1 to 63 lower-case letters, digits and hyphens, and begin with a letter or digit"
        )
    if not name.strip() or len(name) > _MAX_NAME or not name.isprintable():
        raise KeyRefusedError("name", f"use 1 to {_MAX_NAME} printable characters")
    if unknown := unknown_scopes(scopes):
        raise KeyRefusedError("scopes", f"{', '.join(unknown)[:200]} does not exist; see docs/security.md")
    if not scopes:
        raise KeyRefusedError("scopes", "name at least one")
    if lifetime_seconds is not None and not 0 < lifetime_seconds <= MAX_LIFETIME_SECONDS:
        raise KeyRefusedError("expires_in_seconds", "use a time in the future, at most ten years from now")


def _check_id(identifier: str) -> None:
    """Refuse a text that cannot be an id before it reaches the database, which refuses some texts, such as a null character."""
    if not _ID.fullmatch(identifier):
        raise _unknown(identifier)


def _unknown(identifier: str) -> UnknownKeyError:
    return UnknownKeyError(f"there is no API key {identifier[:40]}")


def _row(
    text: str, tenant: str, name: str, scopes: Sequence[str], created_by: str, now: float, expires_at: float | None
) -> dict[str, Any]:
    return {
        "id": key_id(text),
        "tenant": tenant,
        "name": name,
        "hash": hash_of(text),
        "scopes": sorted(set(scopes)),
        "created_at": now,
        "created_by": created_by[:300],
        "expires_at": expires_at,
    }


def _get(connection: sa.Connection, identifier: str) -> ApiKey:
    row = connection.execute(sa.select(_keys).where(_keys.c.id == identifier)).one_or_none()
    if row is None:
        raise _unknown(identifier)
    return _key_of(row)


def _key_of(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(**{**row._mapping, "scopes": tuple(row.scopes)})


if __name__ == "__main__":
    print(new_key())
