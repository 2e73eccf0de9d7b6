"""The tables of webhooks: endpoints, and the messages that wait for delivery.

The transaction that ends a job also inserts its messages, so a message exists if and only if the job has ended. A message is
delivered at least once: a process claims it for a limited time, sends it, and records the outcome. If the process dies, another
one sends the message again. Receivers recognise repetitions by the id of the message.
"""

from __future__ import annotations

import base64
import datetime
import json
import secrets
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import sqlalchemy as sa

from dermis.errors import DermisError
from services.jobs import counters
from services.jobs.database import close_engine, open_engine, reading, time_of, writing

State = Literal["waiting", "delivered", "dead"]
STATES: tuple[State, ...] = ("waiting", "delivered", "dead")
EventName = Literal[
    "dataset.succeeded",
    "dataset.failed",
    "dataset.cancelled",
    "projection.succeeded",
    "projection.failed",
    "projection.cancelled",
]
EVENTS: tuple[EventName, ...] = get_args(EventName)

# Seconds after each failed attempt, as Standard Webhooks recommends; about three days in total.
RETRY_SECONDS = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
CLAIM_SECONDS = 60.0  # longer than one attempt can take
_KEPT_SECONDS = {"waiting": 7 * 86_400.0, "delivered": 7 * 86_400.0, "dead": 30 * 86_400.0}
_GONE = 410

metadata = sa.MetaData()

_endpoints = sa.Table(
    "dermis_webhooks",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(63), nullable=False, index=True),
    sa.Column("url", sa.String(500), nullable=False),
    sa.Column("events", sa.JSON, nullable=False),
    sa.Column("secret", sa.String(100), nullable=False),  # as text: the service signs with it
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("disabled_at", sa.Float),  # when the receiver answered 410 (Gone)
)

