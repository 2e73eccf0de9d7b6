"""A small HTTP server that follows the gateway's contract. Tests can make it fail in chosen ways."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import socket
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

STATES = ("succeeded", "failed", "cancelled")
MODEL = {"name": "demo", "digest": "d" * 64}


@dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD path" matches `match`."""

    match: str
    times: int = 1
    status: int | None = None  # answer this instead
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    media_type: str = "application/problem+json"
    cut: int | None = None  # send this number of bytes of the body, then close the connection
    after: bool = False  # process the request, then close the connection without a response
    flip: bool = False  # change the body's first byte
    whole: bool = False  # ignore Range
    silent: float = 0.0  # wait before answering
    endless: bytes = b""  # repeat this as the body until the client disconnects


USAGE = {
    "object": "usage", "tenant": "a", "retention_days": 30.0, "quotas": [
        {"name": "images_per_day", "unit": "images", "limit": 1000.0, "used": 12.0, "remaining": 988.0,
         "window_seconds": 86400, "resets_at": "2026-11-30T00:00:00Z"},
        {"name": "stored_bytes", "unit": "bytes", "limit": None, "used": 123456.0, "remaining": None,
         "window_seconds": None, "resets_at": None},
    ],
}  # fmt: skip


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value % 256, value * 7 % 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def dataset_files(request: dict[str, Any]) -> dict[str, bytes]:
    """The files of a finished dataset, as small as possible; the zip is padded so that a download can be interrupted."""
    buffer = io.BytesIO()
    index = 0
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, count in request["classes"].items():
            for _ in range(count):
                archive.writestr(f"images/{name}/SYN_{index:08d}.png", png(index + request["seed"]))
                index += 1
        table = "".join(f"{name}\n" for name in ("isic_id", *(f"SYN_{i:08d}" for i in range(index))))
        archive.writestr("metadata.csv", table)
        archive.writestr("README.md", bytes(300_000))
    files = {
        "images.zip": buffer.getvalue(),
        "metadata.csv": table.encode(),
        "preview.png": png(1),
        "README.md": b"# card\n",
    }
    listed = [{"name": name, "bytes": len(data), "sha256": sha256(data)} for name, data in files.items()]
    manifest = {"format_version": 1, "request": request, "files": listed}
    return {**files, "manifest.json": json.dumps(manifest).encode()}


def report_of(request: dict[str, Any]) -> dict[str, Any]:
    """A report in which the share of every class is measured, and nothing else."""
    classes = request["classes"]
    missing = {"value": None, "class_name": None, "low": None, "high": None, "reference": None, "unit": "share"}
    empty: dict[str, Any] = {"images": None, "notes": []}
    unknown = {
        **empty,
        "status": "not measured",
        "numbers": [{**missing, "name": "coverage"}],
        "reason": "r",
        "remedy": "m",
    }
    shares = [
        {**missing, "name": "share", "class_name": name, "value": count / sum(classes.values())}
        for name, count in classes.items()
    ]
    known = {**empty, "status": "measured", "numbers": shares, "reason": None, "remedy": None}
    row = {"question": "Is it all there?", "notes": [], "status": "measured", "numbers": shares}
    return {
        "format_version": 1,
        "request": {"text": "3 images", "options": request},
        "origin": {
            "bundle": "demo",
            "digest": "d" * 64,
            "licence": "CC0-1.0",
            "attribution": "nobody",
            "training_images": None,
            "resolution": 128,
        },
        "images": sum(classes.values()),
        "requested": sum(classes.values()),
        "sample": sum(classes.values()),
        "scorecard": [
            {**row, "id": "completeness"},
            {**row, "id": "coverage", "status": "not measured", "numbers": unknown["numbers"]},
        ],
        "classes": known,
        **dict.fromkeys(("fidelity", "variety", "utility", "privacy", "artefacts", "skin_tone"), unknown),
        "audit": {"verdict": "not measured", "rules": [], "remedy": "audit it"},
        "limits": ["Not for diagnosis."],
    }


