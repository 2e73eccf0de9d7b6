"""Tests of the clients against a gateway that follows the HTTP contract, and against one that violates it."""

from __future__ import annotations

import ast
import asyncio
import graphlib
import inspect
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dermis_client
import httpx
import pytest
from dermis_client import (
    AsyncDermisClient,
    ConflictError,
    DatasetReport,
    DermisClient,
    InvalidRequestError,
    _retry,
    errors,
)
from dermis_client._cli_text import format_report
from dermis_client._flow import Flow, Request, open_stream, read
from dermis_client.resources import dataset_flows
from fake_gateway import FakeGateway, Fault

CLASSES = {"malignant": 2, "benign": 1}


def test_dataset_is_created_awaited_and_downloaded(gateway: FakeGateway, tmp_path: Any) -> None:
    seen: list[int] = []
    with DermisClient(gateway.url) as client:
        dataset = client.datasets.create(classes=CLASSES, seed=7, format="imagefolder")
        assert (dataset.state, dataset.request.seed, dataset.progress.samples_total) == ("queued", 7, 3)
        done = dataset.wait(progress=lambda record: seen.append(record.progress.samples_done))
        assert done.state == "succeeded"
        assert seen == sorted(seen) and seen[-1] == 3
        result = done.download(tmp_path, extract=True)
    assert sorted(path.name for path in result.files) == [
        "README.md", "images.zip", "manifest.json", "metadata.csv", "preview.png",
    ]  # fmt: skip
    assert result.bytes_received == sum(path.stat().st_size for path in result.files)
    assert len(list(tmp_path.glob("images/malignant/*.png"))) == 2
    assert dermis_client.verify(tmp_path)


def test_async_client_creates_downloads_and_deletes_dataset(gateway: FakeGateway, tmp_path: Any) -> None:
    async def scenario() -> None:
        async with AsyncDermisClient(gateway.url) as client:
            dataset = await client.datasets.create(classes=CLASSES, seed=7)
            events = [event async for event in dataset.events()]
            assert events[-1].event == "succeeded" and {event.event for event in events[:-1]} == {"progress"}
            done = await dataset.wait()
            result = await done.download(tmp_path, extract=True)
            assert len(result.files) == 5
            assert [record.id async for record in client.datasets.list()] == [dataset.id]
            assert [model.name for model in await client.models.list()] == ["demo"]
            assert (await client.models.default()).name == "demo"
            assert len(await client.images.generate({"benign": 2})) == 2
            await done.delete()
            with pytest.raises(errors.NotFoundError):
                await done.refresh()

    asyncio.run(scenario())
    assert dermis_client.verify(tmp_path)


_CLIENTS = (DermisClient("http://localhost"), AsyncDermisClient("http://localhost"))
TWINS = [
    (dermis_client.Dataset, dermis_client.AsyncDataset),
    (DermisClient, AsyncDermisClient),
    *((type(ours), type(getattr(_CLIENTS[1], name))) for name, ours in vars(_CLIENTS[0]).items() if name[0] != "_"),
]


@pytest.mark.parametrize(("sync", "twin"), TWINS, ids=lambda kind: kind.__name__)
def test_both_clients_have_the_same_methods_and_arguments(sync: type, twin: type) -> None:
    methods = {n for n, m in vars(sync).items() if inspect.isfunction(m) and not n.startswith("_")}
    assert methods == {n for n, m in vars(twin).items() if inspect.isfunction(m) and not n.startswith("_")}
    for method in methods | {"__init__"}:
        ours, theirs = (inspect.signature(getattr(owner, method)).parameters for owner in (sync, twin))
        assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}, method


