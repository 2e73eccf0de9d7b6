"""Tests of flows and pure functions without a network, with a virtual clock."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from dermis_client import _downloads, _events, _files, _flow, _retry
from dermis_client._flow import Request
from dermis_client.errors import APIConnectionError, DownloadError, NotFoundError, ServerError
from dermis_client.models import DatasetFile
from dermis_client.resources import projections, studies, webhooks
from every_call import ANSWER
from hypothesis import given, settings
from hypothesis import strategies as st


class VirtualClockRunner:
    """Runs a flow with a virtual clock; `answer` is the network: it returns a response, or raises httpx's errors."""

    def __init__(self, answer: Callable[[Request], httpx.Response]) -> None:
        self.answer, self.time, self.pauses = answer, 0.0, list[float]()

    def run(self, flow: _flow.Flow[Any]) -> Any:
        outcome: Any = None
        failure: Exception | None = None
        while True:
            step = _flow.advance(flow, outcome, failure)
            outcome = failure = None
            try:
                match step:
                    case _flow.Return(value):
                        return value
                    case _flow.Send(request):
                        outcome = self.answer(request)
                    case _flow.Open(request):
                        response = self.answer(request)
                        outcome = _flow.Stream(response, iter(response.extensions.get("pieces", [])))
                    case _flow.Read(stream):
                        outcome = next(stream.pieces, b"")
                        if isinstance(outcome, Exception):
                            raise outcome
                    case _flow.Sleep(seconds):
                        self.pauses.append(seconds)
                        self.time += seconds
                    case _flow.Now():
                        outcome = self.time
                    case _flow.Compute(function):
                        outcome = function()
            except Exception as error:
                failure = error


REQUEST = httpx.Request("GET", "http://service/v1/x")


def respond(status: int, kind: str = "", **headers: str) -> httpx.Response:
    """A response; with a problem document, if it has a kind."""
    body = {"type": f"urn:dermis:problem:{kind}"} if kind else None
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, headers=named, json=body, request=REQUEST)


def test_retry_after_is_honoured_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [respond(503, retry_after="7"), respond(429, retry_after="3"), respond(200)]
    runner = VirtualClockRunner(lambda _: answers.pop(0))
    assert runner.run(_flow.call(Request("GET", "/v1/x"), 4)).status_code == 200
    assert runner.pauses == [7.0, 3.0]
    with pytest.raises(ServerError) as caught:  # one hour: the caller decides
        VirtualClockRunner(lambda _: respond(503, retry_after="3600")).run(_flow.call(Request("GET", "/v1/x"), 4))
    assert caught.value.retry_after == 3600


def test_waiting_for_a_projection_honours_retry_after() -> None:
    done = {"id": "pr_1", "state": "succeeded", "model": {"name": "m", "digest": "d"}}
    responses = [respond(503, retry_after="7"), httpx.Response(200, json=done, request=REQUEST)]
    runner = VirtualClockRunner(lambda _: responses.pop(0))
    options: dict[str, Any] = {"timeout": None, "poll_interval": 1.0, "patience": 300.0, "report": lambda record: None}
    assert runner.run(projections.wait_for_projection("pr_1", **options)).finished
    assert runner.pauses == [7.0]


@pytest.mark.parametrize(
    ("error", "idempotent", "tries"),
    [
        (httpx.ReadError("cut"), True, 4),
        (httpx.ReadError("cut"), False, 1),
        (httpx.ConnectError("refused"), False, 4),
        (httpx.UnsupportedProtocol("gopher"), True, 1),
    ],
)
def test_only_idempotent_requests_are_retried_after_broken_read(
    error: httpx.RequestError, idempotent: bool, tries: int
) -> None:
    sent = []

    def network(request: Request) -> httpx.Response:
        sent.append(request)
        raise error

    with pytest.raises(APIConnectionError):
        VirtualClockRunner(network).run(_flow.call(Request("POST", "/v1/x", idempotent=idempotent), 3))
    assert len(sent) == tries


@pytest.mark.parametrize(
    ("status", "kind", "executed"),
    [
        (408, "", False),
        (429, "", False),
        (500, "", True),
        (502, "", True),
        (503, "overloaded", False),
        (503, "not-ready", True),  # such as after a change whose audit entry was not stored
        (503, "", True),
        (504, "", True),
    ],
)
@pytest.mark.parametrize("idempotent", [True, False])
def test_request_that_may_have_been_executed_is_repeated_only_if_idempotent(
    status: int, kind: str, executed: bool, idempotent: bool
) -> None:
    answers = [respond(status, kind), respond(200)]
    request = Request("POST", "/v1/x", idempotent=idempotent)
    flow = _flow.call(request, 3)
    if idempotent or not executed:
        assert VirtualClockRunner(lambda _: answers.pop(0)).run(flow).status_code == 200
    else:
        with pytest.raises(ServerError):
            VirtualClockRunner(lambda _: answers.pop(0)).run(flow)
        assert len(answers) == 1


DELETIONS = [projections.delete_projection, studies.delete_study, webhooks.delete_webhook]


@pytest.mark.parametrize("delete", DELETIONS)
def test_deletion_whose_first_response_was_lost_is_complete(delete: Callable[[str, int], _flow.Flow[None]]) -> None:
    def network(*outcomes: httpx.Response | httpx.RequestError) -> VirtualClockRunner:
        waiting = list(outcomes)

        def answer(request: Request) -> httpx.Response:
            assert request.method == "DELETE"
            outcome = waiting.pop(0)
            if isinstance(outcome, httpx.RequestError):
                raise outcome
            return outcome

        return VirtualClockRunner(answer)

    lost, refused = httpx.ReadError("cut", request=REQUEST), httpx.ConnectError("refused", request=REQUEST)
    for first in (lost, respond(502), respond(503, "not-ready"), respond(504)):
        responses: list[httpx.Response] = []
        network(first, refused, respond(404)).run(_flow.recorded(delete("id_1", 3), responses))
        assert [each.status_code for each in responses] == [404]
    for others in ([], [refused], [respond(503, "overloaded")]):  # nothing was deleted
        with pytest.raises(NotFoundError):
            network(*others, respond(404)).run(delete("id_1", 3))


