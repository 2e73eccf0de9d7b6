"""Tests of the quotas of tenants: every quota at its limit, what replicas share, and what a refused request leaves."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from dermis_client import AsyncDermisClient, DermisClient, RateLimitError, TooLargeError, Usage
from starlette.requests import Request

from dermis.bundle import Bundle
from dermis.dataset.plan import plan_for
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import max_dataset_bytes, max_image_bytes
from dermis.errors import StorageError
from dermis.imaging import ImageFormat, encode
from real_servers import running_postgres
from service_kit import Service, service, wait_for
from services.audit.trail import Event
from services.errors import DatabaseUnavailableError
from services.gateway.audit import RepeatedDenials
from services.gateway.auth.principal import SCOPES, Principal
from services.gateway.quotas import TenantQuotas
from services.gateway.routes import authenticity
from services.jobs import counters
from services.jobs.table import JobTable
from services.quotas import DAY, QUOTAS, Quota, QuotaExceededError, quota_of, read_quotas
from services.settings import REPOSITORY, Settings, SettingsError, read_settings
from tiny_index import make_complete_bundle

pytest.importorskip("faiss", reason="FAISS is not installed")

ENDED = ("succeeded", "failed", "cancelled")
NOON = 1_800_000_000 // DAY * DAY + 43_200.0  # of some day, in seconds since 1970
PICTURE = encode(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8), "jpeg")
UPLOAD = [("files", ("a.jpg", PICTURE, "image/jpeg"))]
SMALL = [("files", ("a.png", encode(np.zeros((12, 12, 3), np.uint8)), "image/png"))]
QUOTAS_OF_TENANTS = {
    "*": {"images_per_day": 10, "active_jobs": 2, "stored_bytes": "20MB"},
    "minutes": {
        "images_per_day": None,
        "upload_megapixels_per_minute": 2,
        "authenticity_per_minute": 3,
        "authenticity_per_day": 4,
        "projections_per_day": 1,
    },
    "bytes": {"active_jobs": None},
    "requests": {"requests_per_minute": 3},
    "both": {"images_per_day": 7, "authenticity_per_day": 9},
    "unlimited": dict.fromkeys(QUOTAS),
}


class Clock:
    """A clock that tests advance."""

    def __init__(self) -> None:
        self.time = NOON

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    replacement = Clock()
    monkeypatch.setattr(counters, "now", replacement)
    return replacement


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    training = np.random.default_rng(1).integers(0, 256, (30, 12, 12, 3), dtype=np.uint8)
    return make_complete_bundle(tmp_path_factory.mktemp("bundle") / "tiny", training, name="tiny")


@pytest.fixture(scope="module")
def served(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("data")
    settings = {
        "auth": "keys",
        "authenticity_uploads": True,
        "upload_decoders": 1,
        "quotas": json.dumps(QUOTAS_OF_TENANTS),
    }
    with service(bundle.location, folder, **settings) as running:
        yield running


class Tenant:
    """A tenant of the service, with a key that has every scope."""

    def __init__(self, served: Service, name: str) -> None:
        self.served, self.name = served, name
        keys = served.client.app.state.context.auth.keys  # type: ignore[attr-defined]
        self.key = keys.create(tenant=name, name="n", scopes=tuple(SCOPES), created_by="test")[1]

    def send(self, method: str, path: str, **values: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"} | values.pop("headers", {})
        return self.served.client.request(method, path, headers=headers, **values)

    def stream(self, path: str) -> Any:
        return self.served.client.stream("get", path, headers={"Authorization": f"Bearer {self.key}"})

    def images(self, count: int) -> Any:
        return self.send("post", "/v1/images", json={"classes": {"benign": count}})

    def dataset(self, count: int, **headers: str) -> Any:
        return self.send("post", "/v1/datasets", json={"classes": {"benign": count}}, headers=headers)

    def used(self, name: str) -> float | None:
        quotas = {each["name"]: each for each in self.send("get", "/v1/usage").json()["quotas"]}
        value: float | None = quotas[name]["used"]
        return value

    def wait(self, dataset_id: str) -> str:
        """The state of a dataset once it has ended."""
        states = list[str]()
        wait_for(
            lambda: states.append(self.send("get", f"/v1/datasets/{dataset_id}").json()["state"]) or states[-1] in ENDED
        )
        return states[-1]

    def refused(self, answer: Any, name: str) -> dict[str, Any]:
        """The quota in the refusal of a request."""
        assert answer.status_code == 429, answer.text
        document = answer.json()
        assert document["type"] == "urn:dermis:problem:quota-exceeded" and name in document["detail"]
        assert int(answer.headers["retry-after"]) > 0
        assert document["quota"]["name"] == name
        quota: dict[str, Any] = document["quota"]
        return quota


def test_images_of_datasets_and_calls_count_together_until_the_day_ends(served: Service, clock: Clock) -> None:
    tenant, other = Tenant(served, "images"), Tenant(served, "images-too")
    answer = tenant.images(4)
    assert answer.status_code == 200
    assert answer.headers["ratelimit-policy"] == '"images_per_day";q=10;w=86400;qu="images"'
    assert re.fullmatch(r'"images_per_day";r=6;t=\d+', answer.headers["ratelimit"])
    served.generator.failures = [RuntimeError("x")]
    assert tenant.images(1).status_code == 500  # not counted, as it returned nothing
    key = {"Idempotency-Key": "once"}
    answer = tenant.dataset(5, **key)
    assert answer.status_code == 202 and answer.headers["ratelimit"].startswith('"images_per_day";r=1;')
    assert tenant.dataset(5, **key).json()["id"] == answer.json()["id"]  # counted once
    assert tenant.used("images_per_day") == 9
    quota = tenant.refused(tenant.images(2), "images_per_day")
    midnight = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(NOON + 43_200))
    assert quota == {
        "name": "images_per_day",
        "unit": "images",
        "limit": 10,
        "used": 9,
        "requested": 2,
        "resets_at": midnight,
    }
    before = tenant.send("get", "/v1/datasets").json()
    refusal = tenant.dataset(2)
    tenant.refused(refusal, "images_per_day")
    assert int(refusal.headers["retry-after"]) == 43_200
    assert refusal.headers["ratelimit"].startswith('"images_per_day";r=1;')
    sample = {"samples": [{"class": "benign", "seed": 0, "index": 0}] * 2, "edits": []}
    sample["edits"] = [{"direction": "axis-0", "strength": 1.0}]
    tenant.refused(tenant.send("post", "/v1/edits", json=sample), "images_per_day")
    assert tenant.send("get", "/v1/datasets").json() == before
    assert tenant.used("images_per_day") == 9 and tenant.images(1).status_code == 200
    assert other.images(10).status_code == 200  # has its own
    clock.time += 43_199
    tenant.refused(tenant.images(1), "images_per_day")
    clock.time += 1
    assert tenant.images(10).status_code == 200


def test_request_that_exceeds_a_quota_by_itself_need_not_be_repeated(served: Service) -> None:
    answer = Tenant(served, "large").images(11)
    assert answer.status_code == 422 and "retry-after" not in answer.headers
    assert answer.json()["type"] == "urn:dermis:problem:request-too-large"
    assert answer.json()["quota"]["limit"] == 10 and "alone" in answer.json()["detail"]


def test_active_jobs_and_bytes_of_a_tenant_are_limited(served: Service, bundle: Bundle) -> None:
    tenant, other = Tenant(served, "jobs"), Tenant(served, "jobs-too")
    served.generator.gate.clear()
    try:
        first, second = tenant.dataset(1), tenant.dataset(1)
        tenant.refused(tenant.dataset(1), "active_jobs")
        assert other.dataset(1).status_code == 202
        plan = plan_for(DatasetRequest(model="tiny", classes={"benign": 1}), bundle)
        assert tenant.used("stored_bytes") == 2 * max_dataset_bytes(plan, 16)
    finally:
        served.generator.gate.set()
    for answer in (first, second):
        assert tenant.wait(answer.json()["id"]) == "succeeded"
    stored = tenant.used("stored_bytes")
    assert tenant.used("active_jobs") == 0 and stored == served.ctx.table.stored_bytes("jobs") > 1000
    folder = Path(served.settings.storage) / "tenants" / "jobs"
    assert stored == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert stored < 2 * max_dataset_bytes(plan, 16)


def test_job_that_would_exceed_the_bytes_is_refused_before_it_starts(served: Service, bundle: Bundle) -> None:
    tenant = Tenant(served, "bytes")
    estimate = max_dataset_bytes(plan_for(DatasetRequest(model="tiny", classes={"benign": 1}), bundle), 16)
    served.generator.gate.clear()
    try:
        made = [tenant.dataset(1) for _ in range(2)]
        quota = tenant.refused(tenant.dataset(1), "stored_bytes")
        assert (quota["used"], quota["requested"], quota["limit"]) == (2 * estimate, estimate, 20_000_000)
        assert len(tenant.send("get", "/v1/datasets").json()["data"]) == 2
    finally:
        served.generator.gate.set()
    states = [tenant.wait(answer.json()["id"]) for answer in made]
    assert states == ["succeeded", "succeeded"] and tenant.used("stored_bytes") < estimate / 2
    answer = tenant.dataset(1)  # the files are smaller than the estimates
    assert answer.status_code == 202 and tenant.wait(answer.json()["id"]) == "succeeded"
    for each in (*made, answer):
        assert tenant.send("delete", f"/v1/datasets/{each.json()['id']}").status_code == 204
    assert tenant.used("stored_bytes") == 0


def test_uploads_comparisons_and_projections_are_limited(
    served: Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = Tenant(served, "minutes")

    def classify() -> Any:
        return tenant.send("post", "/v1/classifications", files=UPLOAD)

    assert [classify().status_code for _ in range(2)] == [200, 200]
    assert tenant.refused(classify(), "upload_megapixels_per_minute")["used"] == 2
    tenant.refused(tenant.send("post", "/v1/projections?steps=2", files=UPLOAD), "upload_megapixels_per_minute")
    clock.time += 60
    served.projector.gate.clear()
    projected = tenant.send("post", "/v1/projections?steps=2", files=UPLOAD)
    assert projected.status_code == 202 and "projections_per_day" in projected.headers["ratelimit"]
    storage = Path(served.settings.storage) / "tenants" / "minutes"
    before = sorted(path.name for path in storage.iterdir())
    tenant.refused(tenant.send("post", "/v1/projections?steps=2", files=UPLOAD), "projections_per_day")
    assert sorted(path.name for path in storage.iterdir()) == before
    assert tenant.send("delete", f"/v1/projections/{projected.json()['id']}").status_code == 204
    served.projector.failures = [RuntimeError("not needed")]
    served.projector.gate.set()
    clock.time += 60
    # Comparisons stay counted if they fail, so the index is not needed here.
    monkeypatch.setattr(authenticity, "nearest_of", fail)
    comparisons = served.client.app.state.context.limits.comparisons  # type: ignore[attr-defined]
    with monkeypatch.context() as limited:  # what the limit of the service refuses takes nothing from a quota
        limited.setattr(comparisons, "_limit", 0)
        assert tenant.send("post", "/v1/authenticity", files=SMALL).status_code == 422
    compared = {"classes": {"benign": 2}}
    assert tenant.send("post", "/v1/authenticity", json=compared).status_code == 503
    assert tenant.send("post", "/v1/authenticity", files=SMALL).status_code == 503
    tenant.refused(tenant.send("post", "/v1/authenticity", files=SMALL), "authenticity_per_minute")
    clock.time += 60
    assert tenant.send("post", "/v1/authenticity", files=SMALL).status_code == 503
    tenant.refused(tenant.send("post", "/v1/authenticity", files=SMALL), "authenticity_per_day")
    tenant.refused(tenant.send("post", "/v1/images", json={**compared, "privacy": {}}), "authenticity_per_day")


def test_requests_of_a_tenant_are_limited_and_do_not_fill_the_audit_trail(
    served: Service, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RepeatedDenials, "FROM_ONE_SENDER", 2)
    tenant, other = Tenant(served, "requests"), Tenant(served, "requests-too")
    trail = served.client.app.state.context.audit  # type: ignore[attr-defined]
    monkeypatch.setattr(trail, "_repeated", RepeatedDenials())  # whose minute begins now
    answer = tenant.send("get", "/v1/models")
    assert answer.headers["ratelimit-policy"] == '"requests_per_minute";q=3;w=60;qu="requests"'
    assert tenant.images(1).status_code == 200
    assert tenant.send("get", "/v1/datasets/unknown").status_code == 404  # counted as well
    for _ in range(6):
        tenant.refused(tenant.images(1), "requests_per_minute")
    assert tenant.used("requests_per_minute") == 3  # refused requests are not counted, and this one neither
    assert tenant.send("get", "/v1/admin/keys").status_code == 200  # what could end an attack is possible
    assert other.images(1).status_code == 200
    served.client.portal.call(trail._write_count)  # type: ignore[union-attr]
    served.client.portal.call(trail.writer.write, Event(time="", action="test.flush", outcome=200))  # type: ignore[union-attr]
    refusals = [each.detail for each in trail.writer.table.page(100, tenant="requests") if each.outcome == 429]
    assert refusals == ["4 more such denied requests", None, None]
    clock.time += 60
    assert tenant.images(1).status_code == 200


def test_usage_shows_limits_and_use_of_the_senders_tenant(served: Service) -> None:
    unlimited = Tenant(served, "unlimited")
    assert unlimited.images(12).status_code == 200
    body = unlimited.send("get", "/v1/usage").json()
    assert body["tenant"] == "unlimited" and [each["name"] for each in body["quotas"]] == list(QUOTAS)
    assert all(each["limit"] is None and each["remaining"] is None for each in body["quotas"])
    assert [each["used"] for each in body["quotas"]] == [None] * 6 + [0, 0]
    limited = Tenant(served, "usage").send("get", "/v1/usage").json()["quotas"]
    assert [(each["limit"], each["used"], each["remaining"]) for each in limited if each["limit"] is not None] == [
        (10, 0, 10),
        (2, 0, 2),
        (20_000_000, 0, 20_000_000),
    ]


def test_clients_of_python_read_use_and_refusals(served: Service) -> None:
    tenant = Tenant(served, "sdk")
    sdk = DermisClient("http://localhost", api_key=tenant.key, max_retries=3, http_client=served.client)
    sdk.images.generate({"benign": 7})
    usage = sdk.usage.retrieve()
    quota = usage.quotas[0]
    assert (usage.tenant, quota.name, quota.limit, quota.used, quota.remaining) == ("sdk", "images_per_day", 10, 7, 3)
    with pytest.raises(RateLimitError) as caught:  # at once, as the day ends later than the client is willing to wait
        sdk.datasets.create({"benign": 4})
    exceeded = caught.value.problem.quota
    assert exceeded is not None and (exceeded.name, exceeded.used, exceeded.requested) == ("images_per_day", 7, 4)
    assert caught.value.kind == "quota-exceeded" and caught.value.retry_after and exceeded.resets_at
    with pytest.raises(TooLargeError, match="this request alone needs 11"):
        sdk.images.generate({"benign": 11})

    async def retrieve() -> Usage:
        transport = httpx.ASGITransport(app=served.client.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = AsyncDermisClient("http://localhost", api_key=tenant.key, http_client=http)
            return await client.usage.retrieve()

    assert asyncio.run(retrieve()) == sdk.usage.retrieve()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a new, empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/jobs.sqlite"
    else:
        with running_postgres() as server:
            yield server.url


USE_QUOTA = """
import sys
from services.jobs.table import JobTable
from services.quotas import Quota, QuotaExceededError
table, accepted = JobTable(sys.argv[1]), 0
try:
    while True:
        table.count_use("a", {"images_per_day": 3}, Quota(images_per_day=50))
        accepted += 1
