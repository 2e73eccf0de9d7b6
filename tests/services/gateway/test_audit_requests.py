"""Tests of which requests are in the audit trail, and what their entries contain."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.responses import Response

from dermis.bundle import Bundle
from service_kit import Service, service
from services.audit import writer as writer_module
from services.audit.trail import AuditTable, Entry, Event, HeadMissingError
from services.audit.verification import verify
from services.audit.writer import AuditWriter
from services.errors import DatabaseUnavailableError
from services.gateway import audit as audit_module
from services.gateway.audit import ACTIONS, NOT_RECORDED, AuditTrail, DeniedRequests, RepeatedDenials
from services.gateway.auth.principal import SCOPES
from services.gateway.studio import Studio

NAME = "patient-jane-doe.png"


@pytest.fixture(scope="module")
def served(tiny_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tiny_bundle.location, tmp_path_factory.mktemp("audit"), auth="keys") as running:
        yield running


@pytest.fixture
def key(served: Service) -> str:
    return key_for(served, *SCOPES)


def key_for(served: Service, *scopes: str) -> str:
    return context_of(served).auth.keys.create(tenant="lab", name="n", scopes=scopes, created_by="test")[1]


def context_of(served: Service) -> Any:
    return served.client.app.state.context  # type: ignore[attr-defined]


def sent(served: Service, operation: str, key: str | None, **values: Any) -> Any:
    method, path = operation.split(" ")
    headers: Mapping[str, str] = {} if key is None else {"Authorization": f"Bearer {key}"}
    return served.client.request(method, path, headers={**headers, **values.pop("headers", {})}, **values)


def entries_of(served: Service) -> list[Entry]:
    """The whole trail, oldest entry first, once everything is written."""
    served.client.portal.call(_flush, context_of(served))  # type: ignore[union-attr]
    return list(reversed(context_of(served).audit.writer.table.page(1000)))


async def _flush(context: Any) -> None:
    await context.audit.writer.write(audit_module.Event(time="", action="test.flush", outcome=200))


def test_trail_is_not_read_over_http_without_access_control(tiny_bundle: Bundle, tmp_path: Path) -> None:
    # It is the first test, because only one service can run in a process at a time.
    lines = io.StringIO()
    with service(tiny_bundle.location, tmp_path) as running:
        context_of(running).audit.writer._lines = lines
        answer = running.client.get("/v1/admin/audit")
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:dermis:problem:no-access-control")
    (document,) = (json.loads(line)["audit"] for line in lines.getvalue().splitlines())
    assert (document["action"], document["outcome"], document["client"]) == ("audit.read", 403, "testclient")


def test_every_operation_is_recorded_or_excepted(served: Service) -> None:
    """A new operation needs an entry in `ACTIONS` or `NOT_RECORDED`."""
    paths = served.client.app.openapi()["paths"]  # type: ignore[attr-defined]
    documented = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert ACTIONS.keys() | NOT_RECORDED == documented
    assert not ACTIONS.keys() & NOT_RECORDED
    changing = {route for route in documented if route.split()[0] in ("POST", "DELETE", "PUT", "PATCH")}
    assert changing <= ACTIONS.keys()


def test_entries_say_who_did_what_and_contain_no_upload(served: Service, key: str) -> None:
    before = len(entries_of(served))
    dataset = sent(served, "POST /v1/datasets", key, json={"classes": {"benign": 2}}).json()
    identifier = dataset["id"]
    served.client.headers["Authorization"] = f"Bearer {key}"
    try:
        served.wait(dataset)
    finally:
        del served.client.headers["Authorization"]
    sent(served, f"GET /v1/datasets/{identifier}/files/manifest.json", key, headers={"X-Request-Id": "my-request"})
    sent(served, f"GET /v1/datasets/{identifier}/files/{NAME}", key)
    sent(served, f"DELETE /v1/datasets/{identifier}", key)
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "PNG")
    sent(served, "POST /v1/classifications", key, files={"files": (NAME, picture.getvalue(), "image/png")})
    sent(served, "POST /v1/images", key, json={"classes": {"benign": 1}})
    order = {"name": NAME, "tenant": "ward", "scopes": ["images", "admin"]}
    created = sent(served, "POST /v1/admin/keys", key, json=order).json()
    rotated = sent(served, f"POST /v1/admin/keys/{created['id']}/rotate", key).json()
    sent(served, f"DELETE /v1/admin/keys/{rotated['id']}", key)
    sent(served, f"DELETE /v1/datasets/{NAME}", key)
    for path in ("/v1/models", "/livez", f"/v1/datasets/{identifier}"):
        sent(served, f"GET {path}", key)
    entries = [entry for entry in entries_of(served)[before:] if entry.action != "test.flush"]
    assert [(entry.action, entry.outcome, entry.object, entry.detail) for entry in entries] == [
        ("dataset.create", 202, identifier, None),
        ("dataset.download", 200, identifier, "manifest.json"),
        ("dataset.download", 404, identifier, None),
        ("dataset.delete", 204, identifier, None),
        ("upload.classify", entries[4].outcome, None, None),
        ("image.generate", 200, None, None),
        ("key.create", 201, created["id"], "tenant ward: admin images"),
        ("key.rotate", 201, rotated["id"], f"replaces {created['id']}"),
        ("key.revoke", 200, rotated["id"], None),
        ("dataset.delete", 404, None, None),
    ]
    assert {(entry.subject, entry.tenant, entry.client) for entry in entries} == {
        (f"key:{key[10:22]}", "lab", "testclient")
    }
    assert entries[1].request_id == "my-request" and entries[1].route == "GET /v1/datasets/{dataset_id}/files/{name}"
    text = json.dumps([entry.document() for entry in entries])
    assert NAME not in text and created["key"][23:] not in text and key[23:] not in text


def test_redirected_download_is_recorded_with_its_file(
    served: Service, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.client.headers["Authorization"] = f"Bearer {key}"
    try:
        dataset = served.ask({"classes": {"benign": 1}})
        served.wait(dataset)
    finally:
        del served.client.headers["Authorization"]
    context = context_of(served)
    redirecting = replace(context, settings=context.settings.model_copy(update={"download_url_seconds": 60}))
    monkeypatch.setitem(served.client.app.state._state, "context", redirecting)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(context.jobs), "signed_url", lambda *_, **__: "https://storage.example/signed")
    name = dataset["id"]
    answer = sent(served, f"GET /v1/datasets/{name}/files/manifest.json", key, follow_redirects=False)
    assert (answer.status_code, answer.headers["Location"]) == (307, "https://storage.example/signed")
    entry = next(entry for entry in reversed(entries_of(served)) if entry.action == "dataset.download")
    assert (entry.outcome, entry.object, entry.detail) == (307, name, "manifest.json")


def test_denied_requests_are_recorded_within_limits(served: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeniedRequests, "FROM_ONE_ADDRESS", 3)
    monkeypatch.setattr(RepeatedDenials, "FROM_ONE_SENDER", 2)
    before = len(entries_of(served))
    weak = key_for(served, "models:read")
    for _ in range(5):
        assert sent(served, "POST /v1/images", weak, json={}).status_code == 403
    assert sent(served, "POST /v1/edits", weak, json={}).status_code == 403  # another route has a limit of its own
    for _ in range(5):
        assert sent(served, "GET /v1/models", None).status_code == 401
    assert sent(served, "DELETE /v1/datasets/x", weak, headers={"Origin": "https://evil.example"}).status_code == 403
    served.client.portal.call(context_of(served).audit._write_count)  # type: ignore[union-attr]
    entries = [entry for entry in entries_of(served)[before:] if entry.action != "test.flush"]
    assert [(each.action, each.outcome, each.subject) for each in entries] == [
        *[("image.generate", 403, f"key:{weak[10:22]}")] * 2,
        ("image.edit", 403, f"key:{weak[10:22]}"),
        *[("request.denied", 401, None)] * 3,
        ("request.denied", 401, "service"),
        ("image.generate", 403, f"key:{weak[10:22]}"),
    ]
    assert (entries[3].route, entries[-2].detail) == ("GET /v1/models", "3 more denied requests")
    assert (entries[-1].tenant, entries[-1].route) == ("lab", "POST /v1/images")
    assert (entries[0].detail, entries[-1].detail) == (None, "3 more such denied requests")
    with context_of(served).audit.writer.table.snapshot() as snapshot:
        assert verify(snapshot).intact


def test_count_that_cannot_be_written_at_the_stop_is_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the database is away and as many entries wait as are kept without letting their requests wait."""
    monkeypatch.setattr(writer_module, "_RETRY_SECONDS", 0.01)

    class Away:
        def append(self, _events: object) -> None:
            raise DatabaseUnavailableError("no database")

        def close(self) -> None:
            pass

    async def stop() -> threading.Thread | None:
        writer = AuditWriter(Away())  # type: ignore[arg-type]
        writer.start()
        thread = writer._thread
        writer._pending = writer_module._MAX_PENDING
        trail = AuditTrail(writer)
        trail._denied.left_out = 1
        await trail.close()
        return thread

    thread = asyncio.run(stop())
    assert thread is not None and not thread.is_alive()
    (lost,) = (record for record in caplog.records if record.getMessage() == "audit entry lost")
    assert "1 more denied requests" in lost.entry  # type: ignore[attr-defined]


