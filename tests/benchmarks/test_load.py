"""The load of many clients counts broken answers and operations that do not end as errors, at a small server."""

from __future__ import annotations

import json
import socket
import socketserver
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HALF = b"\x89PNG half"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n"
ANSWERS = {
    "/whole": LENGTH % (len(HALF), HALF),
    "/whole-chunks": CHUNKS % (len(HALF), HALF) + b"0\r\n\r\n",
    "/length": LENGTH % (100, HALF),
    "/chunks": CHUNKS % (len(HALF), HALF),
    "/reset": LENGTH % (100, HALF),
    "/endless": CHUNKS % (len(HALF), HALF),
    "/list": LENGTH % (2, b"[]"),
}


class Handler(socketserver.StreamRequestHandler):
    """Sends the prepared answer of a path, and then closes the connection, some with a reset, one not for long."""

    def handle(self) -> None:
        """Answer one request."""
        path = self.rfile.readline().split()[1].decode()
        while self.rfile.readline().strip():
            pass
        self.wfile.write(ANSWERS[path])
        if path == "/reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if path == "/endless":
            with suppress(OSError):
                self.connection.settimeout(60)
                self.rfile.read(1)  # until the client ends


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    if find_spec("locust") is None:
        pytest.skip("locust (the extra `soak`) is not installed")
    socketserver.ThreadingTCPServer.daemon_threads = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


# In a process of its own: locust replaces parts of Python.
PREPARATION = """
import json, sys
from types import SimpleNamespace
import benchmarks.load as load
from locust.env import Environment

load.inputs = load.Inputs(sys.argv[1], ["key"], seed=1)
load.Caller.host = sys.argv[1]
caller = load.Caller(Environment())
caller.key = "key"
rows = []
load.recorder = SimpleNamespace(add=lambda *row: rows.append(row))
"""


def rows_of(url: str, program: str) -> list[list[object]]:
    """What a program records."""
    command = [sys.executable, "-W", "ignore", "-c", f"{PREPARATION}{program}\nprint(json.dumps(rows))"]
    done = subprocess.run([*command, url], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    rows: list[list[object]] = json.loads(done.stdout.splitlines()[-1])
    return rows


ASKING = """
for path in ("/whole", "/whole-chunks", "/length", "/chunks", "/reset"):
    caller.completed = True
    content = caller.ask(f"GET {path}", check=lambda data: data[:4] == b"\\x89PNG")
    rows[-1] += (content is None, caller.completed)
"""


def test_an_answer_that_was_cut_is_an_error(url: str) -> None:
    rows = rows_of(url, ASKING)
    assert [row[2] for row in rows] == [200] * 5
    assert [row[4] for row in rows[:2]] == ["", ""]
    assert all(str(row[4]).startswith("the content was cut: ") for row in rows[2:])
    assert [row[6:] for row in rows] == [[False, True]] * 2 + [[True, False]] * 3


OPERATIONS = """
caller.run_one("image", lambda caller: caller.ask("GET /list", check=lambda data: json.loads(data)["data"] == 1))
caller.run_one("dataset", lambda caller: json.loads(caller.ask("GET /list"))["links"])

def answer(route, *_, **__):
    caller.route = route
    return json.dumps({"id": "1", "state": "failed", "error": "why"}).encode()

caller.ask, load.gevent.sleep = answer, lambda _: None
load.inputs.photographs.append(b"")
caller.run_one("projection", load.projection)
"""


def test_an_exception_is_an_error_and_the_operation_is_not_completed(url: str) -> None:
    rows = rows_of(url, OPERATIONS)
    calls = [row for row in rows if row[0] != "operation"]
    assert [(row[1], row[2]) for row in calls] == [
        ("GET /list", 200),  # its check raised
        ("GET /list", 200),
        ("GET /list", 0),  # the operation raised after it
        ("GET /v1/projections/ID", 0),
    ]
    assert "TypeError" in str(calls[0][4]) and not calls[1][4] and "TypeError" in str(calls[2][4])
    assert str(calls[3][4]).endswith("the projection has failed: why")
    operations = [(row[1], row[4]) for row in rows if row[0] == "operation"]
    assert operations == [("image", False), ("dataset", False), ("projection", False)]


ENDLESS = """
load._STOP_SECONDS = 1
load.PreparingCaller.prepare = lambda _: None
load.OPERATIONS = {name: (weight, lambda _: None) for name, (weight, _) in load.OPERATIONS.items()}
load.projection = lambda _: None
load.dataset = lambda caller: caller.ask("GET /endless")
load.run(0.1, 1.0)
"""


def test_an_operation_that_does_not_end_is_an_error(url: str) -> None:
    rows = rows_of(url, ENDLESS)
    (error,) = [row for row in rows if row[0] not in ("began", "ended", "operation")]
    assert error[1] == "GET /endless" and error[4] == "the operation 'dataset' did not end within 1 s after the load"
    (began,) = [row[1] for row in rows if row[0] == "began"]
    first, *_ = [row for row in rows if row[0] == "operation" and row[1] == "dataset"]
    assert (
        first[4] is False and isinstance(began, float) and isinstance(error[0], float) and isinstance(error[3], float)
    )
    assert began <= error[0] - error[3] / 1000 < began + 1, "it counts where it began"
