"""The results of calls together with the responses of the service: `client.datasets.with_raw_response` and its like."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import httpx

P = ParamSpec("P")
T = TypeVar("T")


class RawResponse(Generic[T]):
    """The result of a call, and the responses from which it was made.

    Attributes:
        responses: The responses with a success status, in the order in which they arrived. Most calls have one; a call that
            uploads many images, for instance, has one for each of its requests. A deletion that was repeated after a lost
            response can have one with the status 404.
    """

    def __init__(self, result: T, responses: Sequence[httpx.Response]) -> None:
        self.responses = tuple(responses)
        self._result = result

    def parse(self) -> T:
        """Return what the call returns without `with_raw_response`. It was parsed and checked before."""
        return self._result

    @property
    def http_response(self) -> httpx.Response:
        """The last response, with its whole body."""
        return self.responses[-1]

    @property
    def status_code(self) -> int:
        """HTTP status of the last response."""
        return self.http_response.status_code

    @property
    def headers(self) -> httpx.Headers:
        """Headers of the last response. Upper and lower case are the same in their names."""
        return self.http_response.headers

    @property
    def request_id(self) -> str | None:
        """Id of the last request in the service's log, if the service sent one."""
        value: str | None = self.headers.get("X-Request-Id")
        return value

    @property
    def content(self) -> bytes:
        """Body of the last response."""
        return self.http_response.content

    def __repr__(self) -> str:
        kind = type(self._result).__name__
        return f"RawResponse(status_code={self.status_code}, request_id={self.request_id!r}, result={kind})"


def raw(method: Callable[P, T]) -> Callable[P, RawResponse[T]]:
    """Return a method of a resource that returns its result with the responses.

    Args:
        method: A method of a resource of the blocking client, whose constructor takes a transport.
    """

    @functools.wraps(method)
    def with_responses(*args: P.args, **kwargs: P.kwargs) -> RawResponse[T]:
        recorded, transport = _recorded(method)
        result = recorded(*args, **kwargs)
        return RawResponse(result, transport.end_recording())

    return with_responses


def async_raw(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, RawResponse[T]]]:
    """Return a coroutine method of a resource that returns its result with the responses; see `raw`."""

    @functools.wraps(method)
    async def with_responses(*args: P.args, **kwargs: P.kwargs) -> RawResponse[T]:
        recorded, transport = _recorded(method)
        result = await recorded(*args, **kwargs)
        return RawResponse(result, transport.end_recording())

    return with_responses


def _recorded(method: Callable[P, T]) -> tuple[Callable[P, T], Any]:
    """Return the method of a copy of its resource, and the transport of the copy, which records the responses."""
    resource: Any = method.__self__  # type: ignore[attr-defined]  # only methods of resources come here
    transport = resource._transport.recording()
    recorded: Callable[P, T] = getattr(type(resource)(transport), method.__name__)
    return recorded, transport
