"""Limits on connections to the gateway: size and time of headers, progress of bodies and responses, number of connections.

uvicorn, which BentoML runs, has no such limits; `BoundedProtocol` adds them to its protocol. After it has refused a request, it
continues to read for a while: a connection that is closed while the client still sends is reset, and the client gets a
connection error instead of the response.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import resource
import struct
import termios
from typing import Any, Literal

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from services import metrics
from services.gateway.routes.health import PATHS as HEALTH_PATHS
from services.problems import PROBLEM_MEDIA_TYPE, problem
from services.settings import Settings, settings_of_process

logger = logging.getLogger("dermis.connections")

_MIN_RATE = 1024.0  # of bodies and of responses, bytes a second
_TICK_SECONDS = 1.0
# Time in which a client must read some of the response; otherwise a new connection may replace this one.
_READ_SECONDS = 5.0
_MAX_PIPELINED = 100  # requests that wait on one connection; each needs memory
# Limits of the data that is read after the response, and of the time for it.
_DRAIN_BYTES = 256 << 20
_DRAIN_SECONDS = 30.0
# The time in which a request can still arrive that was sent while the service closed its port.
_LAST_REQUEST_SECONDS = 0.5
# Connections above the limit that are accepted, to answer 503, or requests for the health of the service.
_RESERVE = 64
_FILES_KEPT = 256  # open files other than connections and the files that they read


def connection_limit(settings: Settings, open_files: int | None = None) -> int:
    """The number of connections that the gateway accepts: that of the settings, or fewer if the limit of open files is low.

    Args:
        settings: The settings of the service.
        open_files: Limit of open files; by default that of this process.
    """
    if open_files is None:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        open_files = 1 << 30 if soft == resource.RLIM_INFINITY else soft
    # A connection may have a second file open: one that it downloads.
    return max(16, min(settings.max_connections, (open_files - _FILES_KEPT - _RESERVE) // 2))


class _Transport:
    """A connection's transport that leaves `close` to the protocol. uvicorn and its requests use it."""

    def __init__(self, transport: asyncio.Transport, protocol: BoundedProtocol) -> None:
        self._transport = transport
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._protocol.close_when_read()

    def is_closing(self) -> bool:
        return self._protocol.draining or self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol, with limits."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._settings = settings_of_process()
        self._raw_transport: asyncio.Transport
        # Connections without a request, the one that has been idle for the longest time first.
        if not hasattr(server_state, "idle"):
            server_state.idle = {}  # type: ignore[attr-defined]
        self._idle: dict[BoundedProtocol, None] = server_state.idle  # type: ignore[attr-defined]
        # Connections whose clients do not read the response, the one that has not read for the longest time first.
        if not hasattr(server_state, "stalled"):
            server_state.stalled = {}  # type: ignore[attr-defined]
        self._stalled: dict[BoundedProtocol, None] = server_state.stalled  # type: ignore[attr-defined]
        self._phase: Literal["head", "body", "response"] = "head"
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._not_read_seconds = 0.0
        self._unsent_before = 0
        # Bytes received since the last ones that were part of a body or completed a part of the request.
        self._unparsed = 0
        self._head_bytes = 0
        self._body_bytes = 0
        self._body_waited = 0.0
        self._too_large = False
        self._last = False
        self.draining = False
        self._drained = 0

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Handle a new connection: its first request must arrive in time, and it may replace an idle connection."""
        self._raw_transport = transport
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        limit = connection_limit(self._settings)
        if len(self.connections) > limit and (replaceable := self._idle or self._stalled):
            next(iter(replaceable)).close_for_another()
        if len(self.connections) > limit + _RESERVE:
            self.connections.discard(self)
            transport.abort()
            return
        if len(self.connections) > limit:
            self.app = self._health_only
        self._set_idle()
        self._start_timer(self._settings.header_timeout_seconds, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection."""
        self._idle.pop(self, None)
        self._stalled.pop(self, None)
        self._stop_timer()
        super().connection_lost(exc)
        self._stop_write_timer()  # after uvicorn has closed the transport once more
        self._unset_keepalive_if_required()

    def shutdown(self) -> None:
        """Stop: accept no further request, except one that may have been sent already."""
        if self.draining or (self.cycle is not None and not self.cycle.response_complete):
            super().shutdown()
            return
        self._last = True
        self._unset_keepalive_if_required()
        self._start_timer(_LAST_REQUEST_SECONDS, self._raw_transport.close)

    def close_for_another(self) -> None:
        """Close this connection, which is idle or whose client does not read, so that a new one can be accepted."""
        self._idle.pop(self, None)
        self._stalled.pop(self, None)
        self.connections.discard(self)
        if self.draining or self._raw_transport.get_write_buffer_size():
            self._raw_transport.abort()
        else:
            self._raw_transport.close()

    def close_when_read(self) -> None:
        """Close the connection after the data that the client still sends has been read, within limits."""
        unread = self._phase == "body" and self.cycle is not None and self.cycle.response_complete
        if unread and not self.is_closing:
            self._drain()
        else:
            self._raw_transport.close()
            self._start_write_timer()  # the transport sends what it has before it closes

    def _drain(self) -> None:
        self.draining = True
        self._set_idle()
        if self._raw_transport.can_write_eof():  # not with TLS
            self._raw_transport.write_eof()  # the client may wait for the end of the response
        self.flow.resume_reading()
        self._start_timer(_DRAIN_SECONDS, self._raw_transport.abort)

    def _set_idle(self) -> None:
        self._idle.pop(self, None)
        self._idle[self] = None

    # Bytes

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, within the limits."""
        if self.draining:
            self._count_drained(len(data))
            return
        self._unset_keepalive_if_required()
        self._unparsed += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            if self._too_large:
                self._refuse_head()
            else:
                self._refuse("bad-request", "the request is not valid HTTP/1.1")
            return
        except httptools.HttpParserUpgrade:  # an offer that a server may ignore; the data after it cannot be parsed
            if self.cycle is not None:
                self.cycle.keep_alive = False
        if self._unparsed > self._settings.max_header_bytes:
            self._refuse_head()
        elif self._timer is None and not self.draining:
            if self._phase == "body":
                self._body_waited = 0.0
                self._start_timer(_TICK_SECONDS, self._check_body)
            elif self._unparsed:
                self._start_timer(self._settings.header_timeout_seconds, self._head_is_late)

    def on_message_begin(self) -> None:
        """Handle the first byte of a request."""
        super().on_message_begin()
        self._phase = "head"
        self._head_bytes = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Handle a part of the path."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Handle a header. A trailer of a body is ignored, because the application already has its headers."""
        self._count_head(len(name) + len(value) + 4)
        if self._phase == "head":
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Handle the end of the headers."""
        self._stop_timer()
        self._idle.pop(self, None)
        self._unparsed = 0
        super().on_headers_complete()
        self._phase = "body"
        if self._last:
            self.cycle.keep_alive = False
        if len(self.pipeline) > _MAX_PIPELINED:
            raise ValueError("too many requests wait")  # the parser stops

    def on_body(self, body: bytes) -> None:
        """Handle a part of the body."""
        self._unparsed = 0
        self._body_bytes += len(body)
        if self.cycle.response_complete:
            self._count_drained(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Handle the end of the request."""
        self._stop_timer()
        self._unparsed = 0
        self._phase = "response"
        if self.cycle.response_complete and not self.is_closing:  # the application did not read the body
            self._set_idle()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Handle the end of a response."""
        super().on_response_complete()
        if self._phase == "response" and not self.pipeline and not self.is_closing:
            self._set_idle()

    @property
    def is_closing(self) -> bool:
        """Return whether the connection cannot send any more."""
        return self.draining or self._raw_transport.is_closing()

    def _should_upgrade(self) -> bool:
        return False  # there are no web sockets

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > self._settings.max_header_bytes:
            self._too_large = True
            raise ValueError("the headers are too large")  # the parser stops

    def _count_drained(self, count: int) -> None:
        self._drained += count
        if self._drained > _DRAIN_BYTES:
            self._raw_transport.abort()

    # The progress of responses

    def pause_writing(self) -> None:
        """Handle a client that reads more slowly than the application writes."""
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """Handle a client that has read."""
        super().resume_writing()
        self._stalled.pop(self, None)
        if not self._raw_transport.is_closing():
            self._stop_write_timer()

    def _start_write_timer(self) -> None:
        if self._write_timer is None:
            self._not_read_seconds, self._unsent_before = 0.0, self._unsent()
            self._write_timer = self.loop.call_later(_READ_SECONDS, self._check_writing)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _check_writing(self) -> None:
        before, self._unsent_before = self._unsent_before, self._unsent()
        if before - self._unsent_before >= _READ_SECONDS * _MIN_RATE:
            self._not_read_seconds = 0.0
            self._stalled.pop(self, None)
        else:
            self._not_read_seconds += _READ_SECONDS
            self._stalled.setdefault(self)
        if self._not_read_seconds >= self._settings.body_timeout_seconds:
            logger.debug("response not read", extra={"client": self.client})
            self._raw_transport.abort()
            return
        self._write_timer = self.loop.call_later(_READ_SECONDS, self._check_writing)

    def _unsent(self) -> int:
        """Bytes that were written and that the client has not received: in the transport, and in the buffer of the system."""
        buffered = self._raw_transport.get_write_buffer_size()
        connection = self._raw_transport.get_extra_info("socket")
        if connection is None or connection.fileno() < 0:  # closed
            return buffered
        try:
            queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        except OSError:  # a system that does not count them for sockets
            return buffered
        return buffered + int(struct.unpack("i", queued)[0])

    # Time

    def _start_timer(self, seconds: float, callback: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, callback)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self._raw_transport.close()  # without a response: browsers open connections in advance
        else:  # the response to an earlier request is not complete
            self.cycle.keep_alive = False

    def _check_body(self) -> None:
        self._timer = None
        if self._phase != "body" or self._raw_transport.is_closing():
            return
        if self.cycle.response_complete:
            self._body_waited += _TICK_SECONDS
            if self._body_waited > _DRAIN_SECONDS:
                self._raw_transport.abort()
                return
        elif not self.flow.read_paused and not self.cycle.waiting_for_100_continue:
            self._body_waited += _TICK_SECONDS
            if self._body_waited > self._settings.body_timeout_seconds + self._body_bytes / _MIN_RATE:
                self._refuse("upload-timeout", "the body arrives too slowly")
                return
        self._start_timer(_TICK_SECONDS, self._check_body)

    # Refusals

    def send_400_response(self, _msg: str) -> None:
        """Refuse data that is not HTTP."""
        self._refuse("bad-request", "the request is not valid HTTP/1.1")

    def _refuse_head(self) -> None:
        limit = self._settings.max_header_bytes
        self._refuse("headers-too-large", f"the request line and the headers may have at most {limit} bytes")

    def _refuse(self, kind: str, detail: str) -> None:
        """Answer with a problem and close the connection."""
        self._stop_timer()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            # The application sees that the client has disconnected, and sends nothing more.
            cycle.disconnected = True
            cycle.message_event.set()
            # A response has begun, to this request or to an earlier one, and another one cannot be sent.
            if cycle.response_started or self._phase != "body" or self.pipeline:
                self._raw_transport.abort()
                return
        metrics.rejected_requests.labels(kind).inc()
        document = problem(kind, detail, self.scope["path"] if self._phase == "body" else "/")
        body = json.dumps(document.model_dump(exclude_none=True)).encode("ascii")
        lines = [name + b": " + value for name, value in self.server_state.default_headers]
        lines.append(b"content-type: " + PROBLEM_MEDIA_TYPE.encode("ascii"))
        lines.append(b"content-length: " + str(len(body)).encode("ascii"))
        lines.append(b"connection: close")
        self._raw_transport.write(STATUS_LINE[document.status] + b"\r\n".join(lines) + b"\r\n\r\n" + body)
        logger.debug("refused", extra={"kind": kind, "client": self.client})
        self._drain()

    async def _health_only(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application of connections above the limit."""
        if scope["path"] in HEALTH_PATHS:
            await self.config.loaded_app(scope, receive, send)
            return
        metrics.rejected_requests.labels("overloaded").inc()
        document = problem("overloaded", "too many connections are open; try again", scope["path"])
        body = json.dumps(document.model_dump(exclude_none=True)).encode("ascii")
        headers = [
            (b"content-type", PROBLEM_MEDIA_TYPE.encode("ascii")),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"connection", b"close"),
            (b"retry-after", b"5"),
        ]
        await send({"type": "http.response.start", "status": document.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})