_messages = sa.Table(
    "dermis_webhook_messages",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("endpoint", sa.String(40), nullable=False, index=True),
    sa.Column("event", sa.String(40), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due_at", sa.Float, nullable=False),
    sa.Column("outcome", sa.String(100)),  # of the last attempt
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Index("ix_dermis_webhook_messages_due", "state", "due_at"),
)


class TooManyWebhooksError(DermisError):
    """The tenant has as many webhooks as the settings allow."""


@dataclass(frozen=True)
class Endpoint:
    """A URL that gets a message when jobs of a tenant end. Times are seconds since 1970 (UTC)."""

    id: str
    tenant: str
    url: str
    events: tuple[str, ...]
    secret: str
    created_at: float
    disabled_at: float | None


@dataclass(frozen=True)
class Message:
    """A message for one endpoint. `dead` messages were not delivered and are not tried again."""

    id: str
    endpoint: str
    event: str
    body: str
    state: State
    attempts: int  # whose outcome was recorded
    due_at: float
    outcome: str | None
    created_at: float
    ended_at: float | None


@dataclass(frozen=True)
class Due:
    """An endpoint with messages that are due."""

    endpoint: str
    tenant: str


@dataclass(frozen=True)
class Claim:
    """A message that this process is to send now. The end of the claim, `message.due_at`, tells it from later claims."""

    message: Message
    endpoint: Endpoint


def add_messages(connection: sa.Connection, *, tenant: str, kind: str, job_id: str, state: str) -> None:
    """Insert the messages about a job that has ended, in the transaction that ends it."""
    event = f"{kind}.{state}"
    rows = connection.execute(
        sa.select(_endpoints.c.id, _endpoints.c.events).where(
            _endpoints.c.tenant == tenant, _endpoints.c.disabled_at.is_(None)
        )
    ).all()
    now = time.time()
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    # Only the id and the state: whoever may know more asks for it with credentials.
    data = {"object": kind, "id": job_id, "state": state}
    body = json.dumps({"type": event, "timestamp": moment, "data": data}, separators=(",", ":"))
    values = [
        {
            "id": f"msg_{uuid.uuid4().hex}",
            "endpoint": row.id,
            "event": event,
            "body": body,
            "state": "waiting",
            "attempts": 0,
            "due_at": now,
            "created_at": now,
        }
        for row in rows
        if event in row.events
    ]
    if values:
        connection.execute(sa.insert(_messages), values)


class WebhookTable:
    """The tables of webhooks in the jobs database. Methods may be called from any thread; `JobTable.open` creates them."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)

    def close(self) -> None:
        """Close the connections, unless another table of this process uses them."""
        close_engine(self._engine)

    # Endpoints of a tenant

    def create(self, tenant: str, url: str, events: Sequence[str], most: int) -> Endpoint:
        """Create an endpoint with a new secret.

        Raises:
            TooManyWebhooksError: The tenant has `most` endpoints.
        """
        values = {
            "id": f"wh_{uuid.uuid4().hex}",
            "tenant": tenant,
            "url": url,
            "events": sorted(set(events)),
            "secret": f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode('ascii')}",
            "created_at": time.time(),
        }
        with writing(self._engine) as connection:
            counters.lock_tenant(connection, tenant)
            count = connection.scalar(
                sa.select(sa.func.count()).select_from(_endpoints).where(_endpoints.c.tenant == tenant)
            )
            if (count or 0) >= most:
                raise TooManyWebhooksError(f"this tenant has {most} webhooks; delete one that is not used")
            connection.execute(sa.insert(_endpoints).values(values))
            row = connection.execute(sa.select(_endpoints).where(_endpoints.c.id == values["id"])).one()
        return _endpoint_of(row)

    def all(self, tenant: str) -> list[Endpoint]:
        """The endpoints of a tenant, newest first."""
        query = sa.select(_endpoints).where(_endpoints.c.tenant == tenant)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(_endpoints.c.created_at.desc(), _endpoints.c.id))
            return [_endpoint_of(row) for row in rows]

    def get(self, tenant: str, identifier: str) -> Endpoint | None:
        """An endpoint of a tenant, or None."""
        query = sa.select(_endpoints).where(_endpoints.c.tenant == tenant, _endpoints.c.id == identifier)
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _endpoint_of(row)

    def delete(self, tenant: str, identifier: str) -> bool:
        """Delete an endpoint of a tenant with its messages; whether there was one."""
        with writing(self._engine) as connection:
            condition = (_endpoints.c.tenant == tenant) & (_endpoints.c.id == identifier)
            if not connection.execute(sa.delete(_endpoints).where(condition)).rowcount:
                return False
            connection.execute(sa.delete(_messages).where(_messages.c.endpoint == identifier))
            return True

    def messages(self, endpoint: str, state: str | None = None, limit: int = 100) -> list[Message]:
        """The messages for an endpoint, newest first."""
        query = sa.select(_messages).where(_messages.c.endpoint == endpoint)
        if state is not None:
            query = query.where(_messages.c.state == state)
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(_messages.c.created_at.desc(), _messages.c.id).limit(limit))
            return [Message(**row._mapping) for row in rows]

    def retry(self, endpoint: str, message: str) -> Message | None:
        """Send a dead message again, from its first attempt on; None if there is no such message.

        The endpoint is enabled again. A message that is not dead is not changed.
        """
        condition = (_messages.c.endpoint == endpoint) & (_messages.c.id == message)
        with writing(self._engine) as connection:
            changed = connection.execute(
                sa.update(_messages)
                .where(condition, _messages.c.state == "dead")
                .values(state="waiting", attempts=0, due_at=time.time(), ended_at=None)
            ).rowcount
            if changed:
                connection.execute(sa.update(_endpoints).where(_endpoints.c.id == endpoint).values(disabled_at=None))
            row = connection.execute(sa.select(_messages).where(condition)).one_or_none()
        return None if row is None else Message(**row._mapping)

    # Delivery

    def due(self, busy: Sequence[str], now: float) -> list[Due]:
        """The endpoints that have messages which are due, the one with the oldest message first.

        Args:
            busy: Endpoints to leave out: this process sends to them at the moment.
            now: Seconds since 1970.
        """
        query = (
            sa.select(_messages.c.endpoint, _endpoints.c.tenant)
            .outerjoin_from(_messages, _endpoints, _endpoints.c.id == _messages.c.endpoint)
            .where(_messages.c.state == "waiting", _messages.c.due_at <= now, _messages.c.endpoint.not_in(busy))
            .group_by(_messages.c.endpoint, _endpoints.c.tenant)
            .order_by(sa.func.min(_messages.c.due_at), _messages.c.endpoint)
        )
        with reading(self._engine) as connection:
            # Without a tenant if the endpoint has just been deleted. Its messages are claimed, which ends them.
            return [Due(row.endpoint, row.tenant or "") for row in connection.execute(query)]

    def claim(self, endpoints: Sequence[str], now: float) -> list[Claim]:
        """Claim the oldest message that is due of each endpoint, so that a slow endpoint does not delay others.

        Args:
            endpoints: The endpoints.
            now: Seconds since 1970.
        """
        claims: list[Claim] = []
        for endpoint in endpoints:
            claims += self._claim_one(endpoint, now)
        return claims

    def _claim_one(self, endpoint: str, now: float) -> list[Claim]:
        due = (_messages.c.endpoint == endpoint) & (_messages.c.state == "waiting") & (_messages.c.due_at <= now)
        query = sa.select(_messages).where(due).order_by(_messages.c.due_at).limit(1).with_for_update(skip_locked=True)
        with writing(self._engine) as connection:
            row = connection.execute(query).one_or_none()
            if row is None:  # another process has claimed it
                return []
            to = connection.execute(sa.select(_endpoints).where(_endpoints.c.id == endpoint)).one_or_none()
            if to is None or to.disabled_at is not None:
                values: dict[str, Any] = {"state": "dead", "outcome": "the webhook is disabled", "ended_at": now}
                connection.execute(sa.update(_messages).where(_messages.c.id == row.id).values(values))
                return []
            values = {"due_at": now + CLAIM_SECONDS}
            connection.execute(sa.update(_messages).where(_messages.c.id == row.id).values(values))
            message = Message(**{**row._mapping, **values})
        return [Claim(message, _endpoint_of(to))]

    def record(self, claim: Claim, outcome: str, status: int | None, now: float) -> None:
        """Record the outcome of an attempt: delivered, to be tried again later, or dead.

        Args:
            claim: The claim.
            outcome: Text about the outcome, without anything that the receiver sent.
            status: The HTTP status; None without an answer.
            now: Seconds since 1970.
        """
        message = claim.message
        values: dict[str, Any] = {"attempts": message.attempts + 1, "outcome": outcome[:100]}
        if status is not None and 200 <= status < 300:
            values |= {"state": "delivered", "ended_at": now}
        elif status == _GONE or message.attempts >= len(RETRY_SECONDS):
            values |= {"state": "dead", "ended_at": now}
        else:
            pause = RETRY_SECONDS[message.attempts]
            values |= {"due_at": now + pause * (1 + 0.1 * secrets.randbelow(100) / 100)}
        # A claim that took too long may have been taken over, which made its end later.
        mine = (_messages.c.id == message.id) & (_messages.c.due_at == message.due_at)
        with writing(self._engine) as connection:
            connection.execute(sa.update(_messages).where(mine, _messages.c.state == "waiting").values(values))
            if status == _GONE:
                of_it = _endpoints.c.id == claim.endpoint.id
                connection.execute(sa.update(_endpoints).where(of_it).values(disabled_at=now))

    def remove_old(self, now: float | None = None) -> None:
        """Remove messages that ended a week (delivered) or a month (dead) ago, or that nobody has tried to send for a week.

        Messages that wait are tried at least once a day while webhooks are on. After a time without them, old news is not sent.

        Args:
            now: Seconds since 1970; by default by the clock of the database.
        """
        with writing(self._engine) as connection:
            now = time_of(connection) if now is None else now
            for state, seconds in _KEPT_SECONDS.items():
                # A message that is sent again by hand is due from then on, however old it is.
                since = _messages.c.due_at if state == "waiting" else _messages.c.ended_at
                connection.execute(sa.delete(_messages).where(_messages.c.state == state, since < now - seconds))


def _endpoint_of(row: sa.Row[Any]) -> Endpoint:
    return Endpoint(**{**row._mapping, "events": tuple(row.events)})
