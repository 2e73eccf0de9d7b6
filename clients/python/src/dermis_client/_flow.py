"""The engine of the client's operations: flows, which are written once and do no I/O themselves.

A flow is a generator. It yields effects (send a request, read a stream, sleep) and receives the result of each, or its
exception. `_transport.py` performs the effects with blocking or with asynchronous I/O; a test can perform them without
I/O and with its own clock. So retries, paging, waiting and resuming are each implemented once.

    def hello(max_retries: int) -> Flow[str]:
        response = yield from call(Request("GET", "/v1/hello"), max_retries)
        return response.text
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import httpx

from dermis_client import _retry, _status
from dermis_client._response_body import MAX_BYTES
from dermis_client._untrusted import load_json, one_line, without_query
from dermis_client.errors import APIConnectionError, APIResponseError, APIStatusError, APITimeoutError

T = TypeVar("T")
logger = logging.getLogger("dermis_client")
logger.addHandler(logging.NullHandler())  # the program decides what is shown


@dataclass(frozen=True)
class Request:
    """A request, independent of the HTTP client.

    Attributes:
        method: HTTP method.
        path: Path relative to the base URL.
        params: Query parameters.
        headers: Further headers.
        json: The JSON body, if any.
        files: (file name, content) of each part of a multipart form; every part has the field name "files".
        idempotent: Whether sending it twice has the same effect as sending it once.
        read_timeout: Seconds; None for the client's own timeout.
        max_bytes: Size limit of a response that is read as a whole.
    """

    method: str
    path: str
    params: Mapping[str, str | int] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    files: Sequence[tuple[str, bytes]] = ()
    idempotent: bool = True
    read_timeout: float | None = None
    max_bytes: int = MAX_BYTES

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True)
class Stream:
    """An open response whose body is read in pieces. `pieces` belongs to the transport."""

    response: httpx.Response
    pieces: Any


@dataclass(frozen=True)
class Send:
    """Send a request and read the whole body; the result is an httpx.Response."""

    request: Request


@dataclass(frozen=True)
class Open:
    """Send a request and leave the body unread, except that of an error; the result is a Stream."""

    request: Request


@dataclass(frozen=True)
class Read:
    """Read the next bytes of a body as they were sent; the result is bytes, b"" at the end."""

    stream: Stream


@dataclass(frozen=True)
class Close:
    """Close a stream early. The transport closes streams that are still open when the flow ends."""

    stream: Stream


@dataclass(frozen=True)
class Sleep:
    """Wait for a number of seconds."""

    seconds: float


@dataclass(frozen=True)
class Now:
    """Read a monotonic clock; the result is a float in seconds."""


@dataclass(frozen=True)
class Compute:
    """Call a function that may take long (hashing, disk), outside of the event loop if there is one."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Emit:
    """Give an item to the caller that iterates over the flow."""

    item: Any


Effect: TypeAlias = Send | Open | Read | Close | Sleep | Now | Compute | Emit
Flow: TypeAlias = Generator[Effect, Any, T]


@dataclass(frozen=True)
class Return:
    """The end of a flow, with its return value; see advance()."""

    value: Any


def advance(flow: Flow[Any], result: Any, failure: Exception | None) -> Effect | Return:
    """Resume a flow and return its next effect.

    Args:
        flow: The flow.
        result: The result of its last effect; None at the start.
        failure: The exception of its last effect, which is raised inside the flow; None if there was none.

    Returns:
        The next effect, or `Return` at the end of the flow.
    """
    try:
        return flow.send(result) if failure is None else flow.throw(failure)
    except StopIteration as end:
        return Return(end.value)


def recorded(flow: Flow[T], responses: list[httpx.Response]) -> Flow[T]:
    """Run a flow, and append each response that it reads as a whole to a list: successes, and see delete()."""
    with closing(flow):
        result: Any = None
        failure: Exception | None = None
        while not isinstance(step := advance(flow, result, failure), Return):
            result = failure = None
            try:
                result = yield step
            except Exception as error:
                failure = error
            else:
                gone = isinstance(step, Send) and step.request.method == "DELETE" and result.status_code == 404
                if isinstance(step, Send) and (result.is_success or gone):
                    responses.append(result)
        value: T = step.value
        return value


def sleep(seconds: float) -> Flow[None]:
    """Wait for a number of seconds."""
    yield Sleep(seconds)


def now() -> Flow[float]:
    """Return the seconds of a monotonic clock."""
    seconds: float = yield Now()
    return seconds


