"""Tests of the batches of the inference services: which calls are in one, and that failures stay in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import _bentoml_impl.server.app  # type: ignore[import-untyped]
import numpy as np
import pytest

import services.service  # noqa: F401  it makes BentoML use the dispatcher
from services.inference.dispatching import BatchDispatcher


class OverloadedError(Exception):
    """A call was refused."""


class Model:
    """Doubles the rows of a batch, as soon as `ready` is set. A row of -1 makes it fail."""

    def __init__(self, max_rows: int) -> None:
        def refuse() -> Any:
            raise OverloadedError

        self.batches: list[list[int]] = []
        self.ready = asyncio.Event()
        self.dispatcher = BatchDispatcher(10_000, max_rows, fallback=refuse, get_batch_size=len)
        self._call: Callable[[Any], Awaitable[Any]] = self.dispatcher(self._run)

    async def _run(self, batch: Any) -> list[Any]:
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


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


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


def test_bentoml_uses_the_dispatcher() -> None:
    assert _bentoml_impl.server.app.CorkDispatcher is BatchDispatcher
