"""Tests of calls to another service: transient errors are distinguished from permanent ones."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from services import metrics
from services.errors import InferenceFailedError, InferenceMemoryError, InferenceUnavailableError
from services.inference.base import LACKS_MEMORY
from services.inference.connection import Connection, time_limit


class _Client:
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def generate(self, rows: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (aiohttp.ServerDisconnectedError(), InferenceUnavailableError),  # it died before it answered
        (aiohttp.ClientPayloadError("half"), InferenceUnavailableError),  # it died while it answered
        (ConnectionRefusedError(), InferenceUnavailableError),
        (TimeoutError(), InferenceUnavailableError),
        (ServiceUnavailable("full"), InferenceUnavailableError),
        (BentoMLException("wrong"), InferenceFailedError),
        (BentoMLException("memory", error_code=LACKS_MEMORY), InferenceMemoryError),
    ],
)
def test_lost_inference_service_is_reported_as_unavailable(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected, match="the generator"):
        asyncio.run(Connection(_Client(error), "the generator").call("generate", b""))


class _HangingClient:
    def __init__(self) -> None:
        self.called = asyncio.Event()

    async def explain(self) -> None:
        self.called.set()
        await asyncio.sleep(600)


def _observed_calls(outcome: str) -> float:
    histogram = metrics.inference_seconds.labels("explainer", "explain", outcome)
    return next(sample.value for sample in histogram._child_samples() if sample.name == "_count")


@pytest.mark.parametrize(
    ("ended_by", "outcome"), [("caller", "cancelled"), ("limit", "timeout"), ("inner limit", "timeout")]
)
def test_calls_that_callers_end_are_no_errors_of_the_service(ended_by: str, outcome: str) -> None:
    """The alert DermisInferenceErrors counts errors and time limits."""

    async def call() -> None:
        client = _HangingClient()
        connection = Connection(client, "the explainer")
        outer, inner = (0.01 if ended_by == name else 600 for name in ("limit", "inner limit"))
        async with time_limit(outer), time_limit(inner):
            task = asyncio.create_task(connection.call("explain"))
            await client.called.wait()
            if ended_by == "caller":
                task.cancel()
            await task

    before = {name: _observed_calls(name) for name in ("ok", "error", "timeout", "cancelled")}
    with pytest.raises(asyncio.CancelledError if ended_by == "caller" else TimeoutError):
        asyncio.run(call())
    assert {name: _observed_calls(name) - before[name] for name in before} == dict.fromkeys(before, 0) | {outcome: 1}
