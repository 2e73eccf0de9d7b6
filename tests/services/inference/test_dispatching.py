"""Tests of the batches of the inference services: which calls are in one, and that failures stay in it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import _bentoml_impl.server.app  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

import services.service  # noqa: F401  it makes BentoML use the dispatcher
from services import callers
from services.inference.base import batch_api, inference_service
from services.inference.dispatching import BatchDispatcher, measured_batch, shares

doubled: list[list[int]] = []
may_double = asyncio.Event()


@inference_service("Doubler", 1)
class Doubler:
    """A service that doubles rows, as soon as `may_double` is set."""

    @batch_api
    async def double(self, rows: np.ndarray) -> list[Any]:
        doubled.append(rows.tolist())
        await may_double.wait()
        return [int(2 * row) for row in rows]


class OverloadedError(Exception):
    """A call was refused."""


class Model:
    """Doubles the rows of a batch, as soon as `ready` is set. A row of -1 makes it fail."""

    def __init__(self, max_rows: int) -> None:
        def refuse() -> Any:
            raise OverloadedError

        self.batches: list[list[int]] = []
        self.ready = asyncio.Event()

        class Dispatcher(BatchDispatcher):
            """Learns apart from those of other tests."""

        self.dispatcher = Dispatcher(10_000, max_rows, fallback=refuse, get_batch_size=len)
        self._call: Callable[[Any], Awaitable[Any]] = self.dispatcher(self._run)

    async def _run(self, batch: Any) -> list[Any]:
        assert not callers.caller_has_disconnected(), "a batch is of several callers"
        self.batches.append([int(row) for rows in batch for row in rows])
        await self.ready.wait()
        if -1 in self.batches[-1]:
            raise ValueError("no such row")
        return [rows * 2 for rows in batch]

    def call(self, *rows: int) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self._call(np.array(rows)))


async def started(model: Model, batches: int) -> None:
    async with asyncio.timeout(10):
        while len(model.batches) < batches:
            await asyncio.sleep(0)


async def busy_model(max_rows: int) -> tuple[Model, asyncio.Task[Any]]:
    """A model that has begun a batch of the row 0, and this call."""
    model = Model(max_rows)
    first = model.call(0)
    await started(model, 1)
    return model, first


async def three_calls(model: Model) -> list[asyncio.Task[Any]]:
    """Waiting calls for three rows each: 10 to 12, 20 to 22, 30 to 32."""
    calls = [model.call(begin, begin + 1, begin + 2) for begin in (10, 20, 30)]
    await asyncio.sleep(0)
    return calls


class Request:
    """A request for an ASGI application whose caller closes the connection when `left` is set."""

    def __init__(self, app: Any, path: str = "", body: bytes = b"") -> None:
        self.left = asyncio.Event()
        self.answer: Any = None
        self._messages = [{"type": "http.request", "body": body}]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._messages:
            return self._messages.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message.get("body"):
            self.answer = json.loads(message["body"])


def request(model: Model, *rows: int) -> Request:
    """A call of a model in a request. Its answer is None if it has none."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        results = await model.call(*rows)
        await send({"type": "http.response.body", "body": json.dumps([int(row) for row in results]).encode()})

    return Request(callers.CallerMiddleware(app))


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(limited())


def test_calls_that_arrive_while_a_batch_runs_are_the_next_one() -> None:
    async def scenario() -> None:
        model = Model(max_rows=4)
        first = model.call(1)
        await started(model, 1)
        others = [model.call(*rows) for rows in ((2, 3), (4,), (5, 6, 7))]
        await asyncio.sleep(0)
        model.ready.set()
        results = [(await task).tolist() for task in (first, *others)]
        assert results == [[2], [4, 6], [8], [10, 12, 14]]
        assert model.batches == [[1], [2, 3, 4, 5], [6, 7]]  # a call that has no space is divided

    run(scenario())


def test_small_call_is_in_the_next_batch_beside_large_ones() -> None:
    async def scenario() -> None:
        model, first = await busy_model(max_rows=8)
        large = [model.call(*range(begin, begin + 20)) for begin in (100, 200)]
        await asyncio.sleep(0)
        small = model.call(1)
        await asyncio.sleep(0)
        model.ready.set()
        assert (await small).tolist() == [2] and (await first).tolist() == [0]
        assert not any(task.done() for task in large)
        for task, begin in zip(large, (100, 200), strict=True):
            assert (await task).tolist() == [2 * row for row in range(begin, begin + 20)]
        assert model.batches[1] == [100, 101, 102, 103, 104, 105, 106, 1]
        assert [len(batch) for batch in model.batches] == [1, 8, 8, 8, 8, 8, 1]

    run(scenario())


