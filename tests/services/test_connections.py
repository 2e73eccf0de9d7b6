"""Tests of limits on connections to the gateway, with raw sockets against uvicorn with the gateway's protocol."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from certificates import make_authority
from service_kit import wait_for
from services import connections
from services.connections import BoundedProtocol, connection_limit
from services.settings import Settings

GET = b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /read HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"
LARGE = 16 << 20
PATIENCE = 20.0


async def app(scope: Any, receive: Any, send: Any) -> None:
    """/livez answers, /read reads the body, /refuse answers before, /stream sends for 3 s, /large sends LARGE bytes."""
    if scope["type"] != "http":
        return
    path, size = scope["path"], 0
    if path == "/read":
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message["body"])
            if not message.get("more_body"):
                break
    close = [(b"connection", b"close")] if path == "/refuse" else []
    await send({"type": "http.response.start", "status": 413 if close else 200, "headers": close})
    if path == "/stream":
        for _ in range(30):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            await asyncio.sleep(0.1)
    if path == "/large":
        for _ in range(LARGE >> 20):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
    names = ",".join(name.decode() for name, _ in scope["headers"])
    await send({"type": "http.response.body", "body": f"{size} {names}".encode()})


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, **values: Any) -> Iterator[Callable[[], socket.socket]]:
    """A server with these settings, and a function that connects to it."""
    with running(monkeypatch, **values) as (connect, _):
        yield connect


@contextmanager
def running(
    monkeypatch: pytest.MonkeyPatch, certificate: Path | None = None, **values: Any
) -> Iterator[tuple[Callable[[], socket.socket], uvicorn.Server]]:
    """A server with such settings, and a function that connects to it. Errors of callbacks fail the test.

    Args:
        monkeypatch: Sets the settings.
        certificate: With it and its key in one file the server uses TLS.
        **values: The settings.
    """
    settings = Settings(_env_file=None, data_dir=Path("unused"), **values)
    monkeypatch.setattr(connections, "settings_of_process", lambda: settings)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=0,
            log_level="error",
            http=BoundedProtocol,
            timeout_graceful_shutdown=1,
            timeout_keep_alive=60,
            ssl_certfile=certificate,
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    failures = list[str]()
    handler = logging.Handler(logging.ERROR)
    monkeypatch.setattr(handler, "emit", lambda record: failures.append(record.getMessage()))
    logging.getLogger("asyncio").addHandler(handler)
    with ExitStack() as opened:
        opened.callback(logging.getLogger("asyncio").removeHandler, handler)
        try:
            wait_for(lambda: server.started)
            address = server.servers[0].sockets[0].getsockname()

            def connect() -> socket.socket:
                connection = socket.create_connection(address, timeout=PATIENCE)
                if certificate is not None:
                    context = ssl.create_default_context()
                    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                    connection = context.wrap_socket(connection)
                return opened.enter_context(connection)

            yield connect, server
        finally:
            server.should_exit = True
            thread.join()
    assert failures == []


def everything(connection: socket.socket) -> bytes:
    """What the service sends until it closes the connection."""
    data = b""
    with suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            data += chunk
    return data


def answer(connection: socket.socket) -> bytes:
    """One chunked answer."""
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        chunk = connection.recv(65536)
        if not chunk:
            break
        data += chunk
    return data


def status(data: bytes) -> int:
    return int(data.split(b" ", 2)[1]) if data else 0


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: here\r\nX-Long: " + b"a" * 5000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nX-Endless: " + b"a" * 200_000,
        GET + b"GET /livez HTTP/1.1\r\nX-Long: " + b"a" * 200_000,
    ],
    ids=["long", "many", "path", "endless", "second"],
)
def test_headers_above_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    with serving(monkeypatch, max_header_bytes=4096) as connect:
        connection = connect()
        if head.startswith(GET):
            connection.sendall(GET)
            assert status(answer(connection)) == 200
            head = head.removeprefix(GET)
        connection.sendall(head)
        data = everything(connection)
        assert status(data) == 431
        assert json.loads(data.split(b"\r\n\r\n")[1])["type"] == "urn:dermis:problem:headers-too-large"


def test_headers_within_limit_and_repeated_requests_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(monkeypatch, max_header_bytes=4096) as connect:
        connection = connect()
        for _ in range(3):
            connection.sendall(b"GET /livez HTTP/1.1\r\nX-Long: " + b"a" * 3900 + b"\r\n\r\n")
            assert status(answer(connection)) == 200
        connection.sendall(POST % 1_000_000 + b"x" * 1_000_000)
        assert b"1000000" in answer(connection)
        connection.sendall(GET + GET)
        both = answer(connection)
        assert both.count(b"200 OK") == 2 or status(answer(connection)) == 200


def test_body_trailers_are_bounded_and_not_added_to_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    start = b"POST /read HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    with serving(monkeypatch, max_header_bytes=4096) as connect:
        connection = connect()
        connection.sendall(start + b"X-Trailer: here\r\n\r\n")
        assert b"trailer" not in answer(connection)
        connection = connect()
        connection.sendall(start + b"X-Trailer: " + b"a" * 200_000)
        assert status(everything(connection)) == 431


def test_connection_with_overdue_headers_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, header_timeout_seconds=1.0) as connect:
        silent, slow, second, empty = connect(), connect(), connect(), connect()
        with suppress(OSError):  # closed already if this thread was suspended
            slow.sendall(b"GET /livez HTTP/1.1\r\nX-")
            empty.sendall(b"\r\n")
            second.sendall(GET)
            answer(second)
            second.sendall(b"GET /li")
        for _ in range(3):  # more bytes do not give more time
            time.sleep(0.4)
            with suppress(OSError):
                slow.sendall(b"a")
        for connection in (silent, slow, second, empty):
            assert everything(connection) == b""


def test_request_with_overdue_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, body_timeout_seconds=1.0) as connect:
        silent, dripping = connect(), connect()
        silent.sendall(POST % 10)
        dripping.sendall(POST % 1000)
        began = time.monotonic()
        with suppress(OSError):
            while time.monotonic() - began < 4:
                dripping.sendall(b"x")
                time.sleep(0.2)
        assert status(everything(silent)) == 408
        assert status(everything(dripping)) == 408


def test_response_may_take_longer_than_request_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, header_timeout_seconds=1.0, body_timeout_seconds=1.0) as connect:
        streamed = b""
        for _ in range(5):  # a connection is closed if this thread is suspended before it has sent the headers
            with suppress(OSError):
                connection = connect()
                connection.sendall(GET.replace(b"/livez", b"/stream"))
                if streamed := answer(connection):
                    break
        assert streamed.count(b"x\r\n") == 30


def test_refusal_reaches_client_that_sends_whole_body(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as connect:
        connection = connect()
        connection.sendall(POST.replace(b"/read", b"/refuse") % (64 << 20))
        time.sleep(0.3)  # the answer has been written by now
        for _ in range(64):
            connection.sendall(b"x" * (1 << 20))
        assert status(everything(connection)) == 413


def test_endless_body_of_refused_request_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_DRAIN_BYTES", 1 << 20)
    with serving(monkeypatch) as connect:
        for path in (b"/refuse", b"/livez"):  # with and without Connection: close
            connection = connect()
            connection.sendall(POST.replace(b"/read", path) % (1 << 40))
            with pytest.raises(OSError, match=r"reset|pipe"):
                for _ in range(64):
                    connection.sendall(b"x" * (1 << 20))


def test_idle_connections_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, max_connections=16) as connect:
        held = [connect() for _ in range(60)]
        for connection in held:
            with suppress(OSError):
                connection.sendall(b"GET /livez HTTP/1.1\r\nX-")
        for _ in range(5):
            asking = connect()
            asking.sendall(GET)
            assert status(answer(asking)) == 200
        assert everything(held[0]) == b""  # the oldest went first


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_client_that_does_not_read_is_disconnected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tls: bool) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make_authority(tmp_path / "authority.pem").issue(certificate, key)
    certificate.write_bytes(certificate.read_bytes() + key.read_bytes())
    monkeypatch.setattr(connections, "_READ_SECONDS", 0.5)
    with running(monkeypatch, certificate if tls else None, body_timeout_seconds=1.0) as (connect, server):
        silent, reading = connect(), connect()
        wait_for(lambda: len(server.server_state.connections) == 2)
        for connection in (silent, reading):
            connection.sendall(GET.replace(b"/livez", b"/large"))
        received, longest_pause, last = 0, 0.0, time.monotonic()

        def read() -> None:
            nonlocal received, longest_pause, last
            longest_pause = max(longest_pause, time.monotonic() - last)
            chunk = reading.recv(1 << 20)
            last = time.monotonic()
            if not chunk:
                raise ConnectionResetError
            received += len(chunk)

        try:
            while len(server.server_state.connections) == 2:  # slowly, but faster than the limit
                for _ in range(8 if tls else 1):  # a record of TLS has 16 KiB
                    read()
                time.sleep(0.1)
            with suppress(ssl.SSLError):  # TLS was not ended
                assert len(everything(silent)) < LARGE
            while received < LARGE:
                read()
        except OSError:
            assert longest_pause > 0.4  # on a busy machine this thread was suspended, and rightly disconnected


def test_clients_that_do_not_read_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_READ_SECONDS", 0.3)
    with running(monkeypatch, max_connections=16) as (connect, server):
        held = [connect() for _ in range(16)]
        for place, connection in enumerate(held):
            # Also if the end of the response waits in the buffers while the connection is being closed.
            close = b"Connection: close\r\n" if place % 2 else b""
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: here\r\n%b\r\n" % close)
        wait_for(lambda: len(getattr(server.server_state, "stalled", ())) == 16)
        for _ in range(3):
            asking = connect()
            asking.sendall(GET)
            assert status(answer(asking)) == 200


def test_requests_that_wait_on_one_connection_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as connect:
        connection = connect()
        connection.sendall(GET * 90)
        data = b""
        while data.count(b"200 OK") < 90:
            data += connection.recv(65536)
        connection = connect()
        connection.sendall(GET * 2000)
        assert everything(connection).count(b"200 OK") < 2000


def test_health_check_is_answered_when_all_connections_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(monkeypatch, max_connections=16) as (connect, server):
        working = [connect() for _ in range(16)]
        for connection in working:
            connection.sendall(POST % 10 + b"x")
        state = server.server_state
        wait_for(lambda: len(state.connections) == 16 and not state.idle)  # type: ignore[attr-defined]
        probe = connect()
        probe.sendall(GET)
        assert status(answer(probe)) == 200
        other = connect()  # not before: it replaces a connection without a request
        other.sendall(GET.replace(b"/livez", b"/v1/models"))
        assert status(everything(other)) == 503
        for connection in working:
            connection.sendall(b"x" * 9)
            assert status(answer(connection)) == 200


def test_connection_limit_follows_open_file_limit() -> None:
    settings = Settings(_env_file=None)
    assert connection_limit(settings, open_files=1 << 20) == settings.max_connections
    assert connection_limit(settings, open_files=1024) == 352
    assert connection_limit(settings, open_files=300) == 16


def test_an_offer_of_another_protocol_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as connect:
        connection = connect()
        offer = (
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        connection.sendall(GET.removesuffix(b"\r\n") + offer)
        assert status(answer(connection)) == 200


def test_request_sent_during_shutdown_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_LAST_REQUEST_SECONDS", PATIENCE)
    with running(monkeypatch) as (connect, server):
        fresh, used = connect(), connect()
        used.sendall(GET)
        answer(used)
        wait_for(lambda: len(server.server_state.connections) == 2)
        server.config.timeout_graceful_shutdown = int(PATIENCE)  # this thread may be suspended for seconds
        server.should_exit = True
        wait_for(lambda: not server.servers[0].is_serving())
        time.sleep(0.2)
        for connection in (fresh, used):
            connection.sendall(GET)
            assert status(everything(connection)) == 200