class FakeGateway:
    """with FakeGateway() as gateway: ... gateway.url; every dataset finishes after `ticks` requests."""

    def __init__(self) -> None:
        self.ticks = 3
        self.tick_seconds = 0.005
        self.outcome = "succeeded"
        self.faults: list[Fault] = []
        self.log: list[tuple[str, dict[str, str]]] = []  # ("GET /v1/...", headers)
        self.datasets: dict[str, dict[str, Any]] = {}  # newest last
        self.files: dict[str, dict[str, bytes]] = {}
        self.listed: dict[str, dict[str, Any]] = {}  # name -> fields that the list of files has instead
        self.keys: dict[str, tuple[str, str]] = {}
        self.uploads: list[list[str]] = []  # headers of the parts of each call
        self.most_files = 32
        self.endless_bytes = 0  # sent by faults that are endless
        self.change: Callable[[Any], Any] = lambda answer: answer  # called with every JSON response before it is sent
        self.heat_maps = True  # an older service makes no heat maps
        self.classifier = "c" * 64
        self.lock = threading.RLock()
        self.port = 0
        self._sockets: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeGateway:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        gateway = self

        class Bound(Handler):
            fake = gateway

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Bound)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop as a killed process does: open connections are cut."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self._sockets:
            cut(connection)
        self._sockets.clear()

    def requests(self, match: str) -> list[dict[str, str]]:
        """The headers of every request so far whose "METHOD path" matches."""
        return [headers for line, headers in self.log if re.search(match, line)]

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        identifier = f"ds_{len(self.datasets):032x}"
        total = sum(request["classes"].values())
        defaults = {"model": "demo", "seed": 0, "format": "imagefolder", "image_format": "png"}
        self.datasets[identifier] = {
            "id": identifier,
            "object": "dataset",
            "state": "queued",
            "request": defaults | request,
            "model": MODEL,
            "progress": {
                "samples_done": 0,
                "samples_total": total,
                "shards_done": 0,
                "shards_total": 1,
                "images_per_second": None,
                "eta_seconds": None,
            },
            "created_at": f"2026-01-01T00:00:{len(self.datasets) % 60:02d}Z",
            "started_at": None,
            "finished_at": None,
            "error": None,
            "links": {"self": f"/v1/datasets/{identifier}"},
        }
        return self.datasets[identifier]

    def tick(self, dataset: dict[str, Any]) -> None:
        """Advance a dataset by one step."""
        with self.lock:
            progress = dataset["progress"]
            if dataset["state"] in STATES:
                return
            if dataset["state"] == "cancelling":
                dataset["state"] = "cancelled"
                return
            dataset["state"] = "running"
            step = -(-progress["samples_total"] // self.ticks)
            progress["samples_done"] = min(progress["samples_total"], progress["samples_done"] + step)
            if progress["samples_done"] == progress["samples_total"]:
                self.finish(dataset)

    def finish(self, dataset: dict[str, Any]) -> None:
        dataset["state"] = self.outcome
        dataset["finished_at"] = "2026-01-01T01:00:00Z"
        if self.outcome == "failed":
            dataset["error"] = problem(507, "storage-full", "The disk is full; free some space and try again.")
        if self.outcome == "succeeded":
            self.files[dataset["id"]] = dataset_files(dataset["request"])

    def finished(self, **classes: int) -> str:
        """The id of a dataset that is ready to be downloaded."""
        dataset = self.create({"classes": classes or {"malignant": 2, "benign": 2}, "seed": 7})
        self.finish(dataset)
        return str(dataset["id"])


def problem(status: int, kind: str, detail: str, **more: Any) -> dict[str, Any]:
    return {"type": f"urn:dermis:problem:{kind}", "title": kind, "status": status, "detail": detail, **more}


def cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass


class Handler(BaseHTTPRequestHandler):
    fake: FakeGateway
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.fake._sockets.append(self.connection)

    def log_message(self, *_: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # cut while writing
            self.close_connection = True

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        line = f"{method} {parts.path}"
        with self.fake.lock:
            self.fake.log.append((line, {name.lower(): value for name, value in self.headers.items()}))
            self.fault = next((f for f in self.fake.faults if f.times > 0 and re.search(f.match, line)), Fault(""))
            self.fault.times -= 1
        time.sleep(self.fault.silent)
        if self.fault.endless:
            self._endless()
            return
        if self.fault.status is not None:
            default = json.dumps(problem(self.fault.status, "made-up", "It went wrong.")).encode()
            data = default if self.fault.body is None else self.fault.body
            self._answer(self.fault.status, data, self.fault.media_type, self.fault.headers)
            return
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        segments = parts.path.strip("/").split("/")
        with self.fake.lock:
            route = self._route(method, segments, query, body)
        if route is not None:
            self._events(route)

    def _endless(self) -> None:
        self.send_response(self.fault.status or 200)
        self.send_header("Content-Type", self.fault.media_type)
        self.send_header("Connection", "close")
        for name, value in self.fault.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        while True:
            self.wfile.write(self.fault.endless)
            self.fake.endless_bytes += len(self.fault.endless)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        value = self.fake.change(value)
        media_type = "application/json" if status < 400 else "application/problem+json"
        self._answer(status, json.dumps(value).encode(), media_type, headers or {})

    def _answer(self, status: int, data: bytes, media_type: str, headers: dict[str, str]) -> None:
        fault = self.fault
        if fault.after:
            cut(self.connection)
            return
        if fault.flip and data:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("X-Request-Id", "req-1")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data if fault.cut is None else data[: fault.cut])
        if fault.cut is not None:
            self.wfile.flush()
            time.sleep(0.01)
            cut(self.connection)

    def _route(self, method: str, segments: list[str], query: dict[str, str], body: bytes) -> dict[str, Any] | None:
        """Send a response; for an event stream return its dataset instead, to be sent without the lock."""
        match (method, segments):
            case ("GET", ["v1", "models"]):
                self._json(200, {"object": "list", "data": [self._model()]})
            case ("GET", ["v1", "models", "demo"]):
                self._json(200, self._model() | {"card": "# demo\n"})
            case ("GET", ["v1", "usage"]):
                self._json(200, USAGE)
            case ("POST", ["v1", "images"]):
                self._images(json.loads(body))
            case ("POST", ["v1", "classifications"]):
                self._classify(query, body)
            case ("POST", ["v1", "datasets"]):
                self._create(body)
            case ("GET", ["v1", "datasets"]):
                self._list(query)
            case (_, ["v1", "datasets", identifier, *rest]) if identifier in self.fake.datasets:
                return self._dataset(method, self.fake.datasets[identifier], rest)
            case _:
                self._json(404, problem(404, "not-found", f"There is nothing at {self.path}."))
        return None

    def _model(self) -> dict[str, Any]:
        return {
            "object": "model", **MODEL, "default": True, "resolution": 8, "classes": ["benign", "malignant"],
            "z_dim": 4, "w_dim": 4, "num_ws": 2, "licence": "CC-BY-NC-4.0", "attribution": "ISIC", "kimg": 1.5,
            "metrics": {"fid@lite0": 12.0}, "invented_later": {"x": 1},
        }  # fmt: skip

    def _images(self, request: dict[str, Any]) -> None:
        data, index = [], request.get("start_index", 0)
        for name, count in request["classes"].items():
            for _ in range(count):
                content = png(index + request["seed"])
                item = {"class": name, "seed": request["seed"], "index": index, "media_type": "image/png"}
                data.append(item | {"sha256": sha256(content), "b64": base64.b64encode(content).decode()})
                index += 1
        self._json(200, {"object": "list", "model": MODEL, "data": data})

    def _classify(self, query: dict[str, str], body: bytes) -> None:
        """The probability of an image is its first byte over 255; a first byte of 0 makes it no image."""
        boundary = re.search("boundary=(.*)", self.headers["Content-Type"])
        assert boundary
        parts = [part.split(b"\r\n\r\n", 1) for part in body.split(b"--" + boundary[1].encode())[1:-1]]
        self.fake.uploads.append([head.decode() for head, _ in parts])
        contents = [content.removesuffix(b"\r\n") for _, content in parts]
        if len(contents) > self.fake.most_files:
            self._json(422, problem(422, "request-too-large", f"files: at most {self.fake.most_files} in one call."))
            return
        for kind, status, bad in (("image-too-large", 413, b"\1"), ("unsupported-media-type", 415, b"\0")):
            errors = [
                {"field": f"files[{i}]", "message": "is no image"}
                for i, content in enumerate(contents)
                if content.startswith(bad)
            ]
            if errors:
                self._json(status, problem(status, kind, f"{errors[0]['field']}: is no image", errors=errors))
                return
        threshold_name = query.get("threshold", "default")
        names = {"default": 0.5, "sensitivity_90": 0.25}
        value = names[threshold_name] if threshold_name in names else float(threshold_name)
        data: list[dict[str, Any]] = [
            {
                "index": i,
                "probability": content[0] / 255,
                "calibrated": content[0] / 255,
                "class": "malignant" if content[0] / 255 >= value else "benign",
            }
            for i, content in enumerate(contents)
        ]
        if "heat_map" in query and self.fake.heat_maps:
            for item, content in zip(data, contents, strict=True):
                picture = png(content[0])
                item["heat_map"] = {
                    "method": query["heat_map"], "scale": 0.5, "media_type": "image/png",
                    "sha256": sha256(picture), "b64": base64.b64encode(picture).decode(),
                }  # fmt: skip
        threshold = {"name": threshold_name if threshold_name in names else None, "value": value}
        answer = {"object": "list", "model": MODEL | {"classifier": self.fake.classifier}, "data": data}
        self._json(
            200, answer | {"positive_class": "malignant", "threshold": threshold, "notice": "Not a medical device."}
        )

    def _create(self, body: bytes) -> None:
        request = json.loads(body)
        for name, count in request["classes"].items():
            if name not in ("benign", "malignant") or count < 1:
                errors = [{"field": f"classes.{name}", "message": "unknown class; this model has benign, malignant"}]
                self._json(422, problem(422, "unknown-class", "The request cannot be served.", errors=errors))
                return
        key = self.headers.get("Idempotency-Key")
        before = self.fake.keys.get(key or "")
        if before and before[0] != body.decode():
            self._json(409, problem(409, "idempotency-conflict", "This key came with another request; use a new one."))
            return
        dataset = self.fake.datasets[before[1]] if before else self.fake.create(request)
        if key:
            self.fake.keys[key] = (body.decode(), dataset["id"])
        self._json(202, dataset, {"Location": f"/v1/datasets/{dataset['id']}"})

    def _list(self, query: dict[str, str]) -> None:
        matching = [d for d in reversed(self.fake.datasets.values()) if query.get("state") in (None, d["state"])]
        start, limit = int(query.get("cursor", 0)), int(query.get("limit", 20))
        assert 1 <= limit <= 100
        following = str(start + limit) if start + limit < len(matching) else None
        self._json(200, {"object": "list", "data": matching[start : start + limit], "next_cursor": following})

    def _dataset(self, method: str, dataset: dict[str, Any], rest: list[str]) -> dict[str, Any] | None:
        identifier = dataset["id"]
        match (method, rest):
            case ("GET", []):
                self._json(200, dataset)
                self.fake.tick(dataset)
            case ("DELETE", []):
                if dataset["state"] in STATES:
                    del self.fake.datasets[identifier]
                    self.fake.files.pop(identifier, None)
                    self._answer(204, b"", "application/json", {})
                else:
                    dataset["state"] = "cancelling"
                    self._json(202, dataset)
            case ("GET", ["events"]):
                return dataset
            case ("GET", ["files" | "report", *_]) if dataset["state"] != "succeeded":
                detail = f"The dataset is {dataset['state']}; wait until it has succeeded."
                self._json(409, problem(409, "dataset-not-ready", detail))
            case ("GET", ["files"]):
                listed = [
                    {"name": name, "bytes": len(data), "sha256": sha256(data), "media_type": "application/zip"}
                    | {"url": f"/v1/datasets/{identifier}/files/{name}"}
                    | self.fake.listed.get(name, {})
                    for name, data in self.fake.files[identifier].items()
                ]
                self._json(200, {"object": "list", "data": listed})
            case ("GET", ["report"]):
                self._json(200, report_of(dataset["request"]))
            case ("GET", ["files", name]) if name in self.fake.files[identifier]:
                self._file(self.fake.files[identifier][name])
            case _:
                self._json(404, problem(404, "not-found", "There is no such file."))
        return None

    def _file(self, data: bytes) -> None:
        etag = f'"{sha256(data)}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        byte_range = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not byte_range or self.fault.whole or self.headers.get("If-Range", etag) != etag:
            self._answer(200, data, "application/octet-stream", headers)
        elif int(byte_range[1]) >= len(data):
            self._answer(416, b"", "application/problem+json", {"Content-Range": f"bytes */{len(data)}"})
        else:
            start = int(byte_range[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._answer(206, data[start:], "application/octet-stream", headers)

    def _events(self, dataset: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.wfile.write(b": hello\n\n")
        sent = 0
        while True:
            with self.fake.lock:
                self.fake.tick(dataset)
                name = dataset["state"] if dataset["state"] in STATES else "progress"
                block = f"event: {name}\ndata: {json.dumps(dataset)}\n\n".encode()
            self.wfile.write(block)
            sent += len(block)
            if name != "progress":
                return
            if self.fault.cut is not None and sent >= self.fault.cut:
                cut(self.connection)
                return
            time.sleep(self.fake.tick_seconds)
            self.wfile.write(b": heartbeat\n\n")