except QuotaExceededError:
    print(accepted)
"""


def test_accepted_requests_of_all_replicas_together_never_exceed_a_quota(url: str) -> None:
    quota = Quota(images_per_day=50, active_jobs=5, stored_bytes=1000)
    tables = [JobTable(url), JobTable(url)]
    tables[0].open()
    accepted = list[str]()
    barrier = threading.Barrier(8)

    def submit(number: int) -> None:
        table, tenant = tables[number % 2], f"tenant-{number % 4 // 2}"
        barrier.wait(60)
        for step in range(4):
            try:
                table.create(
                    f"ds_{number}_{step}",
                    {},
                    tenant=tenant,
                    kind="dataset",
                    model=("tiny", "0"),
                    samples=11,
                    shards=1,
                    body_hash="a",
                    quota=quota,
                    amounts={"images_per_day": 11},
                    reserved_bytes=300,
                )
            except QuotaExceededError:
                continue
            accepted.append(tenant)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(accepted) == ["tenant-0"] * 3 + ["tenant-1"] * 3  # as 4 would have 1,200 bytes
    uses = {use.name: use.used for use in tables[0].use("tenant-0", quota)}
    assert (uses["images_per_day"], uses["active_jobs"], uses["stored_bytes"]) == (33, 3, 900)
    assert len(tables[0].active()) == 6
    for table in tables:
        table.close()


def test_processes_share_the_count_of_a_day(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    table = JobTable(url)
    table.open()
    command = [sys.executable, "-c", USE_QUOTA, url]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) for _ in range(2)]
    accepted = [int(process.communicate(timeout=120)[0]) for process in processes]
    (use,) = table.use("a", Quota(images_per_day=50), ["images_per_day"])
    assert use.used == 48 and sum(accepted) == 16
    table.close()


def test_window_of_another_clock_is_used_only_if_it_is_near(clock: Clock, tmp_path: Path) -> None:
    table = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite")
    table.open()
    quota = Quota(authenticity_per_minute=5)

    def used(amount: int) -> int | None:
        return table.count_use("a", {"authenticity_per_minute": amount}, quota)[0].used

    assert used(3) == 3
    clock.time -= 30  # the minute before, as a replica whose clock is late sees it
    assert used(2) == 5
    with pytest.raises(QuotaExceededError) as caught:
        used(1)
    assert caught.value.retry_after == 90
    clock.time -= 3600  # the clock was wrong by an hour
    assert used(1) == 1
    table.undo_use("a", {"authenticity_per_minute": 4}, clock.time)
    assert used(1) == 1
    table.close()


def test_failure_after_the_end_of_a_window_frees_nothing_of_the_next_one(clock: Clock, tmp_path: Path) -> None:
    table = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite")
    table.open()
    quota, began = Quota(images_per_day=5), clock.time
    table.count_use("a", {"images_per_day": 3}, quota)
    clock.time += DAY
    assert table.count_use("a", {"images_per_day": 5}, quota)[0].used == 5
    table.undo_use("a", {"images_per_day": 3}, began)
    with pytest.raises(QuotaExceededError):
        table.count_use("a", {"images_per_day": 1}, quota)
    table.undo_use("a", {"images_per_day": 3}, clock.time)
    assert table.count_use("a", {"images_per_day": 3}, quota)[0].used == 5
    table.close()


@pytest.mark.parametrize("away", [False, True])
def test_cancelled_call_gives_back_what_it_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool) -> None:
    table, quota = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite"), Quota(images_per_day=5)
    table.open()
    settings: Any = SimpleNamespace(quota_of=lambda _tenant: quota)
    if away:  # this must not hide that the call was cancelled

        def fail(*_: object) -> None:
            raise DatabaseUnavailableError("away")

        monkeypatch.setattr(table, "undo_use", fail)

    async def run() -> None:
        begun = asyncio.Event()

        async def call() -> None:
            sender = Principal("a", "key:x", frozenset())
            async with TenantQuotas(settings, table).counted(
                Request({"type": "http"}), sender, {"images_per_day": 5}, {}
            ):
                begun.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(call())
        await begun.wait()
        task.cancel()  # as at the end of a process that is replaced
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert table.use("a", quota, ["images_per_day"])[0].used == (5 if away else 0)
    table.close()


def test_refused_request_is_counted_in_no_quota(served: Service, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authenticity, "nearest_of", fail)
    tenant = Tenant(served, "both")

    def compare(count: int) -> Any:
        return tenant.send("post", "/v1/authenticity", json={"classes": {"benign": count}})

    def used() -> list[float | None]:
        return [tenant.used(name) for name in ("images_per_day", "authenticity_per_day")]

    assert tenant.images(5).status_code == 200
    tenant.refused(compare(3), "images_per_day")
    assert used() == [5, 0]
    assert compare(1).status_code == 503 and used() == [6, 1]
    served.generator.failures = [RuntimeError("x")]
    assert compare(1).status_code == 500 and used() == [6, 2]  # the comparison stays counted
    assert tenant.images(1).status_code == 200 and used() == [7, 2]


def test_datasets_are_deleted_after_the_retention_time_of_their_tenant(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas = {"*": {"retention_days": 1}, "long": {"retention_days": 30}, "kept": {"retention_days": None}}
    # With so long a lease no sweep removes what has expired between two steps of the test.
    with service(bundle.location, tmp_path, auth="keys", quotas=quotas, lease_seconds=3600) as running:
        tenants = {name: Tenant(running, name) for name in ("short", "long", "kept")}
        made = {name: tenant.dataset(1).json()["id"] for name, tenant in tenants.items()}
        shown = {}
        for name, tenant in tenants.items():
            assert tenant.wait(made[name]) == "succeeded"
            shown[name] = tenant.send("get", f"/v1/datasets/{made[name]}").json()
            assert tenant.send("get", "/v1/datasets").json()["data"] == [shown[name]]
        assert shown["kept"]["expires_at"] is None
        finished, expires = (datetime.fromisoformat(shown["short"][each]) for each in ("finished_at", "expires_at"))
        assert expires - finished == timedelta(days=1)
        with tenants["short"].stream(f"/v1/datasets/{made['short']}/events") as answer:
            assert json.loads(answer.read().decode().split("data: ")[-1]) == shown["short"]

        def remaining() -> set[str]:
            running.jobs.datasets.remove_expired()
            storage = Path(running.settings.storage)
            return {
                name
                for name, dataset_id in made.items()
                if tenants[name].send("get", f"/v1/datasets/{dataset_id}").status_code == 200
                or list(storage.rglob(dataset_id))
            }

        real = time.time
        assert remaining() == {"short", "long", "kept"}
        monkeypatch.setattr("services.jobs.database.time.time", lambda: real() + 1.01 * DAY)
        # The storage fails in the middle of the first attempt: nothing half deleted can be seen, and the next one completes it.
        with monkeypatch.context() as broken:
            broken.setattr("services.jobs.execution.remove_files", fail)
            running.jobs.datasets.remove_expired()
        assert tenants["short"].send("get", f"/v1/datasets/{made['short']}").json()["state"] == "cancelled"
        assert tenants["short"].send("get", f"/v1/datasets/{made['short']}/files").status_code == 409
        assert remaining() == {"long", "kept"}
        monkeypatch.setattr("services.jobs.database.time.time", lambda: real() + 31 * DAY)
        assert remaining() == {"kept"}


def fail(*_: object) -> None:
    raise StorageError("no connection", "storage-unavailable")


@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_estimate_is_above_the_size_of_the_images_that_compress_worst(image_format: ImageFormat) -> None:
    rng = np.random.default_rng(2)
    for side in (8, 128):
        uniform = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        for image in (uniform, (uniform > 127).astype(np.uint8) * 255):
            for quality in (1, 75, 95, 100):
                size = len(encode(image, image_format, quality))
                assert size <= max_image_bytes(image_format, quality, side)


def test_setting_of_quotas_is_read_strictly() -> None:
    quotas = read_quotas('{"*": {"images_per_day": 5, "stored_bytes": "1GiB"}, "a": {"images_per_day": null}}')
    assert quota_of(quotas, "a") == Quota(stored_bytes=1 << 30)
    assert quota_of(quotas, "b") == Quota(images_per_day=5, stored_bytes=1 << 30)
    assert quota_of({}, "b") == Quota() and not Quota(retention_days=1).limits
    assert Settings(_env_file=None, quotas="").quotas == {}
    for wrong, message in {
        "{": "is not JSON",
        "[]": "write a JSON object",
        '{"A": {}}': "'A' is not the name of a tenant",
        '{"a": 5}': r"a: ",
        '{"a": {"images": 5}}': r"a\.images: unknown; the quotas are images_per_day",
        '{"a": {"images_per_day": -1}}': r"a\.images_per_day: .*greater than or equal to 0",
        '{"a": {"images_per_day": true}}': r"a\.images_per_day: .*valid integer",
        '{"a": {"stored_bytes": "much"}}': r"a\.stored_bytes: ",
        '{"a": {"retention_days": 0}}': r"a\.retention_days: ",
        '{"a": {}, "a": {}}': "'a' occurs twice",
    }.items():
        with pytest.raises(SettingsError, match=f"^DERMIS_QUOTAS: .*{message}"):
            read_settings(quotas=wrong)