def compute(function: Callable[[], T]) -> Flow[T]:
    """Call a function that may take long and return its result."""
    result: T = yield Compute(function)
    return result


def read(stream: Stream) -> Flow[bytes]:
    """Return the next bytes of a stream, b"" at its end."""
    piece: bytes = yield Read(stream)
    return piece


def close(stream: Stream) -> Flow[None]:
    """Close a stream early."""
    yield Close(stream)


def call(request: Request, max_retries: int) -> Flow[httpx.Response]:
    """Send a request, with retries, and return the response with its whole body.

    Raises:
        APIStatusError: The response has an error status.
        APIConnectionError: There was no response (APITimeoutError: not in time).
    """
    response: httpx.Response = yield from _with_retries(Send(request), max_retries)
    return response


def delete(request: Request, max_retries: int) -> Flow[httpx.Response]:
    """Send a DELETE request, with retries, and return the response with its whole body. Raises the errors of call().

    A response of 404 is returned too if an earlier attempt may have been executed: it has deleted what is not there any more.
    """
    response: httpx.Response = yield from _with_retries(Send(request), max_retries, accept_gone=True)
    return response


def open_stream(request: Request, max_retries: int) -> Flow[Stream]:
    """Send a request, with retries, and return its open stream, for read(). Raises the errors of call()."""
    stream: Stream = yield from _with_retries(Open(request), max_retries)
    return stream


def _with_retries(effect: Send | Open, max_retries: int, accept_gone: bool = False) -> Flow[Any]:
    request, attempt = effect.request, 0
    executed = False  # whether an attempt may have been executed
    while True:
        failure: APIConnectionError | APIStatusError
        try:
            outcome = yield effect
        except httpx.RequestError as error:
            failure, retry = connection_error(error, request), _retry.after_error(error, request.idempotent)
            executed = executed or not _retry.after_error(error, idempotent=False)
        else:
            response = outcome.response if isinstance(outcome, Stream) else outcome
            logger.debug("%s: %d, request id %s", request, response.status_code, response.headers.get("X-Request-Id"))
            if response.is_success or (accept_gone and executed and response.status_code == 404):
                return outcome
            failure = _status.error_from(response)
            retry = _retry.after_status(response.status_code, request.idempotent, failure.kind)
            executed = executed or not _retry.after_status(response.status_code, idempotent=False, kind=failure.kind)
        delay = _retry.delay(attempt, failure.retry_after if isinstance(failure, APIStatusError) else None)
        if not retry or delay is None or attempt >= max_retries:
            raise failure
        attempt += 1
        logger.warning(
            "%s: attempt %d of %d follows in %.1f s: %s", request, attempt + 1, max_retries + 1, delay, failure
        )
        yield from sleep(delay)


def connection_error(error: httpx.RequestError, operation: Request | str) -> APIConnectionError:
    """Convert an error of httpx; it becomes the cause of the new one.

    Args:
        error: The error of httpx.
        operation: What was attempted, for the message.
    """
    try:
        url = without_query(error.request.url)
    except RuntimeError:  # httpx: the request was not set
        url = "the service"
    reason = one_line(str(error)) or type(error).__name__
    failure: APIConnectionError
    if isinstance(error, httpx.TimeoutException):
        failure = APITimeoutError(
            f"no response in time from {url} ({operation}: {reason}); if the service is busy, increase `timeout`"
        )
    elif isinstance(error, httpx.ConnectError) and "CERTIFICATE_VERIFY_FAILED" in reason:
        failure = APIConnectionError(
            f"the certificate of {url} is not accepted ({reason}); if an authority of your own issued it, set SSL_CERT_FILE to "
            "the certificate of that authority"
        )
    elif isinstance(error, httpx.ConnectError):
        failure = APIConnectionError(
            f"cannot reach {url} ({reason}); check that the service is running, and check base_url"
        )
    else:
        failure = APIConnectionError(f"the connection to {url} broke ({operation}: {reason})")
    failure.__cause__ = error
    return failure


def parse(response: httpx.Response, model: Callable[[Any], T]) -> T:
    """Parse a JSON body.

    Args:
        response: A response with its whole body.
        model: Converts the parsed JSON; raises ValueError if it is not as expected.

    Raises:
        APIResponseError: The body is not what a dermis service sends.
    """
    try:
        return model(load_json(response.content))
    except ValueError as error:  # json and pydantic both raise subclasses of ValueError
        reason = one_line(str(error))
        raise APIResponseError(
            f"{without_query(response.url)} sent a response that this client does not understand ({reason}); check base_url"
        ) from error