def test_limit_of_denied_requests_is_by_address_and_by_minute() -> None:
    clock = 0.0
    denied = DeniedRequests(lambda: clock)
    assert [denied.may_record("a") for _ in range(25)].count(True) == 20
    assert denied.may_record("b") and denied.take() == 5 and denied.take() == 0
    assert [denied.may_record(str(i)) for i in range(300)].count(True) == 200 - 21
    clock = 60.0
    assert denied.may_record("a")


def test_repeated_denials_of_a_sender_are_counted_by_the_minute() -> None:
    clock = 0.0
    repeated = RepeatedDenials(lambda: clock)

    def denied(number: int) -> Event:
        return Event(
            time=str(number), action="a", outcome=403, subject="key:1", request_id=str(number), client=str(number)
        )

    assert [repeated.may_record(denied(number)) for number in range(30)].count(True) == 20
    assert repeated.may_record(replace(denied(0), subject="key:2"))
    clock = 60.0
    assert repeated.may_record(denied(31))
    (summary,) = repeated.take()  # what the last minute left out is not forgotten
    assert (summary.subject, summary.outcome, summary.detail) == ("key:1", 403, "10 more such denied requests")
    assert repeated.take() == []


def test_trail_is_read_in_pages_and_the_reading_is_in_it(served: Service, key: str) -> None:
    for _ in range(3):
        sent(served, "GET /v1/admin/audit?limit=1", key)
    first = sent(served, "GET /v1/admin/audit?action=audit.read&limit=2", key).json()
    assert len(first["data"]) == 2 and first["next_before"] == first["data"][1]["number"]
    second = sent(served, f"GET /v1/admin/audit?action=audit.read&before={first['next_before']}", key).json()
    assert second["data"][0]["number"] < first["next_before"] and second["next_before"] is None
    assert {each["tenant"] for each in first["data"]} == {"lab"}
    assert sent(served, "GET /v1/admin/audit?since=2999-01-01T00:00:00Z", key).json()["data"] == []
    assert sent(served, "GET /v1/admin/audit?since=2999-01-01T00:00:00", key).status_code == 422
    head = second["head"]
    with context_of(served).audit.writer.table.snapshot() as snapshot:
        result = verify(snapshot)
    assert result.intact and result.last is not None and head["number"] < result.last.number