def test_all_answers_of_the_largest_study_are_read() -> None:
    for flow in (studies.list_answers("st_1", 0), studies.export_csv("st_1", Path("answers.csv"), 0)):
        step = next(flow)
        assert isinstance(step, _flow.Send)
        assert step.request.max_bytes > 400_000 * len(json.dumps(ANSWER))


@given(st.integers(0, 2000), st.floats(0, 1), st.none() | st.floats(0, 200))
def test_retry_pauses_are_bounded(attempt: int, jitter: float, retry_after: float | None) -> None:
    pause = _retry.delay(attempt, retry_after, jitter)
    if retry_after is not None and retry_after > _retry.MAX_RETRY_AFTER:
        assert pause is None
    else:
        assert pause is not None
        assert (retry_after or 0.0) <= pause <= max(_retry.MAX_DELAY, retry_after or 0.0)


def test_retry_after_is_parsed_as_seconds_or_date() -> None:
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert _retry.parse_retry_after("12") == 12.0
    assert _retry.parse_retry_after("Thu, 01 Jan 2026 12:00:30 GMT", now) == 30.0
    assert _retry.parse_retry_after("Thu, 01 Jan 2026 11:00:00 GMT", now) == 0.0
    assert [_retry.parse_retry_after(value) for value in (None, "", "soon", "-3", "²")] == [None] * 5


# Server-sent events

EVENTS = [("progress", "1"), ("progress", "zwei \u00e4\U0001f600\nlines"), ("message", " 3"), ("succeeded", "{}")]


@given(st.sampled_from(["\n", "\r\n", "\r"]), st.lists(st.integers(0, 300), max_size=12))
def test_decoded_events_do_not_depend_on_chunk_boundaries(end: str, cuts: list[int]) -> None:
    text = "\ufeff: hello" + end
    for event, data in EVENTS:
        text += f"event: {event}{end}" if event != "message" else ""
        text += "".join(f"data: {line}{end}" for line in data.split("\n")) + f"id: 1{end}{end}: beat{end}{end}"
    raw = text.encode() + f"event: unfinished{end}data: x".encode()
    marks = sorted({0, len(raw), *(min(c, len(raw)) for c in cuts)})
    decoder = _events.EventDecoder()
    got = [message for a, b in itertools.pairwise(marks) for message in decoder.feed(raw[a:b])]
    assert [(m.event, m.data) for m in got] == EVENTS


# Names


@given(st.text(max_size=30))
def test_a_safe_name_stays_in_its_folder(name: str) -> None:
    if _files.is_safe_name(name):
        assert Path("/folder", name).resolve().parent == Path("/folder").resolve()
        assert Path(name).name == name and not set(name) & set('/\\:*?"<>|\0 ') and name not in (".", "..")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", "x\0", ".bashrc", "CON", "nul.txt", "x.", "a" * 201],
)
def test_unsafe_file_names_are_recognised(name: str) -> None:
    assert not _files.is_safe_name(name)


def test_names_that_the_service_uses_are_safe() -> None:
    for name in ("images.zip", "data-00000-of-00004.tar", "manifest.json", "README.md", "metadata.csv", "preview.png"):
        assert _files.is_safe_name(name)


# Downloads under any sequence of cuts

CONTENT = bytes(range(256)) * 4
FILE = DatasetFile(name="x.bin", bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())


def download(folder: Path, network: Callable[[Request], httpx.Response]) -> VirtualClockRunner:
    runner = VirtualClockRunner(network)
    plan = _downloads.Plan("ds_1", folder, (FILE,), (FILE,), _downloads.Tally(lambda _: None))
    runner.run(_downloads.fetch(plan, FILE, 3))
    return runner


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["cut", "end", "busy", "whole"])), max_size=6),
    before=st.none() | st.integers(0, len(CONTENT)) | st.binary(max_size=1500),
)
def test_a_download_is_complete_or_raises(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]], before: int | bytes | None
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    if before is not None:
        (folder / "x.bin.part").write_bytes(CONTENT[:before] if isinstance(before, int) else before)
    faults = iter(steps)

    def network(request: Request) -> httpx.Response:
        size, fault = next(faults, (len(CONTENT), "none"))
        if fault == "busy":
            return respond(503)
        start = (
            int(request.headers["Range"].removeprefix("bytes=").removesuffix("-")) if "Range" in request.headers else 0
        )
        assert start == 0 or request.headers["If-Range"] == f'"{FILE.sha256}"'
        if fault == "whole":
            start = 0
        pieces: list[Any] = [CONTENT[start : start + size][i : i + 100] for i in range(0, size, 100)]
        pieces = [piece for piece in pieces if piece]
        if fault == "cut":
            pieces.append(httpx.ReadError("cut", request=REQUEST))
        response = respond(206, content_range=f"bytes {start}-1023/1024") if start else respond(200)
        response.extensions["pieces"] = pieces
        return response

    try:
        download(folder, network)
    except (DownloadError, ServerError):  # only after too many tries in a row without a byte
        assert not (folder / "x.bin").exists()
        assert (folder / "x.bin.part").exists()
    else:
        assert (folder / "x.bin").read_bytes() == CONTENT
        assert not (folder / "x.bin.part").exists()
