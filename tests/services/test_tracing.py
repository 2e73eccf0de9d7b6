"""Tests of traces: the spans of a request and its job, what they contain, and their export."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Message, Receive, Scope, Send

from benchmarks.components import free_port
from dermis.errors import DermisError
from launched_service import Launched, launching
from otlp_receiver import receiving
from service_kit import service, wait_for
from services import tracing
from services.errors import InferenceUnreachableError
from services.inference.connection import Connection
from services.jobs import workflow
from tiny import make_bundle

TRACE, CALLER = "ab" * 16, "cd" * 8
PARENT = f"00-{TRACE}-{CALLER}-01"
OTLP = importlib.util.find_spec("opentelemetry.exporter") and importlib.util.find_spec("opentelemetry.exporter.otlp")
needs_otlp = pytest.mark.skipif(not OTLP, reason="the extra otel is not installed")


@pytest.fixture(autouse=True)
def patient_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_STOP_SECONDS", 60.0)


@contextlib.contextmanager
def recording() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    tracing.start("test", [exporter])
    try:
        yield exporter
    finally:
        tracing.stop()


def named(spans: tuple[ReadableSpan, ...], name: str) -> list[ReadableSpan]:
    return [span for span in spans if span.name == name]


def parent(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


def ids(span: ReadableSpan) -> tuple[str, str]:
    context = span.get_span_context()
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def test_request_job_shards_and_storage_are_one_trace(tmp_path: Path) -> None:
    make_bundle(tmp_path / "tiny")
    with recording() as exporter, service(tmp_path / "tiny", tmp_path / "data") as running:
        body = {"classes": {"benign": 6}, "shard_size": 3}
        dataset = running.ask(body, traceparent=PARENT, tracestate="vendor=1")
        assert running.wait(dataset)["state"] == "succeeded"
        running.client.get("/readyz", headers={"traceparent": PARENT})
        running.client.get(f"/v1/datasets/{dataset['id']}?secret=patient-7")
        job = running.ctx.table.get(dataset["id"])
        assert job is not None and str(job.trace_parent).startswith(f"00-{TRACE}-")
        wait_for(lambda: not workflow._running)  # the spans of its shards have ended
        tracing.stop()  # exports the rest
    spans = exporter.get_finished_spans()
    (request,) = named(spans, "POST /v1/datasets")
    (created,) = named(spans, "job create")
    shards, (finished,) = named(spans, "dataset shard"), named(spans, "dataset finish")
    writes = [span for span in spans if span.name == "storage write" and parent(span) in {ids(s)[1] for s in shards}]
    assert parent(request) == CALLER and parent(created) == ids(request)[1]
    assert [parent(span) for span in (*shards, finished)] == [ids(created)[1]] * 3
    assert len(writes) >= 2
    traced = [request, created, *shards, finished, *writes]
    assert {ids(span)[0] for span in traced} == {TRACE}
    assert sorted(int(str((span.attributes or {})["shard.number"])) for span in shards) == [0, 1]
    assert named(spans, "GET /readyz") == [] and len(named(spans, "GET /v1/datasets/{dataset_id}")) >= 1
    text = "".join(span.to_json() for span in spans)
    assert dataset["id"] not in text and "patient-7" not in text and str(tmp_path) not in text


def test_calls_of_inference_services_are_in_the_trace() -> None:
    received: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        received.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def nothing() -> Message:
        return {"type": "http.disconnect"}

    async def ignore(_message: Message) -> None:
        pass

    class Client:
        async def generate(self, name: str) -> str:
            if name == "fail":
                raise ConnectionResetError(f"/secret/{name}")
            carrier = tracing.carrier()
            headers = [] if carrier is None else [(b"traceparent", carrier.encode())]
            scope = {"type": "http", "path": "/generate", "headers": headers}
            await tracing.TraceCalls(app, "Generator")(scope, nothing, ignore)
            return name

    async def calls() -> None:
        connection = Connection(Client(), "the generator")
        await connection.call("generate", "outside")  # belongs to no trace
        with tracing.job_span("dataset shard", PARENT):
            await connection.call("generate", "inside")
            with pytest.raises(InferenceUnreachableError):
                await connection.call("generate", "fail")

    with recording() as exporter:
        asyncio.run(calls())
        tracing.stop()
        spans = exporter.get_finished_spans()
    server, client, failed, shard = spans
    assert [span.name for span in spans] == ["generator generate"] * 3 + ["dataset shard"]
    assert (parent(server), parent(client), parent(shard)) == (ids(client)[1], ids(shard)[1], CALLER)
    assert (server.kind.name, client.kind.name, shard.kind.name) == ("SERVER", "CLIENT", "CONSUMER")
    assert dict(failed.attributes or {}) == {"error.type": "ConnectionResetError"}
    assert "secret" not in failed.to_json() and failed.events == ()
    assert len(received) == 2


def test_nothing_is_created_while_traces_are_off() -> None:
    spans = [
        tracing.span("a", number=1),
        tracing.client_span("b"),
        tracing.job_span("c", PARENT),
        tracing.request_span({"type": "http", "headers": [(b"traceparent", PARENT.encode())]}, "GET"),
    ]
    assert len({id(span) for span in spans}) == 1 and tracing.carrier() is None
    with spans[0] as outer, spans[1] as inner:  # one object for all of them
        assert outer is None and inner is None


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/v1/traces"}, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_TRACES_EXPORTER": "none"}, []),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["otlp", "console"]),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "TRUE"}, []),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: 'zipkin' is not supported"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "use http/protobuf"),
    ],
)
def test_environment_turns_traces_on(environment: dict[str, str], names: list[str] | str) -> None:
    if isinstance(names, str):
        with pytest.raises(DermisError, match=names):
            tracing.exporter_names(environment)
    else:
        assert tracing.exporter_names(environment) == names


def test_exporter_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(DermisError, match=r"OTEL_TRACES_EXPORTER=otlp: .*dermis\[otel\]"):
        tracing.check_exporters()


@needs_otlp
def test_spans_arrive_at_an_otlp_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # no proxy sees what is for this machine
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        tracing.configure("gateway")
        with tracing.job_span("dataset shard", PARENT, job__id=f"ds_{'0' * 32}", shard__number=2):
            pass
        tracing.stop()
    (span,) = receiver.spans
    assert (span.name, span.process, span.trace_id, span.parent_id) == ("dataset shard", "gateway", TRACE, CALLER)
    assert span.attributes == {"job.id": "ds_000000...", "shard.number": 2}


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    yield from launching(tmp_path)


@needs_otlp
@pytest.mark.full
def test_service_exports_traces_and_logs_json_in_all_processes(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        bundle = make_bundle(tmp_path / "tiny")
        running: Launched = launch(str(bundle.location), free_port(), log_format="json", log_level="DEBUG")
        running.wait_until(running.ready)
        body = {"classes": {"benign": 6}, "shard_size": 3}
        answer = running.client.post("/v1/datasets", json=body, headers={"traceparent": PARENT})
        dataset = answer.json()
        running.wait_until(lambda: bool(running.progress(dataset)["state"] == "succeeded"))
        running.client.get(f"/v1/projections/pr_{'7' * 32}")
        running.process.terminate()
        assert running.process.wait(60) == 0
        wait_for(lambda: any(span.process == "generator" for span in receiver.spans))
    by_id = {span.span_id: span for span in receiver.spans}
    for span in (each for each in receiver.spans if each.process == "generator" and each.name.endswith(" generate")):
        call = by_id[span.parent_id]
        shard = by_id[call.parent_id]
        created = by_id[shard.parent_id]
        request = by_id[created.parent_id]
        assert [each.name for each in (call, shard, created, request)] == [
            "generator generate",
            "dataset shard",
            "job create",
            "POST /v1/datasets",
        ]
        assert (request.trace_id, request.parent_id) == (TRACE, CALLER)
    assert dataset["id"].encode() not in b"".join(receiver.bodies) and b"7" * 32 not in b"".join(receiver.bodies)
    lines = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert {"dermis.serve", "dermis.service", "dermis.generator", "dermis.http"} <= {line["logger"] for line in lines}
    assert any(line.get("trace_id") == TRACE for line in lines)