def test_imports_are_acyclic_and_avoid_resources() -> None:
    root = Path(dermis_client.__file__).parent
    modules = {
        ".".join(("dermis_client", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in root.rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = set()
        for node in ast.parse(path.read_text()).body:  # imports of `if TYPE_CHECKING:` are nested, so not counted
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dermis_client"):
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
                targets |= submodules or {str(node.module)}
        imports[name] = targets
    resource_users = {name for name, targets in imports.items() if any(".resources" in target for target in targets)}
    assert {name for name in resource_users if ".resources" not in name} == {
        "dermis_client", "dermis_client._client", "dermis_client.cli",
    }  # fmt: skip
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError


def test_import_loads_no_heavy_packages() -> None:
    code = (
        "import sys, dermis_client; heavy = {'torch', 'numpy', 'pandas', 'dermis', 'services'};"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Retries and idempotency


def test_a_lost_answer_makes_no_second_dataset(gateway: FakeGateway) -> None:
    gateway.faults = [Fault("POST /v1/datasets", times=2, after=True)]
    with DermisClient(gateway.url) as client:
        dataset = client.datasets.create(CLASSES)
        assert list(gateway.datasets) == [dataset.id]
        keys = [headers["idempotency-key"] for headers in gateway.requests("POST /v1/datasets")]
        assert len(keys) == 3 and len(set(keys)) == 1
        client.datasets.create(CLASSES)
        assert len(gateway.datasets) == 2  # another call is another request


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_request_to_busy_service_is_retried(gateway: FakeGateway, status: int) -> None:
    gateway.faults = [Fault("GET /v1/models", times=2, status=status)]
    with DermisClient(gateway.url, max_retries=2) as client:
        assert client.models.list()[0].metrics == {"fid@lite0": 12.0}
    assert len(gateway.requests("/v1/models")) == 3


def test_error_of_tls_after_the_handshake_is_a_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asynchronous connections of httpx raise ssl.SSLError itself, of sending and of reading."""
    monkeypatch.setattr(_retry, "FIRST_DELAY", 0.0)
    outcomes: list[str] = []

    class Broken(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"["
            raise ssl.SSLError(1, "decryption failed or bad record mac")

    def answer(_: httpx.Request) -> httpx.Response:
        outcome = outcomes.pop(0)
        if outcome == "unsent":
            raise ssl.SSLError(1, "tlsv13 alert certificate required")
        return httpx.Response(200, stream=Broken()) if outcome == "cut" else httpx.Response(200, json={"data": []})

    def reading() -> Flow[bytes]:
        stream = yield from open_stream(Request("GET", "/v1/file"), 0)
        yield from read(stream)
        return (yield from read(stream))

    async def run() -> None:
        http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
        async with http, AsyncDermisClient("http://localhost:1", http_client=http) as client:
            outcomes[:] = ["unsent", "cut", "whole"]
            assert await client.models.list() == []
            outcomes[:] = ["unsent", "whole"]
            with pytest.raises(errors.APIConnectionError, match="broke"):
                await client.webhooks.create("https://receiver.example/")
            assert outcomes == ["whole"]  # not repeated: it may have been executed
            outcomes[:] = ["cut"]
            with pytest.raises(httpx.ReadError):
                await client._transport.run(reading())

    asyncio.run(run())


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (400, "malformed-json", errors.BadRequestError),
        (404, "not-found", errors.NotFoundError),
        (409, "idempotency-conflict", errors.ConflictError),
        (413, "too-large", errors.TooLargeError),
        (422, "request-too-large", errors.TooLargeError),
        (422, "invalid-request", errors.UnprocessableEntityError),
        (507, "storage-full", errors.ServerError),
        (418, "teapot", errors.APIStatusError),
    ],
)
def test_each_error_status_raises_its_class_without_retry(
    gateway: FakeGateway, status: int, kind: str, error: type[errors.APIStatusError]
) -> None:
    body = f'{{"type": "urn:dermis:problem:{kind}", "detail": "Two\\nlines \\u001b[31m.", "later": 1}}'.encode()
    gateway.faults = [Fault("GET /v1/models", times=9, status=status, body=body)]
    with DermisClient(gateway.url) as client, pytest.raises(errors.APIStatusError) as caught:
        client.models.list()
    assert type(caught.value) is error
    assert (caught.value.status_code, caught.value.kind, caught.value.request_id) == (status, kind, "req-1")
    assert str(caught.value) == f"Two lines \\x1b[31m. ({status} {kind}, request req-1)"
    assert len(gateway.requests("/v1/models")) == 1


def test_a_wrong_field_is_named(gateway: FakeGateway) -> None:
    with DermisClient(gateway.url) as client, pytest.raises(errors.UnprocessableEntityError) as caught:
        client.datasets.create({"melanoma": 3})
    assert [(e.field, e.message) for e in caught.value.errors] == [
        ("classes.melanoma", "unknown class; this model has benign, malignant")
    ]
    assert "classes.melanoma: unknown class; this model has benign, malignant" in str(caught.value)
    assert not gateway.datasets


def test_invalid_arguments_are_refused_before_sending(gateway: FakeGateway) -> None:
    with DermisClient(gateway.url) as client:
        for call in (
            lambda: client.datasets.create({}),
            lambda: client.datasets.create({"benign": 2.5}),  # type: ignore[dict-item]
            lambda: client.datasets.create({"benign": True}),
            lambda: client.datasets.create({"benign": 1}, seed="7"),  # type: ignore[arg-type]
            lambda: client.datasets.create({"benign": 1}, truncation_psi=float("nan")),
            lambda: client.datasets.retrieve(""),
            lambda: client.datasets.delete("../models"),
            lambda: client.models.retrieve(".."),
            lambda: DermisClient("localhost:3000"),
            lambda: DermisClient("http://h", api_key="a\nb"),
        ):
            with pytest.raises(errors.InvalidRequestError):
                call()
    assert not gateway.log


def test_other_or_stopped_service_raises_clear_error(gateway: FakeGateway) -> None:
    gateway.faults = [Fault("GET", times=9, status=200, body=b"<html>hello</html>", media_type="text/html")]
    with DermisClient(gateway.url) as client, pytest.raises(errors.APIResponseError, match="base_url"):
        client.models.list()
    gateway.stop()
    with DermisClient(gateway.url, max_retries=1) as client, pytest.raises(errors.APIConnectionError, match="running"):
        client.models.list()
    gateway.start()


def test_missing_response_raises_timeout_error(gateway: FakeGateway) -> None:
    gateway.faults = [Fault("GET /v1/models", silent=60.0)]
    with DermisClient(gateway.url, timeout=0.1, max_retries=0) as client, pytest.raises(errors.APITimeoutError):
        client.models.list()


def test_api_key_is_sent_only_to_service_as_bearer_token(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeGateway() as elsewhere:
        gateway.faults = [
            Fault("GET /v1/models/demo", status=307, headers={"Location": f"{elsewhere.url}/v1/models/demo"})
        ]
        monkeypatch.setenv("DERMIS_BASE_URL", gateway.url + "/")
        with DermisClient(api_key="secret") as client:
            assert client.models.retrieve("demo").card == "# demo\n"
            assert "secret" not in repr(client)
        assert gateway.requests("models/demo")[0]["authorization"] == "Bearer secret"
        assert "authorization" not in elsewhere.requests("models/demo")[0]


# Lists, images


def test_listing_fetches_pages_as_needed(gateway: FakeGateway) -> None:
    for _ in range(7):
        gateway.create({"classes": {"benign": 1}})
    newest = list(reversed(gateway.datasets))
    with DermisClient(gateway.url) as client:
        assert [dataset.id for dataset in client.datasets.list(page_size=3)] == newest
        assert len(gateway.requests("GET /v1/datasets")) == 3
        assert [dataset.id for dataset in client.datasets.list(limit=2)] == newest[:2]
        assert len(gateway.requests("GET /v1/datasets")) == 4
        assert list(client.datasets.list(state="failed")) == []


def test_report_is_typed_and_keeps_what_was_not_measured(gateway: FakeGateway) -> None:
    with DermisClient(gateway.url) as client:
        dataset = client.datasets.create({"malignant": 1, "benign": 3})
        with pytest.raises(ConflictError):
            dataset.report()
        report = dataset.wait(poll_interval=0.01).report()
        assert isinstance(report, DatasetReport) and report.origin.resolution == 128
        assert report.classes.number("share", "benign").value == 0.75
        assert report.variety.status == "not measured" and report.variety.number("coverage").value is None
        with pytest.raises(KeyError):
            report.variety.number("share")
        lines = list(format_report(report))
        assert "  share of benign: 0.75" in lines and "  coverage: not measured" in lines

    async def retrieve() -> DatasetReport:
        async with AsyncDermisClient(gateway.url) as client:
            return await client.datasets.report(dataset.id)

    assert asyncio.run(retrieve()) == report


def test_images_have_class_seed_and_index(gateway: FakeGateway, tmp_path: Any) -> None:
    with DermisClient(gateway.url) as client:
        result = client.images.generate({"malignant": 2, "benign": 3}, seed=1, start_index=10)
        assert [(image.class_name, image.index) for image in result] == [
            ("malignant", 10), ("malignant", 11), ("benign", 12), ("benign", 13), ("benign", 14),
        ]  # fmt: skip
        assert result.images[0].getpixel((0, 0)) == (11, 77, 90)
        assert result.grid(columns=2, gap=0).size == (16, 24)
        assert result.save(tmp_path)[0].name == "malignant_1_00000010.png"
        assert (tmp_path / "malignant_1_00000010.png").read_bytes() == result[0].content
        bad = b'{"model": {"name": "m", "digest": "d"}, "data": [{"class": "a", "seed": 1, "index": 0,'
        bad += b'"media_type": "image/png", "sha256": "' + b"0" * 64 + b'", "b64": "AAAA"}]}'
        gateway.faults = [Fault("POST /v1/images", status=200, body=bad)]
        with pytest.raises(errors.IntegrityError, match="SHA-256"):
            client.images.generate({"a": 1})


def test_pixels_are_decoded_from_image_files_of_an_earlier_service(gateway: FakeGateway) -> None:
    classes = {"malignant": 2, "benign": 1}
    with DermisClient(gateway.url) as client:
        pixels = client.images.generate_pixels(classes, seed=1, start_index=10, noise_mode="const")
        assert gateway.requests("POST /v1/images")[0]["accept"] == "application/x-npz, application/json;q=0.5"
        images = client.images.generate(classes, seed=1, start_index=10)
        assert [(item.class_name, item.seed, item.index) for item in pixels.data] == [
            ("malignant", 1, 10), ("malignant", 1, 11), ("benign", 1, 12),
        ]  # fmt: skip
        assert (pixels.model, pixels.width, pixels.height, len(pixels)) == (images.model, 8, 8, 3)
        assert pixels.content == b"".join(image.tobytes() for image in images.images)
        assert [pixels.image(i).tobytes() for i in range(3)] == [image.tobytes() for image in images.images]
        gateway.change = lambda answer: answer | {"data": []}
        with pytest.raises(errors.APIResponseError, match="images of one size"):
            client.images.generate_pixels({"benign": 1})


# Waiting


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET .*/events", times=99, status=404),
        Fault("GET .*/events", times=99, status=200, body=b"{}", media_type="application/json"),
        Fault("GET .*/events", times=99, status=200, body=b"data: no json\n\n", media_type="text/event-stream"),
        Fault("GET .*/events", times=99, cut=1),
    ],
    ids=["no route", "no stream", "nonsense", "cut at once"],
)
def test_waiting_polls_when_events_are_unusable(gateway: FakeGateway, fault: Fault) -> None:
    gateway.ticks, gateway.faults = 8, [fault]
    with DermisClient(gateway.url) as client:
        assert client.datasets.create(CLASSES).wait(poll_interval=0.01).state == "succeeded"


def test_waiting_continues_after_service_restart(gateway: FakeGateway) -> None:
    gateway.ticks, gateway.tick_seconds = 30, 60.0  # the first stream lasts until the restart

    def restart() -> None:
        deadline = time.monotonic() + 60
        while not gateway.requests(".*/events") and time.monotonic() < deadline:
            time.sleep(0.01)
        gateway.stop()
        gateway.tick_seconds = 0.005
        time.sleep(0.15)
        gateway.start()

    with DermisClient(gateway.url) as client:
        dataset = client.datasets.create({"benign": 30})
        seen: list[int] = []
        killer = threading.Thread(target=restart)
        killer.start()
        done = dataset.wait(progress=lambda record: seen.append(record.progress.samples_done), poll_interval=0.03)
        killer.join()
    assert done.state == "succeeded" and seen[-1] == 30
    assert len(gateway.requests(".*/events")) >= 2


def test_waiting_ends_at_the_timeout(gateway: FakeGateway) -> None:
    gateway.ticks = 10**6
    with DermisClient(gateway.url, max_retries=0) as client:
        dataset = client.datasets.create({"benign": 10**6})
        dataset.refresh()  # it runs after the first request
        with pytest.raises(errors.WaitTimeoutError, match="continues") as caught:
            dataset.wait(timeout=0.1, poll_interval=0.02)
        assert caught.value.dataset is not None and caught.value.dataset.state == "running"
        gateway.stop()
        with pytest.raises(errors.APIConnectionError):
            dataset.wait(patience=0.05, poll_interval=0.02)
        gateway.start()
        del gateway.datasets[dataset.id]
        with pytest.raises(errors.NotFoundError):
            dataset.wait()


def test_waiting_raises_for_failed_and_cancelled_datasets(gateway: FakeGateway) -> None:
    gateway.outcome = "failed"
    with DermisClient(gateway.url) as client:
        with pytest.raises(errors.DatasetFailed, match="disk is full") as caught:
            client.datasets.create(CLASSES).wait()
        assert caught.value.problem is not None and caught.value.problem.kind == "storage-full"
        gateway.outcome = "cancelled"
        with pytest.raises(errors.DatasetCancelled):
            client.datasets.create(CLASSES).wait()


def test_event_stream_reconnects_after_cut_and_closes_on_exit(gateway: FakeGateway) -> None:
    gateway.ticks, gateway.faults = 6, [Fault("GET .*/events", times=2, cut=1)]
    with DermisClient(gateway.url) as client:
        dataset = client.datasets.create({"benign": 6})
        names = [event.event for event in dataset.events()]
        assert names[-1] == "succeeded" and len(gateway.requests(".*/events")) == 3
        gateway.ticks = 10**6
        for event in client.datasets.create({"benign": 10**6}).events():
            assert event.dataset.state == "running"
            break


# Cancelling, deleting


def test_cancel_never_deletes_finished_dataset(gateway: FakeGateway) -> None:
    with DermisClient(gateway.url) as client:
        finished = gateway.finished()
        assert client.datasets.cancel(finished).state == "succeeded"
        assert not gateway.requests("DELETE")
        gateway.ticks = 10**6
        running = client.datasets.create({"benign": 10**6})
        gateway.faults = [Fault("DELETE", after=True)]  # it arrives, the answer does not
        assert running.cancel().state == "cancelling"
        assert len(gateway.requests("DELETE")) == 1 and running.id in gateway.datasets


def test_delete_stops_a_running_dataset_first(gateway: FakeGateway) -> None:
    gateway.ticks = 10**6
    with DermisClient(gateway.url) as client:
        running, finished = client.datasets.create({"benign": 10**6}), gateway.finished()
        gateway.faults = [Fault("DELETE", after=True)]
        running.delete()
        client.datasets.delete(finished)
        assert not gateway.datasets
        with pytest.raises(errors.NotFoundError):
            client.datasets.delete(finished)


def test_delete_of_running_dataset_times_out(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_flows, "DELETE_TIMEOUT", 0.0)
    monkeypatch.setattr(gateway, "tick", lambda dataset: None)
    with DermisClient(gateway.url) as client, pytest.raises(errors.WaitTimeoutError):
        client.datasets.create(CLASSES).delete()


def test_the_callers_http_client_stays_open(gateway: FakeGateway) -> None:
    with httpx.Client() as http:
        with DermisClient(gateway.url, http_client=http) as client:
            client.models.list()
        assert not http.is_closed


def test_default_model_is_marked_by_service(gateway: FakeGateway) -> None:
    models: list[dict[str, Any]] = [
        {"name": name, "digest": name * 64, "default": name == "b"} for name in ("a", "b", "c")
    ]
    gateway.faults = [
        Fault("GET /v1/models", status=200, body=json.dumps({"data": listed}).encode(), media_type="application/json")
        for listed in (models, [])
    ]
    with DermisClient(gateway.url) as client:
        assert client.models.default().name == "b"
        with pytest.raises(errors.DermisError, match="no default model"):
            client.models.default()


def test_other_options_share_the_connections_and_requests_have_the_credentials(
    gateway: FakeGateway, caplog: pytest.LogCaptureFixture
) -> None:
    with DermisClient(gateway.url, api_key="secret-key", max_retries=0) as client:
        patient = client.with_options(max_retries=2, timeout=7)
        assert patient._transport.http is client._transport.http
        assert "timeout=7, max_retries=2" in repr(patient) and "max_retries=0" in repr(client)
        gateway.faults.append(Fault("GET /v1/models", times=2, status=503))
        with caplog.at_level("DEBUG", "dermis_client"):
            response = patient.request("GET", "/v1/models", params={"limit": 1})
        assert response.json()["data"]
        assert gateway.requests("GET /v1/models")[-1]["authorization"] == "Bearer secret-key"
        for values in ({"timeout": 0.0}, {"max_retries": -1}):
            with pytest.raises(InvalidRequestError, match="timeout must be above 0"):
                client.with_options(**values)
        with pytest.raises(InvalidRequestError, match="path"):
            client.request("GET", "//elsewhere.example/")
    lines = [record.getMessage() for record in caplog.records]
    assert sum("GET /v1/models: attempt" in line for line in lines) == 2 and "secret-key" not in caplog.text
