"""Every operation of the client, written once, without I/O.

A flow is a generator: it yields what it wants done (send this request, read this stream, sleep) and receives the
outcome, or the exception, where it yielded. `_transport.py` runs a flow with blocking or with asynchronous I/O, and a
test can run it with no I/O at all and a clock of its own. So retries, paging, waiting and resuming exist in one place.

    def hello(api: Api[D]) -> Flow[str]:
        response = yield from call(Request("GET", "/v1/hello"), api.max_retries)
        return response.text
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import httpx

from dermis_client import _retry, _status
from dermis_client._answers import MOST_BYTES
from dermis_client._foreign import load_json, one_line
from dermis_client.errors import APIConnectionError, APIResponseError, APIStatusError, APITimeoutError
from dermis_client.models import DatasetRecord

T = TypeVar("T")
D = TypeVar("D", bound=DatasetRecord)


@dataclass(frozen=True)
class Request:
    """A request before it meets an HTTP client. path is relative to the base URL; read_timeout in seconds."""

    method: str
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    files: Sequence[tuple[str, bytes]] = ()  # sent as a form, each as a part called "files" under this file name
    idempotent: bool = True  # sending it twice does no more than sending it once
    read_timeout: float | None = None  # None: the client's own
    most: int = MOST_BYTES  # bytes of the answer, where it is read as a whole

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Stream:
    """An open answer whose body is read piece by piece. pieces belongs to the transport."""

    response: httpx.Response
    pieces: Any


@dataclass(frozen=True)
class Send:
    """Send and read the whole body -> httpx.Response."""

    request: Request


@dataclass(frozen=True)
class Open:
    """Send and leave the body to be read (an error's body is read) -> Stream."""

    request: Request


@dataclass(frozen=True)
class Read:
    """The next bytes of the body as they were sent -> bytes, b"" at the end."""

    stream: Stream


@dataclass(frozen=True)
class Close:
    """Close a stream early -> None. Streams still open when the flow ends are closed by the transport."""

    stream: Stream


@dataclass(frozen=True)
class Sleep:
    """Wait so many seconds -> None."""

    seconds: float


@dataclass(frozen=True)
class Now:
    """Seconds of a clock that only goes forward -> float."""


@dataclass(frozen=True)
class Compute:
    """Call a function that may take long (hashing, disk), off the event loop if there is one -> its result."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Emit:
    """Hand an item to whoever iterates -> None."""

    item: Any


Effect: TypeAlias = Send | Open | Read | Close | Sleep | Now | Compute | Emit
Flow: TypeAlias = Generator[Effect, Any, T]


@dataclass(frozen=True)
class Return:
    """The end of a flow, with its value; see advance()."""

    value: Any


def advance(flow: Flow[Any], answer: Any, failure: Exception | None) -> Effect | Return:
    """Go on to the flow's next effect with the outcome of the last one: an answer, or a failure raised inside it."""
    try:
        return flow.send(answer) if failure is None else flow.throw(failure)
    except StopIteration as end:
        return Return(end.value)


@dataclass(frozen=True)
class Api(Generic[D]):
    """What the flows need of their client. parse_dataset gives records bound to that client."""

    parse_dataset: Callable[[Any], D]
    max_retries: int


def sleep(seconds: float) -> Flow[None]:
    yield Sleep(seconds)


def now() -> Flow[float]:
    seconds: float = yield Now()
    return seconds


def compute(function: Callable[[], T]) -> Flow[T]:
    result: T = yield Compute(function)
    return result


def read(stream: Stream) -> Flow[bytes]:
    piece: bytes = yield Read(stream)
    return piece


def close(stream: Stream) -> Flow[None]:
    yield Close(stream)


def call(request: Request, max_retries: int) -> Flow[httpx.Response]:
    """Send until answered, with retries. Raises APIStatusError, APIConnectionError, APITimeoutError."""
    response: httpx.Response = yield from _answered(Send(request), max_retries)
    return response


def open_stream(request: Request, max_retries: int) -> Flow[Stream]:
    """Open until answered, with retries; the body is read by read(). Raises like call()."""
    stream: Stream = yield from _answered(Open(request), max_retries)
    return stream


def _answered(effect: Send | Open, max_retries: int) -> Flow[Any]:
    request, attempt = effect.request, 0
    while True:
        failure: APIConnectionError | APIStatusError
        try:
            answer = yield effect
        except httpx.RequestError as error:
            failure, retry = connection_error(error, request), _retry.after_error(error, request.idempotent)
        else:
            response = answer.response if isinstance(answer, Stream) else answer
            if response.is_success:
                return answer
            failure = _status.error_from(response)
            retry = _retry.after_status(response.status_code, request.idempotent)
        delay = _retry.delay(attempt, failure.retry_after if isinstance(failure, APIStatusError) else None)
        if not retry or delay is None or attempt >= max_retries:
            raise failure
        yield from sleep(delay)
        attempt += 1


def connection_error(error: httpx.RequestError, what: Request | str) -> APIConnectionError:
    """Our error for one of httpx's, chained to it."""
    try:
        url = str(error.request.url)
    except RuntimeError:  # httpx: the request was not set
        url = "the service"
    reason = one_line(str(error)) or type(error).__name__
    failure: APIConnectionError
    if isinstance(error, httpx.TimeoutException):
        failure = APITimeoutError(f"no answer in time from {url} ({what}: {reason}); is it busy? raise `timeout`")
    elif isinstance(error, httpx.ConnectError):
        failure = APIConnectionError(f"cannot reach {url} ({reason}); is the service running, is base_url right?")
    else:
        failure = APIConnectionError(f"the connection to {url} broke ({what}: {reason})")
    failure.__cause__ = error
    return failure


def parse(response: httpx.Response, model: Callable[[Any], T]) -> T:
    """The JSON body through `model`. Raises APIResponseError if it is not what a dermis service answers."""
    try:
        return model(load_json(response.content))
    except ValueError as error:  # json and pydantic both raise ValueErrors
        reason = one_line(str(error))
        raise APIResponseError(
            f"{response.url} gave an answer that this client does not understand ({reason}); is base_url right?"
        ) from error
