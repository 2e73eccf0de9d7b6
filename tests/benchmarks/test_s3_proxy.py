"""The proxy that disturbs requests to an S3 server, in front of a small HTTP server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from benchmarks.components.proxies import S3Proxy, s3_proxy

BODY = b"0123456789" * 10


class Server(ThreadingHTTPServer):
    """Keeps the bodies that it was sent, and answers GET with one of 100 bytes."""

    uploads: list[tuple[int, bytes]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.uploads.append((length, self.rfile.read(length)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.uploads = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def outcomes(proxy: S3Proxy, method: str, number: int) -> list[object]:
    """The statuses of requests, and "cut" for those that got no whole answer."""
    made: list[object] = []
    with httpx.Client(trust_env=False, timeout=60) as client:
        for _ in range(number):
            try:
                url = f"http://127.0.0.1:{proxy.port}/bucket/x"
                answer = client.request(method, url, content=BODY if method == "PUT" else None)
            except (httpx.RemoteProtocolError, httpx.ReadError):
                made.append("cut")
            else:
                assert answer.status_code != 200 or answer.content == (BODY if method == "GET" else b"")
                made.append(answer.status_code)
    return made


def test_only_faults_that_were_made_are_counted(server: Server) -> None:
    with s3_proxy(f"http://127.0.0.1:{server.server_port}", seed=1) as proxy:
        proxy.stall_seconds = 0.0
        assert outcomes(proxy, "PUT", 1) == outcomes(proxy, "GET", 1) == [200]
        assert not any(proxy.counts.values())
        assert server.uploads.pop() == (100, BODY)
        proxy.share = 1.0
        sent = outcomes(proxy, "PUT", 30)
        counts = dict(proxy.counts)
        assert counts["half answer"] == 0 and min(counts["500"], counts["503"], counts["half upload"]) > 0
        assert (sent.count(500), sent.count(503)) == (counts["500"], counts["503"])
        assert sent.count("cut") == counts["time-out"] + counts["half upload"] == 30 - counts["500"] - counts["503"]
        got = outcomes(proxy, "GET", 30)
        made = {fault: number - counts[fault] for fault, number in proxy.counts.items()}
        assert made["half upload"] == 0 and made["half answer"] > 0
        assert got.count("cut") == made["time-out"] + made["half answer"] and 200 not in got
    # The server got the length of the whole body, half of the body, and the end of the connection.
    deadline = time.monotonic() + 60
    while len(server.uploads) < counts["half upload"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.uploads == [(100, BODY[:50])] * counts["half upload"]
