"""The audit trail: a chain of entries in the jobs database.

Entries are numbered from 1 without gaps. The hash of an entry is the SHA-256 of the hash of the entry before it and of its own
content as canonical JSON, so a changed, removed, inserted or moved entry does not fit to its neighbours. A second table has one
row, the head: number and hash of the last entry. A transaction that appends locks this row first, so all replicas write one
chain, and entries that are removed at the end are noticed.

Whoever can write to the database can write the whole chain anew. With a key (DERMIS_AUDIT_KEY_FILE), which is not in the
database, each entry is also signed (HMAC-SHA256 of its hash). `services.audit.verification` checks all of this.
"""

from __future__ import annotations

import datetime
import getpass
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from dermis.errors import DermisError
from services.jobs.database import close_engine, database_errors, open_engine, reading, writing
from services.settings import Settings, SettingsError

GENESIS = "0" * 64  # the hash before the first entry
CUT = "audit.cut"
_BATCH = 1000
_KEY_BYTES = 32  # at least
_CUT_LOCK = 0x6465726D637574  # of PostgreSQL; any number that no other application on the database uses

metadata = sa.MetaData()

_entries = sa.Table(
    "dermis_audit",
    metadata,
    sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column(
        "time", sa.String(27), nullable=False, index=True
    ),  # as text, so that its hash does not depend on the driver
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("outcome", sa.Integer, nullable=False),
    sa.Column("subject", sa.String(300)),
    sa.Column("tenant", sa.String(63)),
    sa.Column("route", sa.String(200)),
    sa.Column("object", sa.String(100)),
    sa.Column("client", sa.String(64)),
    sa.Column("request_id", sa.String(128)),
    sa.Column("detail", sa.String(300)),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Column("signature", sa.String(64)),
)

_head = sa.Table(
    "dermis_audit_head",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),  # 1, the only row
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)

_lock_head = sa.select(_head.c.number, _head.c.hash).where(_head.c.id == 1).with_for_update()
_read_head = sa.select(_head.c.number, _head.c.hash).where(_head.c.id == 1)
_move_head = sa.update(_head).where(_head.c.id == 1)
_insert = sa.insert(_entries)


class HeadMissingError(DermisError):
    """The row with the head of the chain was removed, so nothing can be appended."""


class NothingToCutError(DermisError):
    """No entry is as old as that."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What is recorded. Fields that do not apply are None.

    Attributes:
        time: UTC, as `now()` returns it.
        action: What was done, such as `dataset.create`.
        outcome: The HTTP status; 200 for a command.
        subject: Who did it: `key:<id>`, `user:<sub>`, `anonymous`, `command:<account>` or `service`.
        tenant: The tenant of the subject.
        route: Method and path template of the request.
        object: Id of what it was done to.
        client: Address of the client.
        request_id: Id of the request, which is also in the log.
        detail: Further facts, such as the name of a downloaded file.
    """

    time: str
    action: str
    outcome: int
    subject: str | None = None
    tenant: str | None = None
    route: str | None = None
    object: str | None = None
    client: str | None = None
    request_id: str | None = None
    detail: str | None = None


_EVENT_FIELDS = tuple(field.name for field in fields(Event))


@dataclass(frozen=True, kw_only=True)
class Entry(Event):
    """One entry of the trail.

    Attributes:
        number: Its place, from 1.
        hash: SHA-256 of the hash of the entry before it and of its own content.
        signature: HMAC-SHA256 of `hash`; None if it was written without a key.
    """

    number: int
    hash: str
    signature: str | None

    def chained_hash(self, previous: str) -> str:
        """The hash that this entry must have after an entry with the hash `previous`."""
        return _hash_of(self.number, self, previous)

    def document(self) -> dict[str, Any]:
        """The entry as JSON, without fields that do not apply."""
        return {"number": self.number, **{name: value for name, value in asdict(self).items() if value is not None}}

    @classmethod
    def of(cls, document: dict[str, Any]) -> Self:
        """The entry of a document; further keys are ignored.

        Raises:
            ValueError: It is not a document of an entry.
        """
        known = {field.name for field in fields(cls)}
        values = {"signature": None} | {name: value for name, value in document.items() if name in known}
        for name, value in values.items():
            right = int if name in ("number", "outcome") else str
            if value is not None and type(value) is not right:
                raise ValueError(f"the field {name} is not a {'number' if right is int else 'text'}")
        missing = [name for name in ("number", "time", "action", "outcome", "hash") if values.get(name) is None]
        if missing:
            raise ValueError(f"the field {missing[0]} is missing")
        return cls(**values)


@dataclass(frozen=True)
class Head:
    """The last entry of the chain: number 0 and the hash `GENESIS` if there is none."""

    number: int
    hash: str

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"


