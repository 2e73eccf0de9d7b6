"""Tests of calls to another service: transient errors are distinguished from permanent ones."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from services.errors import InferenceFailedError, InferenceUnavailableError
from services.inference.connection import Connection


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
    ],
)
def test_lost_inference_service_is_reported_as_unavailable(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected, match="the generator"):
        asyncio.run(Connection(_Client(error), "the generator").call("generate", b""))
