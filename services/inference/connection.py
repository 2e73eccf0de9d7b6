"""Calls of inference services. Their errors say whether a service cannot be reached now or has failed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from aiohttp import ClientError
from bentoml.exceptions import BentoMLException, ServiceUnavailable

from services import metrics, tracing
from services.errors import (
    InferenceFailedError,
    InferenceMemoryError,
    InferenceUnavailableError,
    InferenceUnreachableError,
)

_DESCRIBE_SECONDS = 4.0  # less than the probes in k8s/base wait
_FRESH_SECONDS = 2.0
# A service that has not answered for so long needs a restart.
_LOST_SECONDS = 600.0
_limits: ContextVar[tuple[asyncio.Timeout, ...]] = ContextVar("limits", default=())


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[None]:
    """Limit the time of the calls in a `with` block. Calls that it ends are counted as `timeout`, not as `cancelled`.

    Raises:
        TimeoutError: They take longer.
    """
    async with asyncio.timeout(seconds) as limit:
        token = _limits.set((*_limits.get(), limit))
        try:
            yield
        finally:
            _limits.reset(token)


class Connection:
    """Calls one service. Use it on one event loop.

    Args:
        client: BentoML's asynchronous client of the service, which has a method `describe`; None if this replica does not
            run the service.
        name: The name of the service in messages, such as "the generator".
    """

    def __init__(self, client: Any, name: str) -> None:
        self.name = name
        self._short_name = name.removeprefix("the ").removesuffix(" service")
        self._client = client
        self._description: Mapping[str, Any] | None = None
        self._description_time = float("-inf")
        self._last_response = time.monotonic()

    async def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the service.

        Raises:
            InferenceUnavailableError: If this replica does not run the service.
            InferenceUnreachableError: If the service does not answer or is overloaded.
            InferenceMemoryError: If the service has too little memory for the call.
            InferenceFailedError: If the service failed.
        """
        if not self.exists:
            raise InferenceUnavailableError(
                f"this replica runs without {self.name}; send the request to one that has it"
            )
        started, outcome = time.perf_counter(), "error"
        try:
            with tracing.client_span(f"{self._short_name} {method}"):
                result = await getattr(self._client, method)(*arguments)
            outcome = "ok"
        except ServiceUnavailable:
            raise InferenceUnreachableError(f"{self.name} is overloaded; try again") from None
        except BentoMLException as error:
            if error.error_code == HTTPStatus.INSUFFICIENT_STORAGE:  # `services.inference.base.LACKS_MEMORY`
                raise InferenceMemoryError(f"{self.name} has too little memory for the call; try again") from None
            raise InferenceFailedError(f"{self.name} failed: {error}") from error
        # A service that ends in the middle of a response causes a ClientError, which is no OSError.
        except (ClientError, OSError, EOFError, TimeoutError) as error:
            raise InferenceUnreachableError(f"{self.name} does not answer; try again") from error
        except asyncio.CancelledError:
            outcome = "timeout" if any(limit.expired() for limit in _limits.get()) else "cancelled"
            raise
        finally:
            seconds = time.perf_counter() - started
            metrics.inference_seconds.labels(self._short_name, method, outcome).observe(seconds)
        self._last_response = time.monotonic()
        return result

    async def describe(self) -> Mapping[str, Any]:
        """The service's description of its models, at most a few seconds old.

        Raises:
            InferenceUnavailableError, InferenceFailedError: As for `call`.
        """
        now = time.monotonic()
        if self._description is None or now - self._description_time > _FRESH_SECONDS:
            self._description = await self.call("describe")
            self._description_time = now
        return self._description

    async def describe_soon(self) -> Mapping[str, Any] | None:
        """Call `describe`; return None if the service does not answer within the time of a probe."""
        try:
            async with time_limit(_DESCRIBE_SECONDS):
                return await self.describe()
        except (TimeoutError, InferenceUnavailableError, InferenceFailedError):
            return None

    @property
    def exists(self) -> bool:
        """Whether this replica runs the service."""
        return self._client is not None

    @property
    def not_alive(self) -> str | None:
        """Why only a restart can help; None if the service answered recently or may answer later."""
        if time.monotonic() - self._last_response < _LOST_SECONDS:
            return None
        return f"{self.name} has not answered for {_LOST_SECONDS:.0f} s"
