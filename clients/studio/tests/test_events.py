"""Tests of what an event of a page may contain, and of what a visitor can keep open."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from dermis_studio.bodies import RefusedError
from dermis_studio.events import (
    ABANDONED_SECONDS,
    MAX_LARGE,
    MAX_OPEN_EVENTS,
    MAX_SESSIONS_OF_A_KEY,
    MAX_STREAMS,
    MAX_VALUES,
    Sessions,
    checked_session,
    session_of,
)
from dermis_studio.service import Service
from starlette.testclient import TestClient

FILE = {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}}


class Queue:
    """A queue of events that nobody works on."""

    def __init__(self) -> None:
        self.pending_event_ids_session: MutableMapping[str, Any] = {}
        self.pending_messages_per_session: MutableMapping[str, Any] = {}
        self.stopped: list[str] = []

    def put(self, session: str, count: int) -> None:
        self.pending_event_ids_session[session] = {str(number) for number in range(count)}
        self.pending_messages_per_session[session] = ["result"]

    async def clean_events(self, *, session_hash: str) -> None:
        self.stopped.append(session_hash)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def body(data: Any, session: Any = "abc") -> bytes:
    return json.dumps({"fn_index": 0, "data": data, "session_hash": session}).encode()


def test_values_of_events_are_plain() -> None:
    assert session_of(body([None, True, 1, 0.5, "text", ["a", ["b"]]])) == "abc"
    nested: Any = FILE
    for _ in range(4):
        with pytest.raises(RefusedError, match="texts, numbers and lists"):
            session_of(body(["a", nested]))
        nested = [nested]
    for refused in (b"x", b"[]", b"[" * 100_000, body({"0": FILE}), body("a"), body([], None), body([], "a/b")):
        with pytest.raises(RefusedError):
            session_of(refused)
    with pytest.raises(RefusedError):
        checked_session(None)


def test_only_an_image_may_be_long_and_parsing_stays_short(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[int] = []
    loads = json.loads

    def counted(text: str) -> Any:
        parsed.append(len(text))
        return loads(text)

    monkeypatch.setattr(json, "loads", counted)
    image = "data:image/png;base64," + "A" * (1 << 20)
    quoted = ["[{,", 'a "b" \\', "\\", "é", image]
    assert session_of(body([image, *quoted, *range(1000)])) == "abc"
    assert max(parsed) < 10_000
    parsed.clear()
    too_much: list[list[Any]] = [
        [[1] * (MAX_VALUES + 1)],
        ["a"] * (MAX_VALUES + 1),
        [1] * (1 << 20),
        [[[]] * 200],
        [image + "\n"],
        [image + "é"],
        ["a" * 10_000] * 10,
    ]
    for refused in too_much:
        for content in (
            body(refused),
            json.dumps({"data": refused, "session_hash": "abc"}, ensure_ascii=False).encode(),
        ):
            with pytest.raises(RefusedError):
                session_of(content)
    # A decoder that finds out the encoding by itself would see values where this one sees texts.
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"):
        with pytest.raises(RefusedError, match="not JSON"):
            session_of(body([1]).decode().encode(encoding))
    assert max(parsed, default=0) < 10_000


def test_session_belongs_to_the_key_that_used_it_first() -> None:
    async def run() -> None:
        sessions = Sessions(Queue())
        await sessions.admit("a", "key 1")
        await sessions.admit("a", "key 1")
        with pytest.raises(RefusedError, match="another key"):
            await sessions.admit("a", "key 2")
        with pytest.raises(RefusedError, match="another key"), sessions.reading("a", None):
            pass
        with sessions.reading("a", "key 1"):
            pass
        assert sessions.knows("a") and not sessions.knows("b")

    asyncio.run(run())


def test_open_events_of_a_key_are_limited_and_abandoned_ones_removed() -> None:
    async def run() -> None:
        queue, clock = Queue(), Clock()
        sessions = Sessions(queue, clock)
        for name in ("a", "b"):
            await sessions.admit(name, "key")
        queue.put("a", MAX_OPEN_EVENTS - 1)
        queue.put("b", 1)
        with pytest.raises(RefusedError, match=f"{MAX_OPEN_EVENTS} events") as refused:
            await sessions.admit("c", "key")
        assert refused.value.status == 429
        await sessions.admit("other", "other key")
        queue.put("other", MAX_LARGE)
        with pytest.raises(RefusedError):
            await sessions.admit("other", "other key", large=True)
        await sessions.admit("other", "other key")
        with sessions.reading("b", "key"):
            clock.now += ABANDONED_SECONDS
            await sessions.admit("c", "key")
        assert set(queue.pending_messages_per_session) == set(queue.pending_event_ids_session) == {"b"}
        assert sorted(queue.stopped) == ["a", "other"]

    asyncio.run(run())


def test_pages_of_a_key_and_streams_of_a_page_are_limited() -> None:
    async def run() -> None:
        queue = Queue()
        sessions = Sessions(queue)
        await sessions.admit("other", "other key")
        for number in range(MAX_SESSIONS_OF_A_KEY):
            await sessions.admit(str(number), "key")
        queue.put("1", 1)
        await sessions.admit("0", "key")  # used again, so "1" was not used for the longest time
        await sessions.admit("more", "key")
        assert sessions.knows("0") and not sessions.knows("1") and sessions.knows("other")
        assert queue.stopped == ["1"] and not queue.pending_messages_per_session
        names = [str(number) for number in range(MAX_SESSIONS_OF_A_KEY) if number != 1] + ["more"]
        with ExitStack() as streams:
            for name in names:
                streams.enter_context(sessions.reading(name, "key"))
            with pytest.raises(RefusedError, match="pages of this key") as refused:
                await sessions.admit("last", "key")
            assert refused.value.status == 429
            for _ in range(MAX_STREAMS - 1):
                streams.enter_context(sessions.reading("more", "key"))
            with pytest.raises(RefusedError, match=f"{MAX_STREAMS} times"), sessions.reading("more", "key"):
                pass

    asyncio.run(run())


@pytest.mark.full
def test_gradio_neither_reads_files_of_the_server_nor_keeps_results_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Gradio itself: its cache stays empty, and the queue has the parts that are used here."""
    pytest.importorskip("gradio")
    from dermis_studio.app import create_site

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "cache"))
    service = Service("http://service.test", allow_plain_http=True)
    answer: dict[str, Any] = {"tenant": "default", "scopes": None, "quotas": []}
    service._http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: httpx.Response(200, json=answer)))
    site = create_site(service, needs_key=False)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await site.start()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await site.stop()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await site(scope, receive, send)

    with TestClient(app, base_url="http://localhost", headers={"Content-Type": "application/json"}) as client:
        join = "/studio/gradio_api/queue/join"
        refused = client.post(join, content=body([FILE] * 6))
        assert refused.status_code == 422
        assert not (tmp_path / "cache").exists() or not any((tmp_path / "cache").rglob("*"))
        assert client.post(join, content=body([])).status_code == 200
        queue: Any = site._sessions._queue
        assert set(queue.pending_messages_per_session) == {"abc"}
        site._sessions._clock = lambda: 1e9
        assert client.post(join, content=body([], "def")).status_code == 200
        assert set(queue.pending_messages_per_session) == set(queue.pending_event_ids_session) == {"def"}
