"""Tests with a broken or hostile service: bounded memory, errors of this package, no control characters on the terminal."""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import re
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from dermis_client import DermisClient, _response_body, _retry, cli, errors, extract_images, verify
from dermis_client._untrusted import MAX_LIST_BYTES, load_json, one_line, printable_json
from fake_gateway import FakeGateway, Fault, png

Call = Callable[[DermisClient, Path], Any]
MIB = 1 << 20
BLOCK = b"x" * 65_536
CALLS: dict[str, tuple[str, Call]] = {
    "models": ("GET /v1/models", lambda client, _: client.models.list()),
    "list": ("GET /v1/datasets", lambda client, _: list(client.datasets.list())),
    "create": ("POST /v1/datasets", lambda client, _: client.datasets.create({"benign": 1})),
    "images": ("POST /v1/images", lambda client, _: client.images.generate({"benign": 1})),
    "pixels": ("POST /v1/images", lambda client, _: client.images.generate_pixels({"benign": 1})),
    "files": ("GET .*/files$", lambda client, folder: client.datasets.download(newest(client), folder)),
    "file": ("GET .*/images.zip", lambda client, folder: client.datasets.download(newest(client), folder)),
    "events": ("GET .*/events", lambda client, _: list(client.datasets.events(newest(client)))),
    "classify": ("POST /v1/classifications", lambda client, _: client.classifications.create(b"\5")),
}


def newest(client: DermisClient) -> str:
    return next(iter(client.datasets.list())).id


# Endless responses


@pytest.mark.parametrize("name", CALLS)
def test_endless_response_is_refused_after_bounded_bytes(gateway: FakeGateway, tmp_path: Path, name: str) -> None:
    gateway.finished()
    match, call = CALLS[name]
    media_type = "text/event-stream" if name == "events" else "application/json"
    gateway.faults = [Fault(match, times=99, endless=BLOCK, media_type=media_type)]
    with DermisClient(gateway.url) as client, pytest.raises(errors.DermisError):
        call(client, tmp_path / "out")
    assert 0 < gateway.endless_bytes < 90 * MIB
    assert len(gateway.requests(match)) == 1  # and not requested again


def test_waiting_continues_after_endless_event_is_refused(gateway: FakeGateway) -> None:
    dataset = gateway.create({"classes": {"benign": 1}, "seed": 0})
    gateway.ticks = 2
    lines = b"data: " + b"x" * 1000 + b"\n"
    gateway.faults = [Fault("GET .*/events", endless=lines * 60, media_type="text/event-stream")]
    with DermisClient(gateway.url) as client:
        assert client.datasets.wait(dataset["id"], poll_interval=0.01).state == "succeeded"
    assert gateway.endless_bytes < 10 * MIB


@pytest.mark.parametrize("status", [400, 503])
def test_endless_error_body_is_reported_by_status(gateway: FakeGateway, status: int) -> None:
    gateway.faults = [Fault("GET /v1/models", times=99, endless=BLOCK, status=status)]
    with DermisClient(gateway.url, max_retries=0) as client, pytest.raises(errors.APIStatusError, match=str(status)):
        client.models.list()
    assert gateway.endless_bytes < 10 * MIB


def test_redirects_are_bounded_and_their_bodies_not_read(gateway: FakeGateway) -> None:
    there = {"Location": f"{gateway.url}/v1/models"}
    gateway.faults = [Fault("GET /v1/models", endless=BLOCK, status=302, headers=there)]
    with DermisClient(gateway.url, max_retries=0) as client:
        assert client.models.list()[0].name == "demo"
        assert gateway.endless_bytes < 10 * MIB
        gateway.faults = [Fault("GET /v1/models", times=99, status=307, body=b"", headers=there)]
        with pytest.raises(errors.APIConnectionError, match="redirects"):
            client.models.list()
        gateway.faults = [Fault("POST /v1/datasets", times=99, status=307, body=b"", headers=there)]
        with pytest.raises(errors.APIStatusError, match="give that as base_url"):
            client.datasets.create({"benign": 1})


