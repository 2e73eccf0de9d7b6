"""Server-sent events, as the HTML standard defines the stream: bytes in, messages out, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_EVENT_BYTES = 1 << 20  # of one line, and of the data of one event


@dataclass(frozen=True)
class Message:
    """One dispatched event: its name ("message" if the stream gave none) and its data lines joined by newlines."""

    event: str
    data: str


@dataclass
class Decoder:
    """Cut a stream into messages; feed() takes pieces of any size, cut anywhere, even inside a character or a CR LF."""

    _rest: bytes = b""
    _event: str = ""
    _data: list[str] = field(default_factory=list)
    _size: int = 0  # of _data
    _started: bool = False

    def feed(self, chunk: bytes) -> list[Message]:
        """The messages that are complete now. Raises ValueError if a line or an event is larger than allowed."""
        buffer = self._rest + chunk
        # A CR at the end may be half of a CR LF: wait for the next piece.
        held = b"\r" if buffer.endswith(b"\r") else b""
        *lines, rest = buffer.removesuffix(held).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = rest + held
        if len(self._rest) > MOST_EVENT_BYTES:
            raise ValueError(f"a line of more than {MOST_EVENT_BYTES:,} bytes")
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
            if self._size > MOST_EVENT_BYTES:
                raise ValueError(f"an event of more than {MOST_EVENT_BYTES:,} bytes")
        return None  # comments (no name), id, retry and unknown fields need no action here

    def _dispatch(self) -> Message | None:
        event, data = self._event, self._data
        self._event, self._data, self._size = "", [], 0
        return Message(event or "message", "\n".join(data)) if data else None
