"""Tests of the gateway's limits: refusal at the limit, release at the end, and separate counts for each gateway."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from dermis.bundle import Bundle
from service_kit import service, wait_for
from services.gateway.events import EventStream
from services.gateway.limits import GatewayLimits, Limiter, MinuteLimiter, WaitLimiter
from services.problems import ProblemError
from services.settings import Settings


def test_call_above_limit_is_refused_until_another_ends() -> None:
    limiter = Limiter(2, "overloaded", "try again", retry_after=7)
    with limiter.hold("a"):
        with limiter.hold("a"), pytest.raises(ProblemError, match="try again") as refused, limiter.hold("a"):
            pass
        assert (refused.value.kind, refused.value.headers) == ("overloaded", {"Retry-After": "7"})
        with limiter.hold("a"):
            pass


def test_failed_call_is_released() -> None:
    limiter = Limiter(1, "overloaded", "try again", retry_after=1)
    for _ in range(2):
        with pytest.raises(KeyError), limiter.hold("a"):
            raise KeyError


@pytest.mark.parametrize(("limit", "alone"), [(1, 1), (2, 1), (4, 3), (8, 6), (32, 24), (64, 48)])
def test_calls_of_one_tenant_leave_some_free_for_others(limit: int, alone: int) -> None:
    limiter = Limiter(limit, "overloaded", "too many", retry_after=1, shared=True)
    assert taken(limiter, "a") == alone
    with pytest.raises(ProblemError, match="other tenants" if limit > 1 else "too many"):
        limiter.acquire("a")
    others = [taken(limiter, name) for name in ("b", "c")]
    assert others[0] >= (limit > 1) and others[1] >= (limit > 4)
    for name, count in zip("abc", (alone, *others), strict=True):
        for _ in range(count):
            limiter.release(name)
    assert taken(limiter, "c") == alone
    # Without access control there is one tenant, which may have all.
    assert taken(Limiter(limit, "overloaded", "too many", retry_after=1), "default") == limit


def taken(limiter: Limiter, tenant: str) -> int:
    """Take as many calls as the tenant gets."""
    for count in range(100):
        try:
            limiter.acquire(tenant)
        except ProblemError:
            return count
    raise AssertionError("there is no limit")


@pytest.mark.parametrize("mode", ["none", "keys"])
def test_shares_are_used_with_access_control(mode: str) -> None:
    limits = GatewayLimits.of(Settings(_env_file=None, auth=mode))
    for limiter, limit in ((limits.images, 32), (limits.uploads, 8), (limits.heat_maps, 2), (limits.event_streams, 64)):
        assert taken(limiter, "a") == (limit if mode == "none" else limit * 3 // 4)


def test_stream_that_the_client_left_before_its_start_is_not_counted() -> None:
    released = list[bool]()

    async def events() -> AsyncIterator[str]:
        yield "data: 1\n\n"

    async def disconnected() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None:
        await asyncio.sleep(30)

    stream = EventStream(events(), lambda: released.append(True))
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
    asyncio.run(stream(scope, disconnected, send))
    assert released == [True]


def test_stalled_calls_keep_no_others_waiting(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A storage and a database that neither answer nor refuse: more calls wait for them than a default pool has threads."""
    with service(tiny_bundle.location, tmp_path, max_downloads=40) as running, ThreadPoolExecutor(90) as callers:
        jobs, client, gate = running.jobs.datasets, running.client, threading.Event()
        stalled = {"storage": 0, "database": 0}
        dataset = running.wait(running.ask({"classes": {"benign": 1}}))["links"]["self"]
        url = f"{dataset}/files/README.md"
        content = client.get(url).content
        get = jobs.get

        @contextmanager
        def opened(*_: object) -> Iterator[io.BytesIO]:
            stalled["storage"] += 1
            gate.wait(60)
            yield io.BytesIO(content)

        def found(*arguments: Any) -> Any:
            stalled["database"] += 1
            gate.wait(60)
            return get(*arguments)

        try:
            with monkeypatch.context() as patch:
                patch.setattr(jobs, "open", opened)
                downloads = [callers.submit(client.get, url) for _ in range(40)]
                wait_for(lambda: stalled["storage"] == 40, 30)
                refused = client.get(url)
                assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
                assert refused.json()["type"] == "urn:dermis:problem:overloaded"
                assert client.head(url).status_code == 200
                patch.setattr(jobs, "get", found)
                reads = [callers.submit(client.get, dataset) for _ in range(40)]
                wait_for(lambda: stalled["database"] == 40, 30)
            ready = callers.submit(client.get, "/readyz")
            image = callers.submit(client.post, "/v1/images", json={"classes": {"benign": 1}})
            assert (ready.result(30).status_code, image.result(30).status_code) == (200, 200)
        finally:
            gate.set()
        assert {each.result(30).content for each in downloads} == {content}
        assert {each.result(30).status_code for each in reads} == {200}
        assert client.get(url).content == content


