"""Run flows over httpx, blocking or asynchronous. No other module does network I/O."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import os
import platform
import queue
import ssl
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, aclosing, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeAlias, TypeVar, assert_never

import httpx

from dermis_client import _requests
from dermis_client._flow import (
    Close,
    Compute,
    Effect,
    Emit,
    Flow,
    Now,
    Open,
    Read,
    Request,
    Return,
    Send,
    Sleep,
    Stream,
    advance,
    recorded,
)
from dermis_client._response_body import Body
from dermis_client._untrusted import one_line
from dermis_client._version import __version__
from dermis_client.errors import DermisError, InvalidRequestError

T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)
CONNECT_TIMEOUT = 5.0  # seconds
MAX_REDIRECTS = 10
_HEADERS_FOR_OTHERS = frozenset({"accept", "accept-encoding", "connection", "host", "range", "user-agent"})
DEFAULT_BASE_URL = "http://127.0.0.1:3000"


# A blocking client needs a function that returns the token; an asynchronous client also takes a coroutine function.
TokenProvider: TypeAlias = Callable[[], str | Awaitable[str]]


@dataclass(frozen=True)
class ClientSettings:
    """The settings of a client.

    Attributes:
        base_url: Address of the service, without a trailing slash.
        api_key: Sent as a bearer token, if there is one.
        token_provider: Called before each request for the bearer token, in place of `api_key`.
        allow_plain_http: Whether credentials may be sent over http:// to another machine.
        timeout: Seconds that a single request may wait for a response.
        max_retries: Further attempts after a failed one.
        headers: Further headers of every request, by their names in lower case.
    """

    base_url: str
    api_key: str | None
    token_provider: TokenProvider | None
    allow_plain_http: bool
    timeout: float
    max_retries: int
    headers: dict[str, str]

    def __repr__(self) -> str:
        return f"base_url={self.base_url!r}, timeout={self.timeout:g}, max_retries={self.max_retries}"

    def changed(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        token_provider: TokenProvider | None = None,
        allow_plain_http: bool | None = None,
        timeout: float | None = None,
        max_retries: int | None = None,
        headers: Mapping[str, str | None] | None = None,
    ) -> ClientSettings:
        """Return the settings with other values; None leaves a value as it is.

        Args:
            base_url: See the attributes.
            api_key: In place of the credentials so far; "" for none.
            token_provider: In place of the credentials so far.
            allow_plain_http: See the attributes.
            timeout: See the attributes.
            max_retries: See the attributes.
            headers: Added to the headers so far; a value of None removes a header.

        Raises:
            InvalidRequestError: A value is not valid, or credentials would be sent over plain HTTP to another machine.
        """
        url = self.base_url if base_url is None else _requests.base_url_from(base_url)
        if api_key and token_provider is not None:
            raise InvalidRequestError("give either api_key or token_provider, not both")
        key, provider = self.api_key, self.token_provider
        if token_provider is not None:
            key, provider = None, token_provider
        elif api_key is not None:
            key, provider = api_key or None, None
        if key is not None:
            _requests.checked_token("api_key", key)
        allowed = self.allow_plain_http if allow_plain_http is None else allow_plain_http
        has_credentials = key is not None or provider is not None
        if has_credentials and url.lower().startswith("http:") and not (allowed or _requests.is_loopback(url)):
            raise InvalidRequestError(
                f"base_url: the API key or token would cross the network to {url} unencrypted; use https, or allow it "
                "with allow_plain_http=True (DERMIS_ALLOW_PLAIN_HTTP=true, --allow-plain-http)"
            )
        seconds = self.timeout if timeout is None else _requests.finite("timeout", timeout)
        retries = self.max_retries if max_retries is None else _requests.whole("max_retries", max_retries)
        if seconds <= 0 or retries < 0:
            raise InvalidRequestError("timeout must be above 0, max_retries at least 0")
        all_headers = self.headers | _requests.checked_headers(headers or {})
        kept = {name: value for name, value in all_headers.items() if value is not None}
        return ClientSettings(url, key, provider, allowed, seconds, retries, kept)


def settings(
    base_url: str | None,
    api_key: str | None,
    token_provider: TokenProvider | None,
    allow_plain_http: bool | None,
    timeout: float,
    max_retries: int,
    headers: Mapping[str, str] | None,
) -> ClientSettings:
    """Check the arguments of a client and fill in those of the environment.

    Raises:
        InvalidRequestError: A value is not valid, or credentials would be sent over plain HTTP to another machine.
    """
    if api_key is None and token_provider is None:
        api_key = os.environ.get("DERMIS_API_KEY")
    if allow_plain_http is None:
        allow_plain_http = os.environ.get("DERMIS_ALLOW_PLAIN_HTTP", "").lower() in {"1", "true", "yes", "on"}
    return ClientSettings(DEFAULT_BASE_URL, None, None, False, timeout, max_retries, {}).changed(
        base_url=base_url or os.environ.get("DERMIS_BASE_URL") or None,
        api_key=api_key,
        token_provider=token_provider,
        allow_plain_http=allow_plain_http,
        timeout=timeout,
        max_retries=max_retries,
        headers=headers,
    )


def _use_environment(settings: ClientSettings) -> bool:
    """Return whether proxies of the environment are used: never for this machine, where they would see the credentials."""
    return not _requests.is_loopback(settings.base_url)


@functools.lru_cache(maxsize=4)
def _ssl_context(places: tuple[tuple[Path, int], ...]) -> ssl.SSLContext:
    """The authorities of SSL_CERT_FILE, SSL_CERT_DIR or httpx. Reading them takes longer than all else of a new client.

    Args:
        places: Files and folders of the environment with the times of their last changes.
    """
    return httpx.create_ssl_context()


def _http_options(settings: ClientSettings) -> dict[str, Any]:
    try:  # the authorities of SSL_CERT_FILE are used also where the rest of the environment is not
        places = [Path(os.environ[name]) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        context = _ssl_context(tuple((path, path.stat().st_mtime_ns if path.exists() else 0) for path in places))
    except OSError as error:
        raise InvalidRequestError(f"SSL_CERT_FILE: no certificates of authorities can be read: {error}") from None
    return {"trust_env": _use_environment(settings), "verify": context}


def _build(
    http: httpx.Client | httpx.AsyncClient, settings: ClientSettings, request: Request, token: str | None
) -> httpx.Request:
    """Return a request of httpx.

    Raises:
        InvalidRequestError: It cannot be sent as it is.
    """
    body = None if request.json is None else _requests.json_body(request.json)
    headers = httpx.Headers(
        {
            "Accept": "application/json",
            "Accept-Encoding": "gzip",  # the encoding that Body decompresses within its limits
            "User-Agent": f"dermis-client/{__version__} python/{platform.python_version()}",
        }
    )
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    read = request.read_timeout or settings.timeout
    try:
        headers.update(settings.headers)
        headers.update(request.headers)
        return http.build_request(
            request.method,
            settings.base_url + request.path,
            params=request.params or None,
            headers=headers,
            json=body,
            files=[("files", (name, content)) for name, content in request.files] or None,
            timeout=httpx.Timeout(settings.timeout, connect=min(CONNECT_TIMEOUT, settings.timeout), read=read),
        )
    except (httpx.InvalidURL, TypeError, ValueError) as error:
        raise InvalidRequestError(f"{one_line(str(request))}: it cannot be sent ({one_line(str(error))})") from None


class _Redirects:
    """The redirects of one request.

    Only GET is followed: a redirected POST would become a GET. Once a redirect has led to another scheme, host or port, such
    as that of a storage, requests have no credentials, and no other headers of this client or of the caller's HTTP client. They
    have no If-Range either, which the service has compared: a storage has other ETags and would send the whole file.

    Attributes:
        auth: The argument `auth` of the next request.
    """

    def __init__(self, settings: ClientSettings, request: Request, url: httpx.URL) -> None:
        self._settings, self._request, self._origin = settings, request, _origin(url)
        self.auth: Any = httpx.USE_CLIENT_DEFAULT

    def following(self, response: httpx.Response) -> httpx.Request | None:
        """Return the request that a response asks for, if any."""
        following = response.next_request if self._request.method == "GET" else None
        if following is None:
            return None
        if _origin(following.url) != self._origin:
            self.auth = None
        if self.auth is None:
            kept = _HEADERS_FOR_OTHERS - self._settings.headers.keys()
            for name in [name for name in following.headers if name.lower() not in kept]:
                del following.headers[name]
        return following


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


@contextmanager
def _tls_errors(request: httpx.Request) -> Iterator[None]:
    """Raise errors of TLS after the handshake as httpx.ReadError: asynchronous connections of httpx let them through."""
    try:
        yield
    except ssl.SSLError as error:
        raise httpx.ReadError(str(error), request=request) from error


async def _no_pieces() -> AsyncIterator[bytes]:
    empty: tuple[bytes, ...] = ()
    for piece in empty:
        yield piece


class _Transport(Generic[H]):
    """The settings, the connections and the recorded responses of a transport."""

    _new_http: Callable[..., H]

    def __init__(self, settings: ClientSettings, http: H | None) -> None:
        self.settings = settings
        self.http: H = self._new_http(**_http_options(settings)) if http is None else http
        self._owned = http is None
        self._trusts_environment = _use_environment(settings) if http is None else None  # None: the caller's own client
        self._responses: list[httpx.Response] | None = None
        self._stop: threading.Event | None = None

    def with_settings(self, settings: ClientSettings) -> Self:
        """Return a transport with other settings and the same connections.

        It has connections of its own, which its close() closes, if the proxies of the environment are used for one of the
        addresses only.
        """
        if self._trusts_environment not in (None, _use_environment(settings)):
            other = type(self)(settings, None)
        else:
            other = type(self)(settings, self.http)
            other._trusts_environment = self._trusts_environment
        other._stop = self._stop
        return other

    def stopped_by(self, stop: threading.Event) -> Self:
        """Return a transport with the same connections whose flows end, with DermisError, when `stop` is set."""
        other = self.with_settings(self.settings)
        other._stop = stop
        return other

    def recording(self) -> Self:
        """Return a transport with the same connections that records the responses of its flows."""
        other = self.with_settings(self.settings)
        other._responses = []
        return other

    def end_recording(self) -> list[httpx.Response]:
        """Return the recorded responses, and record no others."""
        responses, self._responses = self._responses or [], None
        return responses


class SyncTransport(_Transport[httpx.Client]):
    """Runs flows in the calling thread. Several threads may share one transport."""

    _new_http = httpx.Client

    def close(self) -> None:
        """Close the HTTP client, unless the caller supplied it."""
        if self._owned:
            self.http.close()

    def run(self, flow: Flow[T], stop: threading.Event | None = None) -> T:
        """Run a flow to its end and return its value.

        Args:
            flow: The flow.
            stop: When set, the flow ends at its next effect, and a pause at once, with DermisError.
        """
        if self._responses is not None:
            flow = recorded(flow, self._responses)
        with closing(self._steps(flow, stop or self._stop)) as steps:
            value: T = next(step.value for step in steps if isinstance(step, Return))
            return value

    def iterate(self, flow: Flow[None]) -> Iterator[Any]:
        """Run a flow and yield the items that it emits. Leaving the loop early closes its streams."""
        with closing(self._steps(flow, self._stop)) as steps:
            for step in steps:
                if isinstance(step, Emit):
                    yield step.item

    def run_all(self, flows: Sequence[Flow[None]], parallel: int) -> None:
        """Run flows in up to `parallel` threads. The first failure, or Ctrl-C, stops all of them and is raised."""
        waiting: queue.SimpleQueue[Flow[None]] = queue.SimpleQueue()
        outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        stop = threading.Event()
        for flow in flows:
            waiting.put(flow)

        def work() -> None:
            while not stop.is_set():
                try:
                    self.run(waiting.get_nowait(), stop)
                except queue.Empty:
                    return
                except BaseException as error:
                    outcomes.put(error)
                else:
                    outcomes.put(None)

        # Daemon threads, so that a stalled connection does not keep the program running after Ctrl-C.
        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(parallel, len(flows)))]
        try:
            for thread in threads:
                thread.start()
            for _ in flows:
                if (failure := outcomes.get()) is not None:
                    raise failure
        finally:
            stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join(timeout=2.0)

    def _steps(self, flow: Flow[Any], stop: threading.Event | None) -> Generator[Emit | Return, None, None]:
        with ExitStack() as opened, closing(flow):
            result: Any = None
            failure: Exception | None = None
            while True:
                step = advance(flow, result, failure)
                if isinstance(step, Return):
                    yield step
                    return
                result = failure = None
                if isinstance(step, Emit):
                    yield step
                    continue
                if stop is not None and stop.is_set():
                    raise DermisError("stopped")
                try:
                    result = self._perform(step, opened, stop)
                except Exception as error:
                    failure = error

    def _token(self) -> str | None:
        provider = self.settings.token_provider
        if provider is None:
            return self.settings.api_key
        token = provider()
        if inspect.iscoroutine(token):
            token.close()
        return _requests.checked_token("token_provider", token)

    def _send(self, request: Request) -> httpx.Response:
        """Return the response with its body unread. Redirects are followed here: httpx would read each body completely."""
        built = _build(self.http, self.settings, request, self._token())
        redirects = _Redirects(self.settings, request, built.url)
        response = self.http.send(built, stream=True, follow_redirects=False)
        for count in itertools.count():
            if (following := redirects.following(response)) is None:
                return response
            response.close()
            if count == MAX_REDIRECTS:
                raise httpx.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects", request=response.request)
            response = self.http.send(following, stream=True, auth=redirects.auth, follow_redirects=False)
        raise AssertionError("unreachable: the loop returns or raises")

    def _read_whole(self, request: Request, response: httpx.Response) -> httpx.Response:
        if response.is_stream_consumed:  # the HTTP client had the whole body in memory, as test transports do
            return response
        body = Body(response, request.max_bytes, request.read_timeout or self.settings.timeout)
        for piece in response.iter_raw():
            body.feed(piece)
            if not body.incomplete:
                break
        return body.response()

    def _perform(self, effect: Effect, opened: ExitStack, stop: threading.Event | None) -> Any:
        match effect:
            case Send(request):
                with closing(self._send(request)) as response:
                    return self._read_whole(request, response)
            case Open(request):
                response = self._send(request)
                opened.callback(response.close)
                if not response.is_success:
                    return Stream(self._read_whole(request, response), iter(()))
                return Stream(response, response.iter_raw())
            case Read(stream):
                return next(stream.pieces, b"")
            case Close(stream):
                stream.response.close()
            case Sleep(seconds):
                if stop is None:
                    time.sleep(seconds)
                else:
                    stop.wait(seconds)
            case Now():
                return time.monotonic()
            case Compute(function):
                return function()
            case Emit():
                raise AssertionError("emitted items are handled by the caller")
            case _:
                assert_never(effect)
        return None


class AsyncTransport(_Transport[httpx.AsyncClient]):
    """Runs flows on the event loop; slow work on disk runs in threads."""

    _new_http = httpx.AsyncClient

    async def close(self) -> None:
        """Close the HTTP client, unless the caller supplied it."""
        if self._owned:
            await self.http.aclose()

    async def run(self, flow: Flow[T]) -> T:
        """Run a flow to its end and return its value."""
        if self._responses is not None:
            flow = recorded(flow, self._responses)
        async with aclosing(self._steps(flow)) as steps:
            async for step in steps:
                if isinstance(step, Return):
                    value: T = step.value
                    return value
        raise AssertionError("a flow ends with a value")

    async def iterate(self, flow: Flow[None]) -> AsyncIterator[Any]:
        """Run a flow and yield the items that it emits. Leaving the loop early closes its streams."""
        async with aclosing(self._steps(flow)) as steps:
            async for step in steps:
                if isinstance(step, Emit):
                    yield step.item

    async def run_all(self, flows: Sequence[Flow[None]], parallel: int) -> None:
        """Run up to `parallel` flows at a time. The first failure, or a cancellation, stops all of them and is raised."""
        waiting = iter(flows)

        async def work() -> None:
            for flow in waiting:
                await self.run(flow)

        tasks = [asyncio.create_task(work()) for _ in range(min(parallel, len(flows)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _steps(self, flow: Flow[Any]) -> AsyncGenerator[Emit | Return, None]:
        async with AsyncExitStack() as opened:
            opened.callback(flow.close)
            result: Any = None
            failure: Exception | None = None
            while True:
                step = advance(flow, result, failure)
                if isinstance(step, Return):
                    yield step
                    return
                result = failure = None
                if isinstance(step, Emit):
                    yield step
                    continue
                try:
                    result = await self._perform(step, opened)
                except Exception as error:
                    failure = error

    async def _token(self) -> str | None:
        provider = self.settings.token_provider
        if provider is None:
            return self.settings.api_key
        token = provider()
        return _requests.checked_token("token_provider", await token if inspect.isawaitable(token) else token)

    async def _send(self, request: Request) -> httpx.Response:
        """See SyncTransport._send."""
        built = _build(self.http, self.settings, request, await self._token())
        redirects = _Redirects(self.settings, request, built.url)
        with _tls_errors(built):
            response = await self.http.send(built, stream=True, follow_redirects=False)
        for count in itertools.count():
            if (following := redirects.following(response)) is None:
                return response
            await response.aclose()
            if count == MAX_REDIRECTS:
                raise httpx.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects", request=response.request)
            with _tls_errors(following):
                response = await self.http.send(following, stream=True, auth=redirects.auth, follow_redirects=False)
        raise AssertionError("unreachable: the loop returns or raises")

    async def _read_whole(self, request: Request, response: httpx.Response) -> httpx.Response:
        if response.is_stream_consumed:
            return response
        body = Body(response, request.max_bytes, request.read_timeout or self.settings.timeout)
        with _tls_errors(response.request):
            async for piece in response.aiter_raw():
                body.feed(piece)
                if not body.incomplete:
                    break
        return body.response()

    async def _perform(self, effect: Effect, opened: AsyncExitStack) -> Any:
        match effect:
            case Send(request):
                response = await self._send(request)
                try:
                    return await self._read_whole(request, response)
                finally:
                    await response.aclose()
            case Open(request):
                response = await self._send(request)
                opened.push_async_callback(response.aclose)
                if not response.is_success:
                    return Stream(await self._read_whole(request, response), _no_pieces())
                return Stream(response, response.aiter_raw())
            case Read(stream):
                with _tls_errors(stream.response.request):
                    return await anext(stream.pieces, b"")
            case Close(stream):
                await stream.response.aclose()
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Now():
                return asyncio.get_running_loop().time()
            case Compute(function):
                return await asyncio.to_thread(function)
            case Emit():
                raise AssertionError("emitted items are handled by the caller")
            case _:
                assert_never(effect)
        return None