@pytest.mark.parametrize(("encoding", "layers"), [("gzip", 1), ("gzip, gzip", 2), ("br", 1)])
def test_oversized_compressed_response_is_refused(gateway: FakeGateway, encoding: str, layers: int) -> None:
    body = b" " * (200 * MIB)
    for _ in range(layers):
        body = gzip.compress(body)
    gateway.faults = [Fault("GET /v1/models", times=99, status=200, body=body, headers={"Content-Encoding": encoding})]
    with DermisClient(gateway.url) as client, pytest.raises(errors.APIResponseError):
        client.models.list()


def test_compressed_response_of_usual_size_is_read(gateway: FakeGateway) -> None:
    with DermisClient(gateway.url) as client:
        plain = client.models.list()
        body = gzip.compress(json.dumps({"data": [model.model_dump(mode="json") for model in plain]}).encode())
        gateway.faults = [Fault("GET /v1/models", status=200, body=body, headers={"Content-Encoding": "gzip"})]
        assert client.models.list() == plain
        gateway.faults = [Fault("GET /v1/models", status=200, body=b"no gzip", headers={"Content-Encoding": "gzip"})]
        with pytest.raises(errors.APIResponseError, match="unpacked"):
            client.models.list()


def test_a_response_that_is_too_slow_is_refused(gateway: FakeGateway) -> None:
    seconds = iter(range(0, 100_000, 10))
    answer = httpx.Response(200, request=httpx.Request("GET", gateway.url))
    body = _response_body.Body(answer, MIB, timeout=60, clock=lambda: float(next(seconds)))
    with pytest.raises(httpx.ReadTimeout):
        for _ in range(10):
            body.feed(b" ")


def test_listing_with_endless_cursors_is_refused(gateway: FakeGateway) -> None:
    for _ in range(3):
        gateway.create({"classes": {"benign": 1}, "seed": 0})
    pages = iter(range(10**6))

    def circle(answer: Any) -> Any:
        return answer | {"next_cursor": str(next(pages) % 2)} if "next_cursor" in answer else answer

    def empty(answer: Any) -> Any:
        return answer | {"data": [], "next_cursor": str(next(pages))} if "next_cursor" in answer else answer

    for change in (circle, empty):
        gateway.change = change
        with DermisClient(gateway.url) as client, pytest.raises(errors.APIResponseError, match="does not end"):
            list(client.datasets.list())
    assert len(gateway.requests("GET /v1/datasets")) < 20


@pytest.mark.parametrize(
    "after", ["9" * 5000, "Thu, 01 Jan 9999 00:00:00 GMT", "Thu, 99 Foo 2026 00:00:00 +9999999", "-1"]
)
def test_extreme_retry_after_does_not_block_program(gateway: FakeGateway, after: str) -> None:
    gateway.faults = [Fault("/v1/models", times=99, status=503, headers={"Retry-After": after})]
    began = time.monotonic()
    with DermisClient(gateway.url) as client, pytest.raises(errors.ServerError) as caught:
        client.models.list()
    assert time.monotonic() - began < 30
    assert caught.value.retry_after is None or caught.value.retry_after <= _retry.MAX_SECONDS


# Responses that are not valid


@pytest.mark.parametrize(
    "text",
    ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "[" * 100 + "]" * 100, "[" * 10**6, '"\ud800', "1" * 5000],
)
def test_invalid_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        load_json(text)


BAD: list[Any] = [None, "\x1b[31m\u202e" * 300, -1, 10**30, float("nan"), True, [], {}, [[]]]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


