"""Proxies on the loopback address that disturb the connections through them: one for TCP, and one for S3 over HTTP."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

import aiohttp
from aiohttp import web
from yarl import URL

_CHUNK = 1 << 16
_PROBE_SECONDS = 0.5
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


@contextmanager
def _loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


class TcpProxy:
    """Forwards connections to a port. `cut` closes them and refuses new ones; `stall` keeps them without forwarding.

    While `reports_end` is false the server does not learn that a client has ended, as if its machine had lost power. The
    connections of clients that ended in that time stay open at the server, also after it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, target: int) -> None:
        self._loop, self._target = loop, target
        self._writers: set[asyncio.StreamWriter] = set()
        self._mode: Literal["pass", "cut", "stall"] = "pass"
        self._passing = asyncio.Event()
        self._passing.set()
        self.reports_end = True
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), loop
        ).result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    def set_mode(self, mode: Literal["pass", "cut", "stall"]) -> None:
        """Forward again, or cut or stall all connections, present and new ones."""
        asyncio.run_coroutine_threadsafe(self._set_mode(mode), self._loop).result(10)

    async def _set_mode(self, mode: Literal["pass", "cut", "stall"]) -> None:
        self._mode = mode
        if mode == "stall":
            self._passing.clear()
        else:
            self._passing.set()
        if mode == "cut":
            for writer in list(self._writers):
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "cut":
            writer.transport.abort()
            return
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, there_writer}
        self._writers |= ends
        try:
            copying = {
                asyncio.ensure_future(self._copy(reader, there_writer)),
                asyncio.ensure_future(self._copy(there_reader, writer)),
            }
            _, open_ends = await asyncio.wait(copying, return_when=asyncio.FIRST_COMPLETED)
            if open_ends and not self.reports_end:
                await asyncio.wait(open_ends)
        finally:
            self._writers -= ends
            for end in ends:
                end.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                await self._passing.wait()
                writer.write(data)
                await writer.drain()


@contextmanager
def tcp_proxy(target: int) -> Iterator[TcpProxy]:
    """A proxy to a port of the loopback address."""
    with _loop_in_thread() as loop:
        proxy = TcpProxy(loop, target)
        try:
            yield proxy
        finally:
            proxy.set_mode("cut")
            loop.call_soon_threadsafe(proxy._server.close)


Fault = Literal["500", "503", "time-out", "half upload", "half answer"]
FAULTS: tuple[Fault, ...] = ("500", "503", "time-out", "half upload", "half answer")


