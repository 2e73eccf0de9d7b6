"""Server-sent events, as the HTML standard defines them: a decoder without I/O, and flows that read a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from dermis_client import _retry
from dermis_client._flow import Emit, Flow, Request, Stream, close, connection_error, open_stream, read, sleep
from dermis_client._untrusted import one_line, without_query
from dermis_client.errors import APIConnectionError, APIResponseError

T = TypeVar("T")
MAX_EVENT_BYTES = 1 << 20  # maximum size of one line, and of the data of one event
MAX_SILENCE = 45.0  # seconds without a byte before a stream is considered broken; heartbeats are sent every 15 seconds


@dataclass(frozen=True)
class Message:
    """One event: its name ("message" if the stream has none) and its data lines, joined by newlines."""

    event: str
    data: str


@dataclass
class EventDecoder:
    """Divides a stream into messages. Its pieces may end anywhere, even inside a character or a CR LF."""

    _rest: bytes = b""
    _event: str = ""
    _data: list[str] = field(default_factory=list)
    _size: int = 0  # size of _data
    _started: bool = False

    def feed(self, chunk: bytes) -> list[Message]:
        """Return the messages that this piece completes.

        Raises:
            ValueError: A line or an event is too large.
        """
        buffer = self._rest + chunk
        # A CR at the end may be the first half of a CR LF: keep it for the next piece.
        kept = b"\r" if buffer.endswith(b"\r") else b""
        *lines, rest = buffer.removesuffix(kept).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + kept
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ValueError(f"a line of more than {MAX_EVENT_BYTES:,} bytes")
        return [message for line in lines if (message := self._line(line.decode("utf-8", "replace"))) is not None]

    def _line(self, line: str) -> Message | None:
        if not self._started:
            self._started, line = True, line.removeprefix("\ufeff")
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
            self._size += len(value) + 1
            if self._size > MAX_EVENT_BYTES:
                raise ValueError(f"an event of more than {MAX_EVENT_BYTES:,} bytes")
        return None  # comments (no name), id, retry and unknown fields need no action

    def _dispatch(self) -> Message | None:
        event, data = self._event, self._data
        self._event, self._data, self._size = "", [], 0
        return Message(event or "message", "\n".join(data)) if data else None


def open_events(path: str, max_retries: int) -> Flow[Stream]:
    """Open an event stream.

    Raises:
        APIResponseError: The response is not an event stream.
        APIConnectionError, APIStatusError: As for `_flow.call`.
    """
    request = Request(
        "GET",
        path,
        headers={"Accept": "text/event-stream", "Cache-Control": "no-store"},
        read_timeout=MAX_SILENCE,
    )
    stream = yield from open_stream(request, max_retries)
    media_type = stream.response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "text/event-stream":
        yield from close(stream)
        raise APIResponseError(
            f"{without_query(stream.response.url)} sent {media_type or 'no media type'} instead of an event stream; "
            "check base_url"
        )
    return stream


def next_events(stream: Stream, decoder: EventDecoder, parse: Callable[[Message], T]) -> Flow[list[T] | None]:
    """Return the events in the next piece of a stream, often none; None at its end.

    Raises:
        APIResponseError: `parse` raised ValueError, or an event is too large.
    """
    piece = yield from read(stream)
    if not piece:
        return None
    try:
        return [parse(message) for message in decoder.feed(piece)]
    except ValueError as error:
        raise APIResponseError(
            f"{without_query(stream.response.url)} sent an event that this client does not understand ({one_line(str(error))})"
        ) from error


def emit_events(
    path: str, job_id: str, max_retries: int, *, parse: Callable[[Message], T], is_last: Callable[[T], bool]
) -> Flow[None]:
    """Emit the events of a job up to the last one; when the stream ends earlier, connect again.

    Args:
        path: Path of the stream.
        job_id: The job, for error messages.
        max_retries: Connections in a row without an event before giving up.
        parse: Converts a message to an event; raises ValueError if it is not valid.
        is_last: Whether an event is the last one.

    Raises:
        APIConnectionError: The stream breaks again and again.
    """
    empty_streams = 0  # number of consecutive connections without an event
    while True:
        failure: Exception = APIConnectionError(f"the event stream of {job_id} keeps closing early")
        try:
            stream, decoder = (yield from open_events(path, max_retries)), EventDecoder()
            while (events := (yield from next_events(stream, decoder, parse))) is not None:
                for event in events:
                    yield Emit(event)
                    empty_streams = -1
                    if is_last(event):
                        yield from close(stream)
                        return
        except httpx.RequestError as error:
            failure = connection_error(error, f"events of {job_id}")
        empty_streams += 1
        if empty_streams > max_retries:
            raise failure
        yield from sleep(_retry.delay(empty_streams) or 0.0)