@pytest.mark.parametrize(
    ("age", "rows_of_large"), [(0, [1, 1, 1, 1, 1, 1]), (3, [2, 2, 2])]
)  # refused after ten seconds
def test_large_call_has_a_share_beside_small_ones_that_keep_coming(age: float, rows_of_large: list[int]) -> None:
    async def scenario() -> None:
        model, first = await busy_model(max_rows=4)
        large = model.call(*range(100, 106))
        await asyncio.sleep(0)
        model.dispatcher._queue[0].enqueue_time -= age
        small = [model.call(row) for row in range(1, 25)]
        await asyncio.sleep(0)
        model.ready.set()
        assert (await large).tolist() == [2 * row for row in range(100, 106)]
        assert [int((await task)[0]) for task in (first, *small)] == [2 * row for row in range(25)]
        batches = model.batches[1 : 1 + len(rows_of_large)]
        assert [sum(row >= 100 for row in batch) for batch in batches] == rows_of_large
        assert [len(batch) for batch in model.batches[1:]] == [4] * 7 + [2], "rows are free"

    run(scenario())


def test_oldest_call_is_in_each_batch() -> None:
    async def scenario() -> None:
        model, first = await busy_model(max_rows=2)
        calls = await three_calls(model)
        model.dispatcher._queue[2].enqueue_time -= 3  # seconds
        model.ready.set()
        for task, begin in zip(calls, (10, 20, 30), strict=True):
            assert (await task).tolist() == [2 * begin, 2 * begin + 2, 2 * begin + 4]
        await first
        assert model.batches == [[0], [30, 31], [32, 10], [11, 12], [20, 21], [22]]

    run(scenario())


def test_batches_are_kept_short_but_keep_the_device_busy() -> None:
    async def scenario() -> None:
        # Rows of a quarter of a second, in pairs, and at least four pairs.
        for seconds, size in ((None, 20), (1e-9, 20), (0.02, 12), (1.0, 8)):
            model = Model(max_rows=32)
            model.ready.set()
            dispatcher = type(model.dispatcher)
            dispatcher.busy_rows = 2
            if seconds is not None:
                dispatcher.measure([0], 1e-9)  # does not keep the device busy
                dispatcher.measure(["no such model"] * 10, 1e-9)
                dispatcher.measure([0] * 10, 10 * seconds)
            await model.call(*range(20))
            assert max(map(len, model.batches)) == size

    run(scenario())


def test_batch_that_completes_a_call_is_not_filled_with_parts_of_large_ones() -> None:
    async def scenario() -> None:
        model, first = await busy_model(max_rows=32)
        type(model.dispatcher).busy_rows = 2
        type(model.dispatcher).measure([0] * 10, 10.0)  # at most four rounds of two rows
        large = [model.call(*range(begin, begin + 20)) for begin in (100, 200)]
        await asyncio.sleep(0)
        small = model.call(1)
        await asyncio.sleep(0)
        model.ready.set()
        assert (await small).tolist() == [2]
        await asyncio.gather(first, *large)
        assert model.batches[1] == [100, 101, 102, 1]
        assert [len(batch) for batch in model.batches] == [1, 4, 8, 8, 8, 8, 5]

    run(scenario())


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), max_size=12),
    st.integers(1, 64),
    st.integers(1, 64),
    st.floats(0, 1),
)
def test_rows_of_a_batch_are_shared(calls: list[tuple[int, int]], most: int, filled: int, oldest: float) -> None:
    sizes = [remaining + computed for remaining, computed in calls]
    remaining = [rows for rows, _ in calls]
    taken = shares(sizes, remaining, most, filled, oldest)
    assert min(most, filled, sum(remaining)) <= sum(taken) <= most
    assert all(0 <= rows <= rest for rows, rest in zip(taken, remaining, strict=True))
    if sizes:
        assert taken[0] >= min(remaining[0], max(1, int(oldest * most))), "the oldest call could wait forever"
    others = sorted(zip(sizes[1:], remaining[1:], taken[1:], strict=True), key=lambda call: call[0])
    incomplete = [size for size, rest, rows in others if rows < rest]
    assert not any(rows for size, _, rows in others if incomplete and size > incomplete[0]), (
        "a call has rows before a smaller one has all"
    )


def test_shard_that_is_nearly_complete_does_not_delay_a_smaller_call() -> None:
    async def scenario() -> None:
        model, first = await busy_model(max_rows=4)
        shard = model.call(*range(100, 106))
        await asyncio.sleep(0)
        model.ready.set()
        await first
        model.ready.clear()
        await started(model, 2)
        four = model.call(1, 2, 3, 4)
        await asyncio.sleep(0)
        model.ready.set()
        assert (await four).tolist() == [2, 4, 6, 8]
        await shard
        assert model.batches == [[0], [100, 101, 102, 103], [104, 1, 2, 3], [105, 4]]

    run(scenario())