@dataclass(frozen=True)
class Snapshot:
    """The trail, or a part of it, at one moment.

    Attributes:
        head: The last entry of the whole trail; None if the row of the head was removed.
        cut: The newest mark of a cut.
        previous: Hash of the entry before the first one; None if it is not known.
        entries: The entries, oldest first.
    """

    head: Head | None
    cut: Entry | None
    previous: str | None
    entries: Iterator[Entry]


def now() -> str:
    """The present time as entries contain it."""
    return time_text(datetime.datetime.now(datetime.UTC))


def time_text(moment: datetime.datetime) -> str:
    """A time as entries contain it: `2026-11-28T23:18:00.123456Z`. Such texts sort by time."""
    if moment.year < 1970 or moment.year > 9998:  # its time in UTC may be no date, and no entry is that old or new
        return f"{moment.year:04d}-01-01T00:00:00.000000Z"
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def sign(key: bytes, entry_hash: str) -> str:
    """The signature of an entry with this hash."""
    return hmac.new(key, entry_hash.encode("ascii"), hashlib.sha256).hexdigest()


def read_key(path: Path | None) -> bytes | None:
    """The key of a file.

    Raises:
        SettingsError: The file cannot be read, or is too short.
    """
    if path is None:
        return None
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"DERMIS_AUDIT_KEY_FILE: {path} cannot be read: {error.strerror}") from None
    if len(key) < _KEY_BYTES:
        raise SettingsError(
            f"DERMIS_AUDIT_KEY_FILE: {path} has fewer than {_KEY_BYTES} bytes; make one with `openssl rand -hex 32`"
        )
    return key


def command_event(action: str, **values: Any) -> Event:
    """An event of a command, by the account that runs it."""
    try:
        account = getpass.getuser()
    except (OSError, KeyError):  # the account has no name, as in many containers
        account = str(os.getuid())
    return Event(time=now(), action=action, outcome=200, subject=f"command:{account}"[:300], **values)


