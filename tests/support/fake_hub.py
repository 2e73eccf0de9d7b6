"""The part of the Hugging Face Hub's API that an upload uses, on loopback, for tests."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

LARGE = 1000  # bytes from which on a file is uploaded apart from the commit


@dataclass
class FakeHub:
    """A hub with its repositories.

    Attributes:
        token: The token that it accepts.
        created: Bodies of the requests that made repositories.
        files: Files of each repository by `datasets/ORG/NAME` or `models/ORG/NAME`.
        objects: Large files by SHA-256.
        tokens: Values of the header Authorization, by path.
    """

    token: str
    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    tokens: dict[str, str | None] = field(default_factory=dict)

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """Answer a POST request whose token is accepted."""
        if path == "/api/repos/create":
            made = json.loads(body)
            self.created.append(made)
            prefix = "datasets/" if made.get("type") == "dataset" else ""
            return 200, {"url": f"{self.url}/{prefix}{made['organization']}/{made['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self._action(each) for each in json.loads(body)["objects"]]}
        parts = path.split("/")  # "", api, datasets, ORG, NAME, preupload or commit, main
        if len(parts) == 7 and parts[5] == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if len(parts) == 7 and parts[5] == "commit":
            self._commit("/".join(parts[2:5]), [json.loads(line) for line in body.splitlines()])
            prefix = "datasets/" if parts[2] == "datasets" else ""
            address = f"{self.url}/{prefix}{parts[3]}/{parts[4]}/commit/{'0' * 40}"
            return 200, {"commitUrl": address, "commitOid": "0" * 40}
        return 404, {"error": "Repository not found"}

    def _action(self, entry: dict[str, Any]) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.url}/storage/{entry['oid']}"}}
        return {"oid": entry["oid"], "size": entry["size"], "actions": upload}

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        kept = self.files.setdefault(repository, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                kept[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                kept[value["path"]] = self.objects[value["oid"]]


@contextmanager
def running_hub(token: str) -> Iterator[FakeHub]:
    """Run a hub in a thread."""
    hub = FakeHub(token)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self._body()
            path = urlsplit(self.path).path
            hub.tokens[path] = self.headers.get("Authorization")
            if hub.tokens[path] != f"Bearer {hub.token}":
                self._send(401, {"error": f"Invalid token {self.headers.get('Authorization')}"})
                return
            self._send(*hub.answer(path, body))

        def do_GET(self) -> None:
            self._send(404, {"error": "Repository not found"})

        def do_PUT(self) -> None:
            body = self._body()
            oid = self.path.rpartition("/")[2]
            if hashlib.sha256(body).hexdigest() == oid:
                hub.objects[oid] = body
                self._send(200, {})
            else:
                self._send(400, {"error": "other content"})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _send(self, status: int, document: Any) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name of the base class
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
