"""Tests of the gateway's limits: refusal at the limit, release at the end, and separate counts for each gateway."""

from __future__ import annotations

import asyncio
import io
import math
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from starlette.requests import Request

from dermis.bundle import Bundle
from service_kit import service, wait_for
from services.gateway import events as events_module
from services.gateway.events import EventStream, progress_events
from services.gateway.limits import GatewayLimits, Limiter, MinuteLimiter, WaitLimiter
from services.gateway.sampling import generate_within_limits
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


def test_event_stream_reads_a_dataset_after_changes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An overloaded service has dozens of streams of queued datasets, which ask twice a second."""
    changes = [("queued", 0)] * 50 + [("running", 0)] * 50 + [("running", 4)] + [("succeeded", 8)]
    now = changes[0]
    reads = []

    def progress(_job_id: str) -> tuple[object, ...]:
        nonlocal now
        now = changes.pop(0)
        return now

    def job(*_: object) -> SimpleNamespace:
        reads.append(now)
        state, samples = now
        active = state in ("queued", "running")
        fields = {"state": state, "samples_done": samples, "shards_done": 0, "images_per_second": None}
        return SimpleNamespace(**fields, active=active, tenant="a", id="x")

    async def events() -> list[str]:
        jobs = SimpleNamespace(get=job, progress=progress, expires_at=lambda _: None)
        context: Any = SimpleNamespace(jobs=jobs, stopping=asyncio.Event())
        first: Any = job()
        return [event async for event in progress_events(context, first, AsyncMock())]

    monkeypatch.setattr(events_module, "POLL_SECONDS", 0)
    monkeypatch.setattr(events_module, "_event", lambda name, job, _: f"{name} {job.samples_done}")
    assert [event.removeprefix("retry: 2000\n") for event in asyncio.run(events())] == [
        "progress 0",
        "progress 0",
        "progress 4",
        "succeeded 8",
    ]
    assert reads == [("queued", 0), ("queued", 0), ("running", 0), ("running", 4), ("succeeded", 8)]


def test_images_for_a_sender_who_has_left_are_not_made() -> None:
    """The generator is busy: the call is cancelled there, no longer counted, and leaves its place to others."""
    ended: list[str] = []

    @asynccontextmanager
    async def counted(*_: object) -> AsyncIterator[None]:
        try:
            yield
        except ProblemError as problem:
            ended.append(problem.kind)
            raise

    async def generate() -> list[Any]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return []

    async def scenario() -> None:
        limits, left = GatewayLimits.of(Settings(_env_file=None, max_waiting_image_calls=1)), asyncio.Event()
        context: Any = SimpleNamespace(
            limits=limits,
            quotas=SimpleNamespace(counted=counted),
            settings=SimpleNamespace(image_timeout_seconds=60),
        )

        async def receive() -> dict[str, Any]:
            await left.wait()
            return {"type": "http.disconnect"}

        sender: Any = SimpleNamespace(tenant="a")
        bundle: Any = SimpleNamespace(digest="x")
        request = Request({"type": "http"}, receive)
        call = asyncio.create_task(generate_within_limits(context, request, sender, bundle, 4, generate))
        await asyncio.sleep(0.05)
        left.set()
        with pytest.raises(ProblemError, match="closed the connection"):
            await asyncio.wait_for(call, 10)
        with limits.images.hold("a"):
            pass

    asyncio.run(scenario())
    assert ended == ["cancelled", "bad-request"]


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


@contextmanager
def requested(limiter: WaitLimiter, tenant: str, images: int) -> Iterator[None]:
    """A call for images that no quota refuses."""
    with limiter.hold(tenant, images) as begin:
        begin()
        yield


def test_call_that_would_wait_too_long_is_refused_at_the_measured_rate() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(40):  # 16 images in 0.8 s; times without a call do not count
        with requested(limiter, "a", 16):
            now += 0.8
        now += 5.0
    assert limiter.rate == pytest.approx(20.0, rel=0.02)
    with requested(limiter, "a", 64):  # nothing is before it
        with pytest.raises(ProblemError) as refused:
            requested(limiter, "a", 1).__enter__()
        assert (refused.value.kind, refused.value.headers) == ("overloaded", {"Retry-After": "2"})
        now += 3.2
    with requested(limiter, "a", 36), requested(limiter, "a", 1):  # just below two seconds
        now += 2.0
    with pytest.raises(ValueError, match="generator"), requested(limiter, "a", 16):
        now += 1.0
        raise ValueError("generator")  # counts as time, not as images
    assert limiter.rate is not None and limiter.rate < 19.5


def test_wait_is_not_limited_before_the_rate_of_full_batches_is_known() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(1000):  # one image after another, each as slow as a batch of 32
        with requested(limiter, "a", 1):
            now += 0.1
    with requested(limiter, "a", 64), requested(limiter, "a", 64), requested(limiter, "a", 64):
        assert limiter.rate is None


def test_images_of_one_tenant_do_not_lock_out_another() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(40):
        with requested(limiter, "a", 16):
            now += 0.8
    with ExitStack() as calls:
        calls.enter_context(requested(limiter, "a", 64))
        with pytest.raises(ProblemError, match="64 images were requested before .64 by this tenant."):
            requested(limiter, "a", 1).__enter__()
        calls.enter_context(requested(limiter, "b", 1))  # has no other
        with pytest.raises(ProblemError, match="65 images were requested before .1 by this tenant."):
            requested(limiter, "b", 1).__enter__()
    with requested(limiter, "b", 1), requested(limiter, "b", 1):
        pass


class Generator:
    """A generator of 20 images per second, and calls for one image each of some tenants at a constant rate.

    Args:
        tenants: Their names.

    Attributes:
        waits: Time of each accepted call and the seconds that it took.
        refused: Time and Retry-After of each refused call.
    """

    def __init__(self, tenants: Sequence[str] = "abc") -> None:
        self.now, self._random, self._tenants = 0.0, random.Random(0), tenants
        self.limiter = WaitLimiter(5.0, clock=lambda: self.now)
        self._calls: deque[tuple[float, AbstractContextManager[None]]] = deque()
        self.waits: list[tuple[float, float]] = []
        self.refused: list[tuple[float, int]] = []
        for _ in range(40):
            with requested(self.limiter, "a", 16):
                self.now += 0.8

    def request(self, images: int = 1) -> None:
        """Request images with a call for each."""
        for _ in range(images):
            call = requested(self.limiter, self._random.choice(self._tenants), 1)
            try:
                call.__enter__()
            except ProblemError as refusal:
                self.refused.append((self.now, int(refusal.headers["Retry-After"])))
            else:
                self._calls.append((self.now, call))

    def run(self, seconds: float, rate: float) -> None:
        """Let time pass, with this number of calls per second."""
        due = 0.0
        for _ in range(round(20 * seconds)):
            self.now += 0.05
            if self._calls:
                began, call = self._calls.popleft()
                call.__exit__(None, None, None)
                self.waits.append((began, self.now - began))
            due += rate / 20
            self.request(int(due))
            due -= int(due)


@pytest.mark.parametrize("rate", [25, 40, 200])
def test_accepted_calls_stay_fast_while_more_is_requested_than_can_be_made(rate: float) -> None:
    generator = Generator()
    begin = generator.now
    generator.run(120, rate)
    overloaded = (
        begin + 5 * max(1, 10 / (rate - 20)) + 6
    )  # the queue that would be there is two and a half seconds long
    late = [wait for moment, wait in generator.waits if moment > overloaded]
    assert max(late) < 0.45, "twice the time of a fast call before them, which is a tenth of a second"
    assert len(late) == pytest.approx(20 * (generator.now - overloaded), rel=0.05), "the generator was idle"
    assert all(5 <= retry_after <= 6 for moment, retry_after in generator.refused if moment > overloaded)
    generator.run(16, 10)  # the overload has ended more than ten seconds ago
    refused = len(generator.refused)
    generator.request(60)  # three seconds
    generator.run(30, 16)
    assert len(generator.refused) == refused


def test_calls_stay_fast_also_if_many_tenants_have_one_each() -> None:
    generator = Generator([str(number) for number in range(20)])
    generator.run(60, 60)
    begin = generator.now
    generator.run(60, 60)
    late = sorted(wait for moment, wait in generator.waits if moment > begin)
    assert late[len(late) * 19 // 20] < 0.5, "with one call of each it would be a second"
    assert len(late) == pytest.approx(20 * 60, rel=0.05), "the generator was idle"


def test_tenant_that_requests_little_is_not_refused_in_an_overload() -> None:
    generator = Generator()
    for _ in range(60):
        generator.run(2, 60)
        with requested(generator.limiter, "modest", 1):
            pass
    assert generator.limiter.is_overloaded and generator.refused


@pytest.mark.parametrize("calm_seconds", [5, 300])
def test_tenant_that_comes_back_is_not_refused_at_the_begin_of_an_overload(calm_seconds: float) -> None:
    generator = Generator()
    generator.run(calm_seconds, 10)
    while not generator.limiter.is_overloaded:
        generator.run(0.5, 60)
    for _ in range(20):
        generator.run(0.5, 60)
        with requested(generator.limiter, "other", 1):
            pass


def test_calls_that_the_number_of_calls_refuses_are_load_too() -> None:
    limits = GatewayLimits.of(Settings(_env_file=None, max_waiting_image_calls=4))
    generator = Generator()
    limits = replace(limits, image_waits=cast(Any, SimpleNamespace(of=lambda digest: generator.limiter)))
    for calls_refused, seconds, overloaded in ((100, 0.1, False), (250, 0.025, True)):
        with ExitStack() as calls:
            for _ in range(4):
                calls.enter_context(limits.hold_images("a", "digest", 1))()
            for _ in range(calls_refused):
                generator.now += seconds
                with pytest.raises(ProblemError, match="too many calls"):
                    calls.enter_context(limits.hold_images("a", "digest", 1))
        assert generator.limiter.is_overloaded == overloaded


class BatchDevice:
    """A device that makes several images at once, and calls for one image each at a constant rate.

    Args:
        seconds: Time of a batch.
        more_seconds: Further time of a batch for each of its images.
        most: Images in the largest batch.

    Attributes:
        rate: Images per second in the largest batches.
        slowness: Factor of these times.
        waits: Seconds that each accepted call took.
    """

    def __init__(self, seconds: float, more_seconds: float, most: int) -> None:
        self._seconds, self._more_seconds, self._most = seconds, more_seconds, most
        self.rate, self.slowness = most / (seconds + most * more_seconds), 1.0
        self.now, self._due, self._random = 0.0, 0.0, random.Random(0)
        self.limiter = WaitLimiter(5.0, clock=lambda: self.now)
        self._calls: deque[tuple[float, AbstractContextManager[None]]] = deque()
        self.waits: list[float] = []

    def run(self, until: float, load: float) -> list[float]:
        """Let time pass, with this multiple of `rate` in calls per second. Return the sorted seconds of the accepted calls."""
        waits: list[float] = []
        while self.now < until:
            batch = [self._calls.popleft() for _ in range(min(self._most, len(self._calls)))]
            end = self.now + 0.01
            if batch:
                end = self.now + self.slowness * (self._seconds + len(batch) * self._more_seconds)
            while self._due <= end:
                self.now = max(self.now, self._due)
                call = requested(self.limiter, self._random.choice("abc"), 1)
                with suppress(ProblemError):
                    call.__enter__()
                    self._calls.append((self.now, call))
                self._due += 1 / (load * self.rate)
            self.now = end
            for began, call in batch:
                call.__exit__(None, None, None)
                waits.append(end - began)
        return sorted(waits)


@pytest.mark.parametrize(
    ("seconds", "more_seconds", "most", "load"), [(0.3, 0.0, 8, 2.0), (0.1, 0.01, 64, 2.0), (0.02, 0.04, 8, 4.0)]
)
def test_long_overload_uses_a_device_that_makes_several_images_at_once_and_calls_stay_fast(
    seconds: float, more_seconds: float, most: int, load: float
) -> None:
    device = BatchDevice(seconds, more_seconds, most)
    device.run(5, 1.2)
    device.run(150, load)
    for until in range(300, 901, 150):
        begun = device.now
        waits = device.run(until, load)
        assert device.limiter.is_overloaded
        assert len(waits) > 0.65 * device.rate * (device.now - begun)
        assert waits[len(waits) * 19 // 20] < 6 * (seconds + more_seconds), "much slower than a call without overload"


def test_device_that_becomes_slower_in_an_overload_is_used_further() -> None:
    device = BatchDevice(0.2, 0.02, 64)
    device.run(5, 1.2)
    device.run(200, 2.0)
    device.slowness = 4.0
    device.run(260, 2.0)
    waits = device.run(500, 2.0)
    assert len(waits) > 0.6 * device.rate / 4 * 240
    assert waits[len(waits) * 19 // 20] < 4.5


def test_jobs_yield_while_calls_wait() -> None:
    generator = Generator()
    assert not generator.limiter.is_busy
    generator.request(4)  # a fifth of a second
    assert not generator.limiter.is_busy
    generator.request(2)
    assert generator.limiter.is_busy and not generator.limiter.is_overloaded
    generator.run(1, 0)
    assert not generator.limiter.is_busy


def test_overload_ends_without_further_calls() -> None:
    generator = Generator()
    generator.run(60, 60)
    assert generator.limiter.is_overloaded
    generator.now += 1
    assert generator.limiter.is_overloaded
    generator.now += 2
    assert not generator.limiter.is_overloaded


def test_calls_stay_fast_if_hardly_more_is_requested_than_can_be_made() -> None:
    """The queue of the requested images becomes empty again and again."""
    generator, random_numbers = Generator(), random.Random(1)
    begin = generator.now
    for _ in range(300):
        generator.run(1, random_numbers.choice((12, 20, 32)))
    late = sorted(wait for moment, wait in generator.waits if moment > begin + 100)
    assert late[len(late) * 19 // 20] < 0.7
    assert len(late) > 0.85 * 20 * 200


def test_measured_rate_is_right_where_the_queue_is_hardly_long_enough() -> None:
    now, random_numbers = 0.0, random.Random(0)
    limiter = WaitLimiter(5.0, clock=lambda: now)
    calls: deque[AbstractContextManager[None]] = deque()
    for _ in range(3000):
        for _ in range(1 if len(calls) > 6 else 3 if len(calls) < 2 else random_numbers.choice((1, 2, 3))):
            now += 0.01  # so that many come just before the end of a batch
            calls.append(requested(limiter, "a", 4))
            with suppress(ProblemError):
                calls[-1].__enter__()
                continue
            calls.pop()
        now = math.ceil(now / 0.4 + 1e-6) * 0.4  # the end of a batch of 8 images
        for _ in range(min(2, len(calls))):
            calls.popleft().__exit__(None, None, None)
    assert limiter.rate == pytest.approx(20, rel=0.1)


def test_bursts_below_the_rate_of_the_generator_are_no_overload() -> None:
    generator = Generator()
    for _ in range(20):
        generator.request(90)
        generator.run(6, 4)
    assert not generator.refused
    assert max(wait for _, wait in generator.waits) > 4


def test_one_large_call_is_no_overload() -> None:
    generator = Generator()
    with requested(generator.limiter, "a", 200), requested(generator.limiter, "b", 1):
        generator.now += 6
        with pytest.raises(ProblemError, match="more than 5 seconds"):  # until the call before has ended
            requested(generator.limiter, "b", 1).__enter__()
    with requested(generator.limiter, "a", 64), requested(generator.limiter, "a", 1):
        generator.now += 3


def test_calls_that_a_quota_refuses_or_whose_callers_leave_are_no_load() -> None:
    generator = Generator()
    rate = generator.limiter.rate
    for _ in range(200):
        with suppress(KeyError), generator.limiter.hold("a", 64):
            generator.now += 0.1  # the database
            raise KeyError("quota")
    assert generator.limiter.rate == rate
    for _ in range(200):
        with suppress(KeyError), requested(generator.limiter, "a", 64):
            generator.now += 0.1
            raise KeyError("the caller has gone")
    assert generator.limiter.limit == 5
    with requested(generator.limiter, "b", 1), requested(generator.limiter, "b", 1):
        pass


def test_wait_is_limited_for_each_model() -> None:
    limits = GatewayLimits.of(Settings(_env_file=None))
    assert limits.image_waits.of("x") is limits.image_waits.of("x") is not limits.image_waits.of("y")
    assert GatewayLimits.of(Settings(_env_file=None)).image_waits.of("x") is not limits.image_waits.of("x")


def test_calls_of_few_images_correct_a_rate_that_was_low() -> None:
    now = 0.0
    limiter = WaitLimiter(2.0, clock=lambda: now)
    for _ in range(20):  # a slow time: 4 images a second, so more than 8 waiting images are too many
        with requested(limiter, "a", 16):
            now += 4.0

    def accepted() -> int:
        """The calls for 4 images that are accepted of 16 at one moment; each takes 20 ms."""
        nonlocal now
        number = 0
        with ExitStack() as calls:
            with suppress(ProblemError):
                for _ in range(16):
                    calls.enter_context(requested(limiter, "a", 4))
                    number += 1
            now += 0.02 * number
        now += 4.0  # less is requested than can be made
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