def test_rest_of_a_failed_call_is_not_computed() -> None:
    async def scenario() -> None:
        model = Model(max_rows=2)
        model.ready.set()
        with pytest.raises(ValueError, match="no such row"):
            await model.call(-1, 1, 2, 3, 4)
        assert (await model.call(5)).tolist() == [10]
        assert model.batches == [[-1, 1], [5]]

    run(scenario())


def test_failure_reaches_the_calls_of_its_batch_alone() -> None:
    async def scenario() -> None:
        model = Model(max_rows=4)
        model.ready.set()
        assert (await model.call(1)).tolist() == [2]
        failed = [model.call(-1), model.call(2)]
        for task in failed:
            with pytest.raises(ValueError, match="no such row"):
                await task
        assert (await model.call(3)).tolist() == [6]
        assert model.batches == [[1], [-1, 2], [3]]

    run(scenario())


def test_calls_that_have_waited_too_long_are_refused() -> None:
    async def scenario() -> None:
        model = Model(max_rows=4)
        first = model.call(1)
        await started(model, 1)
        late = model.call(2)
        await asyncio.sleep(0)
        model.dispatcher._queue[0].enqueue_time -= 11  # seconds
        model.ready.set()
        assert (await first).tolist() == [2]
        with pytest.raises(OverloadedError):
            await late
        assert (await model.call(3)).tolist() == [6]
        assert model.batches == [[1], [3]]

    run(scenario())


@pytest.fixture
def _watched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "_WATCH_AFTER_SECONDS", 0.0)


@pytest.mark.usefixtures("_watched_at_once")
def test_calls_whose_callers_have_disconnected_are_in_no_batch() -> None:
    async def scenario() -> None:
        model = Model(max_rows=2)
        first = request(model, 0)  # starts the task that makes the batches
        await started(model, 1)
        abandoned = request(model, 1, 2, 3)
        await asyncio.sleep(0.05)
        wanted = request(model, 4, 5)
        abandoned.left.set()
        first.left.set()
        await asyncio.gather(abandoned.task, first.task)
        model.ready.set()
        await wanted.task
        assert (first.answer, abandoned.answer, wanted.answer) == ([], [], [8, 10])
        assert model.batches == [[0], [4, 5]]

    run(scenario())


@pytest.mark.usefixtures("_watched_at_once")
def test_rest_of_a_call_whose_caller_has_disconnected_is_not_computed() -> None:
    async def scenario() -> None:
        model = Model(max_rows=2)
        abandoned = request(model, *range(10, 20))
        await started(model, 1)
        wanted = model.call(1)
        for batches in (2, 3):  # parts of parts
            model.ready.set()
            await started(model, batches)
            model.ready.clear()
        abandoned.left.set()
        await abandoned.task
        model.ready.set()
        assert (await wanted).tolist() == [2] and (await model.call(3)).tolist() == [6]
        assert model.batches == [[10, 11], [12, 1], [13, 14], [3]]

    run(scenario())


@pytest.mark.usefixtures("_watched_at_once")
def test_services_drop_requests_whose_callers_have_disconnected() -> None:
    async def scenario() -> None:
        app = Doubler.to_asgi(is_main=False)  # type: ignore[attr-defined]
        async with app.router.lifespan_context(app):

            def send(row: int) -> Request:
                return Request(app, "/double", json.dumps({"rows": [row]}).encode())

            first = send(1)
            while not doubled:
                await asyncio.sleep(0.01)
            abandoned, wanted = send(2), send(3)
            await asyncio.sleep(0.1)
            abandoned.left.set()
            await abandoned.task
            may_double.set()
            await asyncio.gather(first.task, wanted.task)
            assert (first.answer, abandoned.answer, wanted.answer) == ([2], [], [6])
            assert doubled == [[1], [3]]

    run(scenario())


def test_bentoml_uses_the_dispatcher() -> None:
    assert _bentoml_impl.server.app.CorkDispatcher is BatchDispatcher


def test_a_batch_of_a_service_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchDispatcher, "busy_rows", 2)
    monkeypatch.setattr(BatchDispatcher, "_seconds_per_row", None)

    def compute() -> list[int]:
        time.sleep(0.01)
        return [2, 4]

    assert measured_batch("doubler", 2, compute) == [2, 4]
    assert BatchDispatcher._seconds_per_row is not None and BatchDispatcher._seconds_per_row >= 0.005
    assert REGISTRY.get_sample_value("dermis_inference_batch_size_sum", {"inference_service": "doubler"}) == 2