class AuditTable:
    """The trail in the jobs database. Methods may be called from any thread; `JobTable.open` creates the tables.

    Args:
        url: SQLAlchemy URL of the jobs database.
        key: Signs new entries.
    """

    def __init__(self, url: str, key: bytes | None = None) -> None:
        self._engine = open_engine(url)
        self._key = key

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The trail of a service.

        Raises:
            SettingsError: The key cannot be read.
        """
        return cls(settings.jobs_url, read_key(settings.audit_key_file))

    def close(self) -> None:
        """Close the connections, unless another table of this process uses them."""
        close_engine(self._engine)

    def append(self, events: Sequence[Event]) -> list[Entry]:
        """Append events in one transaction, in their order.

        Raises:
            DatabaseUnavailableError: The database cannot be reached.
            HeadMissingError: The trail was damaged.
        """
        with writing(self._engine) as connection:
            return self._append(connection, events)

    def _append(self, connection: sa.Connection, events: Sequence[Event]) -> list[Entry]:
        head = connection.execute(_lock_head).one_or_none()
        if head is None:
            raise HeadMissingError("the head of the audit trail was removed from the database; see docs/audit.md")
        number, previous = head
        entries = []
        for event in events:
            number += 1
            previous = _hash_of(number, event, previous)
            signature = None if self._key is None else sign(self._key, previous)
            values = {name: getattr(event, name) for name in _EVENT_FIELDS}
            entries.append(Entry(**values, number=number, hash=previous, signature=signature))
        connection.execute(_insert, [entry.__dict__ for entry in entries])
        connection.execute(_move_head, {"number": number, "hash": previous})
        return entries

    def check_key(self) -> None:
        """Check that the next entry is signed as the last one is. Entries may begin to be signed.

        Raises:
            SettingsError: The last entry is signed, and there is no key, or another one.
        """
        query = sa.select(_entries.c.hash, _entries.c.signature).order_by(_entries.c.number.desc()).limit(1)
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.signature is None:
            return
        if self._key is None:
            raise SettingsError(
                "DERMIS_AUDIT_KEY_FILE: the audit trail is signed; set it to the key file of the service"
            )
        if not hmac.compare_digest(sign(self._key, row.hash), row.signature):
            raise SettingsError("DERMIS_AUDIT_KEY_FILE: the last entry of the audit trail was signed with another key")

    def head(self) -> Head | None:
        """The last entry; None if the row of the head was removed."""
        with reading(self._engine) as connection:
            return _head_of(connection)

    def page(
        self,
        limit: int,
        *,
        before: int | None = None,
        since: str | None = None,
        until: str | None = None,
        tenant: str | None = None,
        subject: str | None = None,
        action: str | None = None,
        object_id: str | None = None,
    ) -> list[Entry]:
        """Entries, newest first.

        Args:
            limit: Maximum number of entries.
            before: Only entries with lower numbers.
            since: Only entries of this time or later ones.
            until: Only entries of earlier times.
            tenant: Only entries of this tenant.
            subject: Only entries of this subject.
            action: Only entries of this action.
            object_id: Only entries about this object.
        """
        query = sa.select(_entries).order_by(_entries.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(_entries.c.number < before)
        exact = {"tenant": tenant, "subject": subject, "action": action, "object": object_id}
        for name, value in exact.items():
            if value is not None:
                query = query.where(_entries.c[name] == value)
        with reading(self._engine) as connection:
            return [Entry(**row._mapping) for row in connection.execute(_in_range(query, since, until))]

    @contextmanager
    def snapshot(self, since: str | None = None, until: str | None = None) -> Iterator[Snapshot]:
        """The trail as it is at one moment, oldest entry first, while others append to it.

        Args:
            since: Only entries of this time or later ones.
            until: Only entries of earlier times.
        """
        isolation = {"isolation_level": "REPEATABLE READ"} if self._engine.dialect.name == "postgresql" else {}
        with (
            database_errors(),
            self._engine.connect().execution_options(**isolation) as connection,
            connection.begin(),
        ):
            head = _head_of(connection)
            query = sa.select(_entries).where(_entries.c.action == CUT).order_by(_entries.c.number.desc()).limit(1)
            row = connection.execute(query).one_or_none()
            cut = None if row is None else Entry(**row._mapping)
            first, last = _range_of(connection, since, until)
            yield Snapshot(head, cut, _hash_before(connection, first, cut), _between(connection, first, last))

    def cut(self, before: str, event: Event) -> Entry:
        """Remove the oldest entries, and append a mark that says which ones and what the hash of the last one was.

        Both happen in one transaction, or neither. Entries are removed first, which can take minutes, and the head is locked
        for the mark alone, so that others can append meanwhile (PostgreSQL).

        Args:
            before: Entries of earlier times are removed, up to the first one that is not earlier.
            event: The mark, without the object and the detail.

        Returns:
            The mark.

        Raises:
            NothingToCutError: There is no such entry.
        """
        with writing(self._engine) as connection:
            if connection.dialect.name == "postgresql":  # one cut at a time: the next one sees what this one has left
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _CUT_LOCK})
            kept = sa.select(sa.func.min(_entries.c.number)).where(_entries.c.time >= before)
            limit = connection.scalar(kept)
            query = sa.select(_entries.c.number, _entries.c.hash).order_by(_entries.c.number.desc()).limit(1)
            last = connection.execute(query if limit is None else query.where(_entries.c.number < limit)).one_or_none()
            if last is None:
                raise NothingToCutError(f"the audit trail has no entry before {before}")
            first = connection.scalar(sa.select(sa.func.min(_entries.c.number)))
            connection.execute(sa.delete(_entries).where(_entries.c.number <= last.number))
            mark = {name: getattr(event, name) for name in _EVENT_FIELDS}
            mark |= {"action": CUT, "object": f"{first}-{last.number}", "detail": last.hash}
            (entry,) = self._append(connection, [Event(**mark)])
            return entry


def _hash_of(number: int, event: Event, previous: str) -> str:
    # Fields that do not apply are left out, so that a later version can add fields without changing the hashes of old entries.
    content: dict[str, Any] = {"number": number}
    for name in _EVENT_FIELDS:
        value = getattr(event, name)
        if value is not None:
            content[name] = value
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{previous}\n{text}".encode("ascii")).hexdigest()


def _head_of(connection: sa.Connection) -> Head | None:
    row = connection.execute(_read_head).one_or_none()
    return None if row is None else Head(*row)


def removed_by(mark: Entry | None) -> Head | None:
    """The last entry that the mark of a cut says was removed."""
    if mark is None or mark.detail is None:
        return None
    number = (mark.object or "").rpartition("-")[2]
    return Head(int(number), mark.detail) if number.isdecimal() else None


def _in_range(query: sa.Select[Any], since: str | None, until: str | None) -> sa.Select[Any]:
    if since is not None:
        query = query.where(_entries.c.time >= since)
    return query if until is None else query.where(_entries.c.time < until)


def _range_of(connection: sa.Connection, since: str | None, until: str | None) -> tuple[int, int]:
    """The first and the last number of a range of time, without gaps: clocks of replicas can differ a little."""
    query = sa.select(sa.func.min(_entries.c.number), sa.func.max(_entries.c.number))
    first, last = connection.execute(_in_range(query, since, until)).one()
    return (0, -1) if first is None else (first, last)


def _hash_before(connection: sa.Connection, first: int, cut: Entry | None) -> str | None:
    if first == 1:
        return GENESIS
    removed = removed_by(cut)
    if removed is not None and removed.number == first - 1:
        return removed.hash
    previous: str | None = connection.scalar(sa.select(_entries.c.hash).where(_entries.c.number == first - 1))
    return previous


def _between(connection: sa.Connection, first: int, last: int) -> Iterator[Entry]:
    query = sa.select(_entries).where(_entries.c.number <= last).order_by(_entries.c.number).limit(_BATCH)
    while rows := connection.execute(query.where(_entries.c.number >= first)).all():
        yield from (Entry(**row._mapping) for row in rows)
        first = rows[-1].number + 1