def test_gateways_of_one_process_count_separately() -> None:
    settings = Settings(_env_file=None, max_waiting_image_calls=1, max_event_streams=1)
    first, second = GatewayLimits.of(settings), GatewayLimits.of(settings)
    first.event_streams.acquire("a")
    second.event_streams.acquire("a")
    with first.images.hold("a"), second.images.hold("a"):
        for limiter in (first.images, second.images, first.event_streams):
            with pytest.raises(ProblemError):
                limiter.acquire("a")


def test_call_that_would_wait_too_long_is_refused_at_the_measured_rate() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(40):  # 16 images in 0.8 s; times without a call do not count
        with limiter.hold("a", 16):
            now += 0.8
        now += 5.0
    assert limiter.rate == pytest.approx(20.0, rel=0.02)
    with limiter.hold("a", 64):  # nothing is before it
        with pytest.raises(ProblemError) as refused:
            limiter.hold("a", 1).__enter__()
        assert (refused.value.kind, refused.value.headers) == ("overloaded", {"Retry-After": "2"})
        now += 3.2
    with limiter.hold("a", 36), limiter.hold("a", 1):  # just below two seconds
        now += 2.0
    with pytest.raises(ValueError, match="generator"), limiter.hold("a", 16):
        now += 1.0
        raise ValueError("generator")  # counts as time, not as images
    assert limiter.rate is not None and limiter.rate < 19.5


def test_wait_is_not_limited_before_the_rate_of_full_batches_is_known() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(1000):  # one image after another, each as slow as a batch of 32
        with limiter.hold("a", 1):
            now += 0.1
    with limiter.hold("a", 64), limiter.hold("a", 64), limiter.hold("a", 64):
        assert limiter.rate is None


def test_images_of_one_tenant_do_not_lock_out_another() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(40):
        with limiter.hold("a", 16):
            now += 0.8
    with ExitStack() as calls:
        calls.enter_context(limiter.hold("a", 64))
        with pytest.raises(ProblemError, match="64 images were requested before .64 by this tenant."):
            limiter.hold("a", 1).__enter__()
        calls.enter_context(limiter.hold("b", 1))  # has no other
        with pytest.raises(ProblemError, match="65 images were requested before .1 by this tenant."):
            limiter.hold("b", 1).__enter__()
    with limiter.hold("b", 1), limiter.hold("b", 1):
        pass


def test_calls_wait_less_where_the_queue_does_not_empty() -> None:
    now = 0.0
    limiter = WaitLimiter(5.0, clock=lambda: now)
    for _ in range(40):  # 20 images/s
        with limiter.hold("a", 16):
            now += 0.8
    with ExitStack() as calls:
        burst = calls.enter_context(ExitStack())
        for _ in range(6):  # 96 images are less than five seconds
            burst.enter_context(limiter.hold("a", 16))
        calls.enter_context(limiter.hold("a", 4))
        now += 4.8
        burst.close()
        calls.enter_context(limiter.hold("a", 16))  # one second
        now += 5.3
        with pytest.raises(
            ProblemError, match="20 images were requested before .20 by this tenant., .* than 1 seconds"
        ):
            limiter.hold("a", 1).__enter__()
        calls.enter_context(limiter.hold("b", 64))  # has no other
    with limiter.hold("a", 16), limiter.hold("a", 16), limiter.hold("a", 16):
        pass


def test_wait_is_limited_for_each_model() -> None:
    limits = GatewayLimits.of(Settings(_env_file=None))
    assert limits.image_wait("x") is limits.image_wait("x") is not limits.image_wait("y")
    assert GatewayLimits.of(Settings(_env_file=None)).image_wait("x") is not limits.image_wait("x")


def test_calls_of_few_images_correct_a_rate_that_was_low() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(20):  # a slow time: 4 images a second, so more than 8 waiting images are too many
        with limiter.hold("a", 16):
            now += 4.0

    def accepted() -> int:
        """The calls for 4 images that are accepted of 16 at one moment; each takes 20 ms."""
        nonlocal now
        number = 0
        with ExitStack() as calls:
            with suppress(ProblemError):
                for _ in range(16):
                    calls.enter_context(limiter.hold("a", 4))
                    number += 1
            now += 0.02 * number
        return number

    assert accepted() <= 3
    assert max(accepted() for _ in range(2000)) == 16


def test_comparison_limit_counts_accepted_comparisons_per_minute() -> None:
    now = 0.0
    limiter = MinuteLimiter(10, "images are compared", clock=lambda: now)
    limiter.add("a", 6)
    now = 20.0
    with pytest.raises(ProblemError) as refused:
        limiter.add("a", 5)
    assert refused.value.headers == {"Retry-After": "41"}
    limiter.add("b", 10)  # another tenant has a limit of its own
    limiter.add("a", 4)
    with pytest.raises(ProblemError) as refused:
        limiter.add("c", 11)
    assert refused.value.kind == "request-too-large" and not refused.value.headers  # it need not be repeated
    now = 60.0
    limiter.add("a", 6)
