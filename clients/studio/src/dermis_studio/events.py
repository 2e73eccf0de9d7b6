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

from dermis_studio.bodies import RETRY_SECONDS, RefusedError

MAX_OPEN_EVENTS = 100  # of one key, until their results have been sent
# Pages of one key that were used in the last minutes; of all visitors together without access control, which does not tell them
# apart. For a further one, the one that was not used for the longest time is forgotten.
MAX_SESSIONS_OF_A_KEY = 200
MAX_SESSIONS_WITHOUT_KEY = 1000
MAX_STREAMS = 4  # of the results of one page, which reads one, and a second one after a lost connection
LARGE_BYTES = 1 << 20
MAX_LARGE = 8  # events of one key, if a further one is large; and large bodies that are received at a time
# The page with the most fields has 20, one of them a list of up to 6 names. An image is one long text, in base64.
MAX_VALUES = 2_000
MAX_LISTS = 100  # and objects
LONG_TEXT_BYTES = 16 << 10
MAX_SHORT_BYTES = 64 << 10  # of an event without its long texts
ABANDONED_SECONDS = 120.0  # after the last event or stream of a session
_MAX_DEPTH = 8
_BACKSLASH = ord("\\")
_SESSION = re.compile(r"[\w-]{1,64}")


class EventQueue(Protocol):
    """The part of Gradio's queue that is used here. It keeps results until the stream of their session is read."""

    pending_event_ids_session: MutableMapping[str, Any]
    pending_messages_per_session: MutableMapping[str, Any]

    async def clean_events(self, *, session_hash: str) -> None:
        """Stop the events of a session."""


def session_of(content: bytes) -> str:
    """Return the session of the body of an event or of a cancellation.

    Raises:
        RefusedError: The body is not one that a page sends.
    """
    try:
        body = json.loads(_without_long_texts(content).decode("utf-8"))
    except (ValueError, RecursionError):
        raise RefusedError(400, "The event is not JSON. Load the page again.") from None
    if not isinstance(body, dict):
        raise RefusedError(400, "The event is not an object. Load the page again.")
    for value in body.get("data") or () if isinstance(body.get("data"), list) else ():
        if not _is_plain(value):
            raise RefusedError(422, "A page sends texts, numbers and lists of them only. Load the page again.")
    if not isinstance(body.get("data"), list | None):
        raise RefusedError(422, "The values of the event are not a list. Load the page again.")
    return checked_session(body.get("session_hash"))


def checked_session(name: Any) -> str:
    """Return the name of a session.

    Raises:
        RefusedError: It has another form.
    """
    if not isinstance(name, str) or not _SESSION.fullmatch(name):
        raise RefusedError(400, "The event does not name its page. Load the page again.")
    return name


def _without_long_texts(content: bytes) -> bytes:
    """Return the body of an event with empty texts in the place of the long ones, so that parsing it takes no time.

    It is parsed on the event loop of the service, here and by Gradio. So an event with many values or with escapes in long
    texts, which would take long, is refused by counting bytes, which takes milliseconds for the largest one.

    Raises:
        RefusedError: The event has too many values, or a long text is not ASCII without escapes.
    """
    too_many = RefusedError(413, f"A page sends at most {MAX_VALUES:,} values. Load the page again.")
    if content.count(b'"') > 4 * MAX_VALUES or content.count(b"\\") > MAX_SHORT_BYTES:
        raise too_many
    kept: list[bytes] = []
    values = lists = begin = outside = 0  # `begin` of what is kept next, `outside` of a text since
    place = content.find(b'"')
    while True:
        end = len(content) if place < 0 else place
        opened = content.count(b"[", outside, end) + content.count(b"{", outside, end)
        lists += opened
        values += opened + content.count(b",", outside, end)
        if place < 0:
            break
        outside = _end_of_text(content, place)
        if outside - place > LONG_TEXT_BYTES:
            text = content[place:outside]
            if not text.isascii() or b"\\" in text:
                raise RefusedError(422, "A long text of an event has to be an image. Shorten what you have entered.")
            kept += (content[begin:place], b'""')
            begin = outside
        place = content.find(b'"', outside)
    kept.append(content[begin:])
    if values > MAX_VALUES or lists > MAX_LISTS or sum(map(len, kept)) > MAX_SHORT_BYTES:
        raise too_many
    return b"".join(kept)


def _end_of_text(content: bytes, start: int) -> int:
    """Return the place behind a JSON text that begins with a quotation mark at `start`."""
    end = start
    while True:
        end = content.find(b'"', end + 1)
        if end < 0:
            raise RefusedError(400, "The event is not JSON. Load the page again.")
        escapes = 0
        while content[end - 1 - escapes] == _BACKSLASH:
            escapes += 1
        if escapes % 2 == 0:
            return end + 1


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
            RefusedError: The session belongs to another key, or too many events of this one are open, or results of too many
                pages are being read.
        """
        await self._forget_abandoned()
        owner = _digest(key)
        if name not in self._sessions:
            await self._make_place(owner, MAX_SESSIONS_WITHOUT_KEY if key is None else MAX_SESSIONS_OF_A_KEY)
        session = self._sessions.get(name) or _Session(owner)
        if session.owner != owner:
            raise RefusedError(404, "This page belongs to another key. Load it again.")
        pending = {} if self._queue is None else self._queue.pending_event_ids_session
        count = sum(len(pending.get(other, ())) for other, each in self._sessions.items() if each.owner == owner)
        if count >= (MAX_LARGE if large else MAX_OPEN_EVENTS):
            raise RefusedError(
                429,
                f"{count} events of this key wait for their results. Close pages that you do not need, then try again.",
                RETRY_SECONDS,
            )
        self._sessions[name] = session
        self._touch(name, session)

    async def _make_place(self, owner: bytes, most: int) -> None:
        """Forget the least recently used page of a key if it has as many as it may have."""
        names = [name for name, each in self._sessions.items() if each.owner == owner]
        if len(names) < most:
            return
        unused = next((name for name in names if not self._sessions[name].streams), None)
        if unused is None:
            raise RefusedError(
                429,
                f"{len(names)} pages of this key wait for results. Close pages that you do not need, then try again.",
                RETRY_SECONDS,
            )
        await self._forget(unused)

    def knows(self, name: str) -> bool:
        """Whether a session has been used, and was not abandoned."""
        return name in self._sessions

    @contextmanager
    def reading(self, name: str, key: str | None) -> Iterator[None]:
        """Keep the results of a session, which must be known, while its stream is read.

        Raises:
            RefusedError: The session belongs to another key, or its results are being read several times.
        """
        session = self._sessions[name]
        if session.owner != _digest(key):
            raise RefusedError(404, "This page belongs to another key. Load it again.")
        if session.streams >= MAX_STREAMS:
            raise RefusedError(
                429,
                f"The results of this page are read {MAX_STREAMS} times already. Load the page again.",
                RETRY_SECONDS,
            )
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
            await self._forget(name)

    async def _forget(self, name: str) -> None:
        del self._sessions[name]
        if self._queue is not None:
            await self._queue.clean_events(session_hash=name)
            self._queue.pending_event_ids_session.pop(name, None)
            self._queue.pending_messages_per_session.pop(name, None)


def _digest(key: str | None) -> bytes:
    return hashlib.sha256((key or "").encode()).digest()