class S3Proxy:
    """Forwards HTTP requests to an S3 server. A share of them gets a fault instead.

    The faults are: status 500 `InternalError`; status 503 `SlowDown`; no answer for `stall_seconds`; a request of which the
    server gets the headers and half of the body before the connection ends; an answer of which the client gets the headers and
    half of the body. Each request gets one that is possible for it: a request without a body has no half of one.

    After a status, a time-out or a half upload the server has changed nothing, and after a half answer it has; a client
    cannot know that.

    Attributes:
        share: The part of the requests that get a fault.
        counts: How many were made, by fault.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, target: str, seed: int) -> None:
        self.share = 0.0
        self.stall_seconds = 8.0
        self.counts: dict[Fault, int] = dict.fromkeys(FAULTS, 0)
        self._loop, self._target, self._random = loop, target, random.Random(seed)
        self._session: aiohttp.ClientSession
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(), loop).result(30)

    async def _start(self) -> int:
        self._session = aiohttp.ClientSession(auto_decompress=False)
        app = web.Application(client_max_size=1 << 34)
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, auto_decompress=False)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port: int = self._runner.addresses[0][1]
        return port

    async def close(self) -> None:
        """End the proxy."""
        await self._runner.cleanup()
        await self._session.close()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        content = await request.read() if request.can_read_body else b""
        fault = self._choose(request, content) if self._random.random() < self.share else None
        if fault in ("500", "503"):
            self.counts[fault] += 1
            code = "InternalError" if fault == "500" else "SlowDown"
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>try again</Message></Error>"
            body = "" if request.method == "HEAD" else text
            return web.Response(status=int(fault), text=body, content_type="application/xml")
        if fault == "time-out":
            self.counts[fault] += 1
            await asyncio.sleep(self.stall_seconds)
            return _cut(request)
        # The signature covers the path and the headers as they were sent, and the host of this proxy.
        headers = [
            (name, value) for name, value in request.headers.items() if name.lower() not in _HOP_HEADERS - {"host"}
        ]
        if fault == "half upload":
            await self._upload_half(request, headers, content)
            self.counts[fault] += 1
            return _cut(request)
        url = URL(f"{self._target}{request.raw_path}", encoded=True)
        async with self._session.request(
            request.method, url, headers=headers, data=content or None, allow_redirects=False
        ) as response:
            data = await response.read()
            kept = [(name, value) for name, value in response.headers.items() if name.lower() not in _HOP_HEADERS]
            length = response.headers.get("Content-Length", str(len(data)))
            answer = web.StreamResponse(status=response.status, headers=kept)
            answer.headers["Content-Length"] = length if request.method == "HEAD" else str(len(data))
            await answer.prepare(request)
            if fault == "half answer" and len(data) > 1:
                self.counts[fault] += 1
                await answer.write(data[: len(data) // 2])
                _cut(request)
            else:
                await answer.write(data)
            return answer

    def _choose(self, request: web.Request, content: bytes) -> Fault:
        """A random fault that is possible for a request, half of a body as often as all others together."""
        halves: list[Fault] = ["half upload"] if len(content) > 1 else []
        if request.method in ("GET", "POST"):  # the answer to a PUT has no body
            halves.append("half answer")
        others: list[Fault] = ["500", "503", "time-out"]
        return self._random.choice(halves if halves and self._random.random() < 0.5 else others)

    async def _upload_half(self, request: web.Request, headers: Sequence[tuple[str, str]], content: bytes) -> None:
        """Send a request with its whole length and half of its body, and end the connection."""
        with suppress(OSError):
            address = URL(self._target)
            _, writer = await asyncio.open_connection(address.host, address.port)
            lines = [f"{request.method} {request.raw_path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
            lines += [f"Content-Length: {len(content)}", "", ""]
            writer.write("\r\n".join(lines).encode("latin-1") + content[: len(content) // 2])
            await writer.drain()
            writer.close()  # sends what is buffered, and then the end of the connection
            await writer.wait_closed()


def _cut(request: web.Request) -> web.Response:
    """End the connection of a client; the response is not sent."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


@contextmanager
def s3_proxy(target: str, seed: int) -> Iterator[S3Proxy]:
    """A proxy to an S3 server at an URL such as http://127.0.0.1:8333."""
    with _loop_in_thread() as loop:
        proxy = S3Proxy(loop, target, seed)
        try:
            yield proxy
        finally:
            asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(30)


class LoadBalancer:
    """Forwards each new connection to the next of several services that are ready, as a Service of Kubernetes does.

    A service is ready while its /readyz answers 200; it is asked twice a second. Connections that are open stay where they are.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, targets: Sequence[int]) -> None:
        self._loop, self._targets = loop, list(targets)
        self.ready: set[int] = set()
        self.connections: dict[int, int] = dict.fromkeys(targets, 0)
        self.port: int = asyncio.run_coroutine_threadsafe(self._start(), loop).result(30)

    async def _start(self) -> int:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        self._probes = [asyncio.ensure_future(self._probe(target)) for target in self._targets]
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def close(self) -> None:
        """End the probes and refuse new connections."""
        for probe in self._probes:
            probe.cancel()
        self._server.close()
        await self._session.close()

    async def _probe(self, target: int) -> None:
        while True:
            try:
                async with self._session.get(f"http://127.0.0.1:{target}/readyz") as response:
                    is_ready = response.status == 200
            except (aiohttp.ClientError, TimeoutError):
                is_ready = False
            (self.ready.add if is_ready else self.ready.discard)(target)
            await asyncio.sleep(_PROBE_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for target in sorted(self.ready, key=lambda each: self.connections[each]):
            try:
                there_reader, there_writer = await asyncio.open_connection("127.0.0.1", target)
            except OSError:
                continue
            self.connections[target] += 1
            await asyncio.gather(self._forward(reader, there_writer), self._forward(there_reader, writer))
            return
        writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy until the end of the data, and then end the other side after everything has been sent."""
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                writer.write(data)
                await writer.drain()
        writer.close()


@contextmanager
def load_balancer(targets: Sequence[int]) -> Iterator[LoadBalancer]:
    """A load balancer for services on ports of the loopback address."""
    with _loop_in_thread() as loop:
        balancer = LoadBalancer(loop, targets)
        try:
            yield balancer
        finally:
            asyncio.run_coroutine_threadsafe(balancer.close(), loop).result(30)
