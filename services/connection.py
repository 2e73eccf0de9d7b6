"""A called service as the gateway sees it: a call may wait, may fail, and says which of the two it was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from aiohttp import ClientError
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from services.errors import InferenceFailedError, InferenceUnavailableError, InferenceUnreachableError

_DESCRIBE_SECONDS = 4.0  # less than the probes in k8s/dermis.yaml wait
_FRESH_SECONDS = 2.0
# A service that has been away for so long will not come back by itself.
_LOST_SECONDS = 600.0


class Connection:
    """Calls to one service through BentoML's asynchronous client. Use it on one event loop.

    The service has a method `describe`. `name` is what it is called in messages, as in "the generator".
    """

    def __init__(self, client: Any, name: str) -> None:
        self.name = name
        self._client = client
        self._described: Mapping[str, Any] | None = None
        self._described_at = float("-inf")
        self._seen = time.monotonic()

    async def call(self, method: str, *arguments: Any) -> Any:
        """The method's answer. InferenceUnavailableError or InferenceFailedError."""
        try:
            result = await getattr(self._client, method)(*arguments)
        except ServiceUnavailable:
            raise InferenceUnreachableError(f"{self.name} is overloaded; try again") from None
        except BentoMLException as error:
            raise InferenceFailedError(f"{self.name} failed: {error}") from error
        # A service that dies in the middle of an answer is a ClientError and no OSError.
        except (ClientError, OSError, EOFError, TimeoutError) as error:
            raise InferenceUnreachableError(f"{self.name} does not answer; try again") from error
        self._seen = time.monotonic()
        return result

    async def describe(self) -> Mapping[str, Any]:
        """What the service says of itself, not older than a few seconds. Errors as in `call`."""
        now = time.monotonic()
        if self._described is None or now - self._described_at > _FRESH_SECONDS:
            self._described = await self.call("describe")
            self._described_at = now
        return self._described

    async def describe_soon(self) -> Mapping[str, Any] | None:
        """As `describe`, or None if it does not answer in the time of a probe."""
        try:
            async with asyncio.timeout(_DESCRIBE_SECONDS):
                return await self.describe()
        except (TimeoutError, InferenceUnavailableError, InferenceFailedError):
            return None

    @property
    def not_alive(self) -> str | None:
        """Why only a restart can help; None if the service answered lately or may yet."""
        if time.monotonic() - self._seen < _LOST_SECONDS:
            return None
        return f"{self.name} has not answered for {_LOST_SECONDS:.0f} s"
