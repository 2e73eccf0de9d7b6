"""Which requests are recorded in the audit trail, and the middleware that records them.

The entry of a request that changes or shows something is stored before the first byte of the answer is sent. If it cannot be
stored, the request is answered 503 and shows nothing. Entries of other requests are stored within moments.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.audit.trail import Event, now
from services.audit.writer import AuditWriter, log_lost
from services.gateway import problems
from services.gateway.auth.principal import Principal
from services.gateway.origins import PROBES, SAFE_METHODS
from services.gateway.problems import problem_response
from services.problems import KINDS

logger = logging.getLogger("dermis.audit")

_DENIED = frozenset({401, 403})
_TOO_MANY = 429  # clients repeat such requests, so not each of them is recorded
_OBJECT_ID = re.compile(r"[a-z]{2}_[0-9a-f]{32}|[a-z0-9]{12}")  # of a job, a webhook or an API key
_LOCATION = re.compile(rb"/v1/(?:[a-z]+/)+([a-z0-9_]{1,100})")
_LEFT_OUT = "dermis.audit.left_out"
_DETAIL = "dermis.audit.detail"


@dataclass(frozen=True)
class Action:
    """How requests to a route are recorded.

    Attributes:
        name: The name of the action.
        stored_first: Whether the entry is stored before the answer is sent.
    """

    name: str
    stored_first: bool = False


# Method and path template -> how it is recorded. `NOT_RECORDED` has the other routes.
ACTIONS = {
    "POST /v1/datasets": Action("dataset.create", stored_first=True),
    "DELETE /v1/datasets/{dataset_id}": Action("dataset.delete", stored_first=True),
    "GET /v1/datasets/{dataset_id}/files/{name}": Action("dataset.download", stored_first=True),
    "GET /v1/datasets/{dataset_id}/report": Action("dataset.report"),
    "POST /v1/images": Action("image.generate"),
    "POST /v1/edits": Action("image.edit"),
    "POST /v1/edits/interpolations": Action("image.interpolate"),
    "POST /v1/edits/neighbours": Action("image.neighbours"),
    "POST /v1/classifications": Action("upload.classify"),
    "POST /v1/authenticity": Action("authenticity.compare", stored_first=True),
    "GET /v1/embeddings": Action("embedding.map", stored_first=True),
    "POST /v1/embeddings": Action("embedding.place", stored_first=True),
    "POST /v1/embeddings/projections": Action("projection.place", stored_first=True),
    "POST /v1/projections": Action("projection.create", stored_first=True),
    "DELETE /v1/projections/{projection_id}": Action("projection.delete", stored_first=True),
    "GET /v1/projections/{projection_id}": Action("projection.read", stored_first=True),
    "GET /v1/projections/{projection_id}/files/{name}": Action("projection.download", stored_first=True),
    "POST /v1/webhooks": Action("webhook.create", stored_first=True),
    "DELETE /v1/webhooks/{webhook_id}": Action("webhook.delete", stored_first=True),
    "POST /v1/webhooks/{webhook_id}/messages/{message_id}/retry": Action("webhook.retry", stored_first=True),
    "POST /v1/studies": Action("study.create", stored_first=True),
    "POST /v1/studies/{study_id}/images": Action("study.upload", stored_first=True),
    "POST /v1/studies/{study_id}/open": Action("study.open", stored_first=True),
    "POST /v1/studies/{study_id}/close": Action("study.close", stored_first=True),
    "DELETE /v1/studies/{study_id}": Action("study.delete", stored_first=True),
    "GET /v1/studies/{study_id}/results": Action("study.results", stored_first=True),
    "GET /v1/studies/{study_id}/answers": Action("study.export", stored_first=True),
    "POST /v1/studies/{study_id}/invitations": Action("invitation.create", stored_first=True),
    "DELETE /v1/studies/{study_id}/invitations/{name}": Action("invitation.revoke", stored_first=True),
    "GET /v1/reading": Action("reading.begin"),
    "GET /v1/reading/images/{position}": Action("reading.image"),
    "PUT /v1/reading/answers/{position}": Action("reading.answer"),
    "POST /v1/admin/keys": Action("key.create", stored_first=True),
    "GET /v1/admin/keys": Action("key.list"),
    "GET /v1/admin/keys/{key_id}": Action("key.read"),
    "POST /v1/admin/keys/{key_id}/rotate": Action("key.rotate", stored_first=True),
    "DELETE /v1/admin/keys/{key_id}": Action("key.revoke", stored_first=True),
    "GET /v1/admin/audit": Action("audit.read", stored_first=True),
}
# Routes that are recorded only if access to them is denied.
NOT_RECORDED = frozenset(
    {
        "GET /v1/datasets",
        "GET /v1/datasets/{dataset_id}",
        "GET /v1/datasets/{dataset_id}/events",
        "GET /v1/datasets/{dataset_id}/files",
        "HEAD /v1/datasets/{dataset_id}/files/{name}",
        "GET /v1/directions",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "GET /v1/webhooks",
        "GET /v1/webhooks/{webhook_id}",
        "GET /v1/webhooks/{webhook_id}/messages",
        "GET /v1/studies",
        "GET /v1/studies/{study_id}",
        "GET /v1/studies/{study_id}/invitations",
        "GET /v1/usage",
        "GET /metrics",
        "GET /livez",
        "GET /readyz",
    }
)


def leave_out(request: Request) -> None:
    """Do not record this request, unless it is denied: it shows only the progress of a job, which clients ask for often."""
    request.scope[_LEFT_OUT] = True


def describe(request: Request, detail: str) -> None:
    """Record this text with a request. It must be from the service itself, not from the request."""
    request.scope[_DETAIL] = detail[:300]


class DeniedRequests:
    """Limits the entries of denied requests without valid credentials: everyone who reaches the port can cause them.

    In each minute, the first requests of each address are recorded, up to a number for all addresses together. One entry says
    how many more there were.

    Args:
        clock: Seconds of a monotonic clock.
    """

    SECONDS = 60.0
    FROM_ONE_ADDRESS = 20
    FROM_ALL = 200

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = float("-inf")
        self._counts: dict[str | None, int] = {}
        self._recorded = 0
        self.left_out = 0

    def may_record(self, client: str | None) -> bool:
        """Whether the request is recorded; otherwise it is counted."""
        now_seconds = self._clock()
        if now_seconds - self._began >= self.SECONDS:
            self._began, self._recorded = now_seconds, 0
            self._counts.clear()
        count = self._counts.get(client, 0)
        if self._recorded >= self.FROM_ALL or count >= self.FROM_ONE_ADDRESS:
            self.left_out += 1
            return False
        self._counts[client] = count + 1
        self._recorded += 1
        return True

    def take(self) -> int:
        """The number of requests that were counted since the last call."""
        count, self.left_out = self.left_out, 0
        return count


class RepeatedDenials:
    """Limits the entries of requests that one sender with valid credentials repeats although they are denied or are too many.

    In each minute, the first requests of a sender to a route are recorded. One entry for each sender and route says how many
    more there were.

    Args:
        clock: Seconds of a monotonic clock.
    """

    FROM_ONE_SENDER = 20

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = float("-inf")
        self._counts: Counter[Event] = Counter()  # of this minute, by what is the same in all of them
        self._left_out: Counter[Event] = Counter()

    def may_record(self, event: Event) -> bool:
        """Whether the request is recorded; otherwise it is counted."""
        now_seconds = self._clock()
        if now_seconds - self._began >= DeniedRequests.SECONDS:
            self._began = now_seconds
            self._counts.clear()
        same = replace(event, time="", object=None, client=None, request_id=None, detail=None)
        self._counts[same] += 1
        if self._counts[same] <= self.FROM_ONE_SENDER:
            return True
        self._left_out[same] += 1
        return False

    def take(self) -> list[Event]:
        """Entries with the numbers of the requests that were counted since the last call."""
        entries = [
            replace(same, time=now(), detail=f"{count} more such denied requests")
            for same, count in self._left_out.items()
        ]
        self._left_out.clear()
        return entries


class AuditTrail:
    """Records requests. Use it on one event loop."""

    def __init__(self, writer: AuditWriter) -> None:
        self.writer = writer
        self._denied = DeniedRequests()
        self._repeated = RepeatedDenials()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Write what waits, or log it if it cannot be written."""
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.writer.close, self._take_counts())

    async def record(self, scope: Scope, status: int, location: bytes | None) -> None:
        """Record a request that is about to be answered, if it is one that is recorded.

        Args:
            scope: The ASGI scope, after routing and authentication as far as they went.
            status: The status of the answer.
            location: The header `Location` of the answer.

        Raises:
            Exception: The entry must be stored before the answer, and could not be.
        """
        template = getattr(scope.get("route"), "path", None)
        route = f"{scope['method']} {template}" if template is not None else None
        action = ACTIONS.get(route or "")
        if action is None and scope["method"] not in SAFE_METHODS and template is not None and status != 405:
            action = Action(f"{scope['method']} {template}"[:64], stored_first=True)
        denied = status in _DENIED
        if not denied and (action is None or scope.get(_LEFT_OUT)):
            return
        event = _event(scope, status, location, action, route)
        if denied or status == _TOO_MANY:
            await self._record_denied(event, known="dermis.principal" in scope)
        elif action is not None and action.stored_first:
            await self.writer.write(event)
        else:
            await self.writer.write_later(event)

    async def _record_denied(self, event: Event, known: bool) -> None:
        if self._repeated.may_record(event) if known else self._denied.may_record(event.client):
            await self.writer.write_later(event)
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(DeniedRequests.SECONDS, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        task = asyncio.create_task(self._write_count())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _write_count(self) -> None:
        for event in self._take_counts():
            try:
                await self.writer.write_later(event)
            except Exception:  # so many entries waited that it was not kept for later attempts
                log_lost(event)

    def _take_counts(self) -> list[Event]:
        """Entries with the numbers of the denied requests that were counted since the last call."""
        count = self._denied.take()
        if not count:
            return self._repeated.take()
        detail = f"{count} more denied requests"
        event = Event(time=now(), action="request.denied", outcome=401, subject="service", detail=detail)
        return [event, *self._repeated.take()]


def _event(scope: Scope, status: int, location: bytes | None, action: Action | None, route: str | None) -> Event:
    principal: Principal | None = scope.get("dermis.principal")
    params = scope.get("path_params", {})
    named = next((value for name, value in params.items() if name.endswith("_id")), None)
    if not isinstance(named, str) or not _OBJECT_ID.fullmatch(named):
        named = None  # what a client writes into a path could be anything
    created = None if location is None else _LOCATION.fullmatch(location)
    client = (scope.get("client") or (None,))[0]
    event = Event(
        time=now(),
        action="request.denied" if action is None else action.name,
        outcome=status,
        subject=None if principal is None else principal.subject[:300],
        tenant=None if principal is None else principal.tenant,
        route=None if route is None else route[:200],
        object=named if created is None else created[1].decode("ascii"),
        client=None if client is None else str(client)[:64],
        request_id=scope.get("request_id"),
        detail=scope.get(_DETAIL) if named is None or created is None else f"replaces {named}",
    )
    if (status < 300 or status == 307) and action is not None and action.name.endswith(".download"):
        return replace(event, detail=str(params.get("name"))[:300])  # the name exists, so the service has given it
    if action is not None and action.name in {"authenticity.compare", "embedding.place"}:
        return replace(event, detail=_kind_of_images(scope))
    return event


def _kind_of_images(scope: Scope) -> str:
    media_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return "generated" if b"json" in media_type.lower() else "uploads"


class AuditMiddleware:
    """ASGI middleware that records requests before they are answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        context = getattr(scope["app"].state, "context", None) if scope["type"] == "http" else None
        if context is None or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        trail: AuditTrail = context.audit
        recorded = refused = False

        async def send_recorded(message: Message) -> None:
            nonlocal recorded, refused
            if refused:  # the rest of an answer that must not be shown
                return
            if message["type"] == "http.response.start" and not recorded:
                recorded = True
                location = next((value for name, value in message.get("headers", ()) if name == b"location"), None)
                try:
                    await trail.record(scope, message["status"], location)
                except Exception as error:
                    refused = True
                    logger.error(
                        "request refused, because its audit entry was not stored",
                        extra={"id": scope.get("request_id"), "status": message["status"], "error": str(error)},
                    )
                    response = problem_response(
                        Request(scope),
                        "not-ready",
                        "the audit trail cannot be written at the moment, so the result is not shown; try again",
                        headers={"Retry-After": "5"},
                    )
                    await response(scope, receive, send)
                    return
            await send(message)

        try:
            await self._app(scope, receive, send_recorded)
        except Exception as error:
            if not recorded:
                recorded = True
                await trail.record(scope, KINDS[problems.problem_of(error).kind][0], None)
            raise
