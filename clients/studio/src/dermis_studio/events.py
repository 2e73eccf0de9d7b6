"""What the events of a page may contain, to whom its stream belongs, and how many events of a visitor may be open.

Gradio takes an object in the values of an event for a file: it reads the path that the object names, also one of the server,
or fetches its address. The pages send no objects, so an event with one is refused before Gradio sees it.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

MAX_OPEN_EVENTS = 100  # of one key, until their results have been sent
LARGE_BYTES = 1 << 20
MAX_LARGE = 8  # events of one key, if a further one is large; and large bodies that are received at a time
ABANDONED_SECONDS = 120.0  # after the last event or stream of a session
_MAX_DEPTH = 8
_SESSION = re.compile(r"[\w-]{1,64}")


class EventQueue(Protocol):
    """The part of Gradio's queue that is used here. It keeps results until the stream of their session is read."""

    pending_event_ids_session: MutableMapping[str, Any]
    pending_messages_per_session: MutableMapping[str, Any]

    async def clean_events(self, *, session_hash: str) -> None:
        """Stop the events of a session."""


class RefusedEventError(Exception):
    """An event that is not passed on.

    Attributes:
        status: Status of the answer.
        detail: What is wrong.
    """

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


def session_of(content: bytes) -> str:
    """Return the session of the body of an event or of a cancellation.

    Raises:
        RefusedEventError: The body is not one that a page sends.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise RefusedEventError(400, "The event is not JSON. Load the page again.") from None
    if not isinstance(body, dict):
        raise RefusedEventError(400, "The event is not an object. Load the page again.")
    for value in body.get("data") or () if isinstance(body.get("data"), list) else ():
        if not _is_plain(value):
            raise RefusedEventError(422, "A page sends texts, numbers and lists of them only. Load the page again.")
    if not isinstance(body.get("data"), list | None):
        raise RefusedEventError(422, "The values of the event are not a list. Load the page again.")
    return checked_session(body.get("session_hash"))


def checked_session(name: Any) -> str:
    """Return the name of a session.

    Raises:
        RefusedEventError: It has another form.
    """
    if not isinstance(name, str) or not _SESSION.fullmatch(name):
        raise RefusedEventError(400, "The event does not name its page. Load the page again.")
    return name


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, list):
        return depth < _MAX_DEPTH and all(_is_plain(item, depth + 1) for item in value)
    return value is None or isinstance(value, str | int | float)


@dataclass
class _Session:
    owner: bytes
    streams: int = 0
    last_used: float = 0.0


class Sessions:
    """The sessions of the pages. A browser chooses the name of one when it loads a page; the first key to use it owns it.

    Results that nobody fetches are removed when other events arrive.

    Args:
        queue: The queue of the events; None if there is none.
        clock: Seconds that never decrease.
    """

    def __init__(self, queue: EventQueue | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue, self._clock = queue, clock
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # the least recently used one first

    async def admit(self, name: str, key: str | None, *, large: bool = False) -> None:
        """Let an event of a session in.

        Args:
            name: Name of the session.
            key: Key of the visitor.
            large: Whether the event may be larger than `LARGE_BYTES`. It is in memory until it ends.

        Raises:
            RefusedEventError: The session belongs to another key, or too many events of this one are open.
        """
        await self._forget_abandoned()
        owner = _digest(key)
        session = self._sessions.get(name) or _Session(owner)
        if session.owner != owner:
            raise RefusedEventError(404, "This page belongs to another key. Load it again.")
        pending = {} if self._queue is None else self._queue.pending_event_ids_session
        count = sum(len(pending.get(other, ())) for other, each in self._sessions.items() if each.owner == owner)
        if count >= (MAX_LARGE if large else MAX_OPEN_EVENTS):
            raise RefusedEventError(
                429,
                f"{count} events of this key wait for their results. Close pages that you do not need, then try again.",
            )
        self._sessions[name] = session
        self._touch(name, session)

    def knows(self, name: str) -> bool:
        """Whether a session has been used, and was not abandoned."""
        return name in self._sessions

    @contextmanager
    def reading(self, name: str, key: str | None) -> Iterator[None]:
        """Keep the results of a session, which must be known, while its stream is read.

        Raises:
            RefusedEventError: The session belongs to another key.
        """
        session = self._sessions[name]
        if session.owner != _digest(key):
            raise RefusedEventError(404, "This page belongs to another key. Load it again.")
        session.streams += 1
        try:
            yield
        finally:
            session.streams -= 1
            self._touch(name, session)

    def _touch(self, name: str, session: _Session) -> None:
        session.last_used = self._clock()
        if name in self._sessions:
            self._sessions.move_to_end(name)

    async def _forget_abandoned(self) -> None:
        now = self._clock()
        abandoned = []
        for name, session in self._sessions.items():
            if session.last_used > now - ABANDONED_SECONDS:
                break
            if not session.streams:
                abandoned.append(name)
        for name in abandoned:
            del self._sessions[name]
            if self._queue is not None:
                await self._queue.clean_events(session_hash=name)
                self._queue.pending_event_ids_session.pop(name, None)
                self._queue.pending_messages_per_session.pop(name, None)


def _digest(key: str | None) -> bytes:
    return hashlib.sha256((key or "").encode()).digest()