COMMANDS: dict[str, list[str]] = {
    "models": ["models"],
    "list": ["datasets", "list"],
    "show": ["datasets", "show", "ID"],
    "wait": ["datasets", "wait", "ID", "--timeout", "0.2"],
    "create": ["datasets", "create", "--classes", "benign=1"],
    "cancel": ["datasets", "cancel", "ID"],
    "download": ["datasets", "download", "ID", "--out", "OUT"],
    "images": ["images", "--classes", "benign=2", "--out", "OUT", "--grid", "OUT/grid.png"],
    "classify": ["classify", "FILE", "--heat-maps", "OUT"],
}


@pytest.mark.parametrize("every", [7, pytest.param(3, marks=pytest.mark.full)])
@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_value_in_response_is_reported_or_harmless(
    gateway: FakeGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    every: int,
) -> None:
    (tmp_path / "file").write_bytes(b"\5")
    words = {"ID": gateway.finished(benign=2), "OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "file")}
    arguments = [words.get(word, word.replace("OUT/", f"{words['OUT']}/")) for word in COMMANDS[name]]
    monkeypatch.setattr(httpx, "Client", partial(httpx.Client, verify=False))  # reading certificates takes 50 ms
    monkeypatch.setattr(sys, "argv", ["dermis-client", *arguments, "--base-url", gateway.url])
    answers: list[Any] = []

    def run(number: int = 0, place: tuple[Any, ...] = (), value: Any = None) -> None:
        """Run the command, with another value at one place of the answer of this number."""

        def change(answer: Any) -> Any:
            answers.append(copy.deepcopy(answer))
            return replaced(answer, place, value) if len(answers) == number else answer

        answers.clear()
        gateway.change = change
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        assert left.value.code in (0, None) or (left.value.code == 1 and re.search("(^|\n)error: [^\n]+\n$", err))
        assert all(c.isprintable() or c == "\n" for c in out + err)
        assert len(out + err) < 20_000

    run()
    good = list(answers)
    assert good
    turns = itertools.count()
    for number, answer in enumerate(good, 1):
        for place in places(answer):
            for value in BAD[next(turns) % every :: every]:  # some values at every place, all values in every command
                run(number, place, value)


# What is printed


def test_control_characters_in_foreign_text_are_escaped() -> None:
    assert one_line("a\tb\n\x1b[2J\u202eé \x9b1m") == r"a b \x1b[2J\u202eé \x9b1m"
    assert one_line("x" * 10**6, 50) == "x" * 47 + "..."
    value = {"a": "\x1b\x7f\x9b\u202e\U000e0001\ud800é\n"}
    text = printable_json(value)
    assert all(c.isprintable() or c == "\n" for c in text) and "é" in text
    assert json.loads(text) == value


def test_error_with_thousand_fields_has_short_message(gateway: FakeGateway) -> None:
    fields = [{"field": f"\x1b[3{i}m", "message": f"{i} " * 100} for i in range(1000)]
    body = json.dumps({"type": "urn:x:\x1b]0;t\x07", "detail": "\x1b[2J" * 200, "errors": fields}).encode()
    gateway.faults = [Fault("/v1/models", status=422, body=body)]
    with DermisClient(gateway.url) as client, pytest.raises(errors.UnprocessableEntityError) as caught:
        client.models.list()
    assert str(caught.value).isprintable() and len(str(caught.value)) < 4000
    assert r"\x1b[2J" in str(caught.value) and "and 990 more" in str(caught.value)


# What is written


def test_a_manifest_that_is_huge_is_not_fetched(gateway: FakeGateway, tmp_path: Path) -> None:
    identifier = gateway.finished()
    gateway.listed = {"manifest.json": {"bytes": 1 << 30}}
    with DermisClient(gateway.url) as client, pytest.raises(errors.IntegrityError, match="too large"):
        client.datasets.download(identifier, tmp_path)
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(MAX_LIST_BYTES + 1)
    with pytest.raises(errors.IntegrityError, match="MiB"):
        verify(tmp_path)


def test_an_archive_of_another_kind_of_compression_is_refused(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "images.zip", "w", method) as archive:
            archive.writestr("images/benign/a.png", png(1))
        with pytest.raises(errors.IntegrityError, match="not safe"):
            extract_images(tmp_path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images/benign/a.png", png(1))
    data = buffer.getvalue()
    (tmp_path / "images.zip").write_bytes(data.replace(b"PK\x01\x02\x14\x03\x14\x00", b"PK\x01\x02\x14\x03\xff\x00"))
    with pytest.raises(errors.IntegrityError):
        extract_images(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["images.zip"]


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(header: str, data: bytes) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data


def header(shape: str, dtype: str = "|u1", fortran_order: bool = False) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': {fortran_order}, 'shape': {shape}}}"


PIXELS = {
    "metadata.json": b'{"model": {"name": "m", "digest": "d"}, "data": [{"class": "benign", "seed": 0, "index": 0}]}',
    "images.xmp": b"<x/>",
    "images.npy": npy(header("(1, 2, 2, 3)"), bytes(range(12))),
}


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (npz(PIXELS)[:-30], errors.IntegrityError, "incomplete or damaged"),
        (npz(PIXELS).replace(bytes(range(12)), bytes(12)), errors.IntegrityError, "incomplete or damaged .*CRC"),
        (b"", errors.IntegrityError, "incomplete or damaged"),
        (npz(PIXELS, zipfile.ZIP_DEFLATED), errors.APIResponseError, "compressed"),
        (npz({**PIXELS, "metadata.json": b"{}"}), errors.APIResponseError, "model"),
        (npz({"metadata.json": PIXELS["metadata.json"]}), errors.APIResponseError, "has no images.xmp"),
        *(
            (npz({**PIXELS, "images.npy": array}), errors.APIResponseError, message)
            for array, message in [
                (b"", "NumPy's format"),
                (PIXELS["images.npy"][:-1], "11 bytes of pixels"),
                (PIXELS["images.npy"] + b"x", "13 bytes of pixels"),
                (npy(header("(2, 2, 1, 3)"), bytes(12)), "2 images, and 1 class"),
                (npy(header("(1, 2, 2, 3)", "|O"), bytes(12)), "uint8"),
                (npy(header("(1, 2, 2, 3)", "|u1", True), bytes(12)), "uint8"),
                (npy(header("(1, 2, 2, 3)") + "+1", bytes(12)), "uint8"),
                (npy("(" * 9000, bytes(12)), "uint8"),
                (npy(header("(1, 3, 4)"), bytes(12)), "not .images, height, width, 3."),
                (npy(header("(1, -2, -2, 3)"), bytes(12)), "not .images, height, width, 3."),
                (npy(header(f"(1, {10**9}, {10**9}, 3)"), bytes(12)), "images of"),
                (npy(header("'\x1b[2J' * 3"), bytes(12)), "uint8"),
            ]
        ),
    ],
)
def test_pixels_that_are_damaged_or_of_another_form_are_refused(
    gateway: FakeGateway, body: bytes, error: type[errors.DermisError], message: str
) -> None:
    with DermisClient(gateway.url) as client:
        answer = partial(Fault, "POST /v1/images", status=200, media_type="application/x-npz")
        gateway.faults = [answer(body=npz(PIXELS))]
        assert client.images.generate_pixels({"benign": 1}).content == bytes(range(12))
        gateway.faults = [answer(body=body)]
        with pytest.raises(error, match=message) as caught:
            client.images.generate_pixels({"benign": 1})
        assert str(caught.value).isprintable()


def test_image_with_huge_dimensions_is_not_decoded(gateway: FakeGateway) -> None:
    import base64
    import hashlib
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    broken = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    def change(answer: Any) -> Any:
        for item in answer["data"]:
            item |= {"b64": base64.b64encode(broken).decode(), "sha256": hashlib.sha256(broken).hexdigest()}
        return answer

    gateway.change = change
    with DermisClient(gateway.url) as client, pytest.raises(errors.IntegrityError, match="cannot be decoded"):
        client.images.generate({"benign": 1}).grid()