def test_nothing_is_shown_or_answered_without_its_entry(
    served: Service, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: AuditTable, _events: Any) -> list[Entry]:
        raise HeadMissingError("no head")

    before = len(entries_of(served))
    monkeypatch.setattr(AuditTable, "append", fail)
    for operation in ("GET /v1/admin/audit", "POST /v1/admin/keys"):
        answer = sent(served, operation, key, **({"json": {"name": "n"}} if "POST" in operation else {}))
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:dermis:problem:not-ready")
        assert answer.headers["retry-after"] == "5" and "data" not in answer.json() and "key" not in answer.json()
    assert sent(served, "GET /v1/models", key).status_code == 200
    monkeypatch.undo()
    assert [entry.action for entry in entries_of(served)[before:]] == ["test.flush"]


def test_requests_to_the_studio_are_recorded_only_if_they_are_denied(
    served: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trail has the calls that the pages make. Signing out needs no key, so its entries would have no limit."""
    statuses = iter([303, 200, 401])

    async def site(_: Studio) -> Any:
        return Response(status_code=next(statuses))

    monkeypatch.setattr(Studio, "site", site)
    monkeypatch.setattr("services.gateway.studio.studio_installed", lambda _: True)
    monkeypatch.setattr(served.client.app.state.studio, "enabled", True)  # type: ignore[attr-defined]
    before = entries_of(served)
    for path in ("sign-out", "gradio_api/queue/join", "session"):
        sent(served, f"POST /studio/{path}", None)
    new = entries_of(served)[len(before) :]
    assert [(entry.route, entry.outcome) for entry in new if entry.action != "test.flush"] == [("POST /studio", 401)]
