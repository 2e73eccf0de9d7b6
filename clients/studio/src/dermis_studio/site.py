"""The studio as an ASGI application: what is let through to Gradio, who may use it, and the page around it.

Gradio has many routes: uploads, files of the server, a proxy, a recorder of runs, an editor of its own program. The studio
needs few of them, and only these are reachable. Images travel in the messages of the pages, so nothing is uploaded to or
served from the disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack, nullcontext
from importlib.resources import files
from typing import Any
from urllib.parse import unquote_plus, urlsplit

from dermis_client import APIStatusError, DermisError
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from dermis_studio import bodies, frame, markup
from dermis_studio.access import COOKIE, MAX_KEY_LENGTH, Visitor, Visitors, key_of
from dermis_studio.bodies import BodyLimiter, RefusedError
from dermis_studio.downloads import Downloads, FileProblem
from dermis_studio.events import LARGE_BYTES, MAX_LARGE, EventQueue, Sessions, checked_session, session_of
from dermis_studio.service import Service
from dermis_studio.uploads import Uploads

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# An image of 32 MiB in base64, and the other inputs of a page.
MAX_BODY_BYTES = 48 << 20
MAX_CANCELLATION_BYTES = 16 << 10  # the end of an event: names only

_TOO_LARGE = f"A page sends at most {MAX_BODY_BYTES >> 20} MiB: choose a smaller image."
_STATIC = re.compile(r"/theme\.css|/assets/[\w.-]+|/static/(?:fonts|js)/[\w./-]+")
_APP_ID = "/gradio_api/app_id"  # pages ask for it after a restart
_STREAM = "/gradio_api/queue/data"
_JOIN = "/gradio_api/queue/join"
_CALLS = frozenset({_JOIN, "/gradio_api/cancel", "/gradio_api/reset"})
_OWN = {
    "studio.css": "text/css",
    "studio.js": "text/javascript",
    "embedding_map.js": "text/javascript",
    "projections.js": "text/javascript",
    "sending.js": "text/javascript",
    "study_upload.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_IMMUTABLE = b"max-age=31536000, immutable"  # the names of these files contain their hashes
_HASHED = re.compile(r"/assets/[\w.-]+-[\w-]{6,}\.\w+|/static/fonts/.*")

# What Gradio sends for a session that it does not know, for instance after a restart. It logs each as an error.
_NO_SESSION = {"msg": "unexpected_error", "message": "404: Not Found", "session_not_found": True, "success": False}

# No request leaves this host, whatever a page contains. Gradio compiles templates of components in the browser.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
_HEADERS = (
    (b"content-security-policy", CONTENT_SECURITY_POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
# Gradio would take its own address from the headers of a proxy, and allow every origin to read its answers.
_NOT_PASSED_ON = frozenset({b"origin", b"forwarded", b"x-gradio-server"})


class StudioSite:
    """The studio below a path.

    It must be started before it is called, on the event loop that calls it.

    Args:
        service: The service that the pages call.
        gradio: A FastAPI application in which the pages are mounted at `prefix`.
        prefix: The path, such as /studio.
        check_origin: Whether to refuse requests that pages of other sites cause. An application around it may do so already.
        hosts: With `check_origin`, the host names under which it answers, in addition to this machine's own.
        queue: Gradio's queue of events.
    """

    def __init__(
        self,
        service: Service,
        visitors: Visitors,
        gradio: FastAPI,
        prefix: str,
        *,
        check_origin: bool = False,
        hosts: frozenset[str] = frozenset(),
        queue: EventQueue | None = None,
    ) -> None:
        self._service = service
        self._visitors = visitors
        self._gradio = gradio
        self._prefix = prefix
        self._check_origin = check_origin
        self._hosts = hosts
        self._sessions = Sessions(queue)
        self._uploads = Uploads(service)
        self._downloads = Downloads(service)
        self._large_events = BodyLimiter(MAX_LARGE, MAX_LARGE // 2)
        self._stack = AsyncExitStack()

    async def start(self) -> None:
        """Start what the pages need."""
        await self._stack.enter_async_context(self._gradio.router.lifespan_context(self._gradio))

    async def stop(self) -> None:
        """Stop it."""
        await self._stack.aclose()
        await self._service.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        path = scope["path"].removeprefix(self._prefix)
        request = Request(scope, receive)
        send = _with_headers(send)
        refusal = self._refusal(request)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        response = await self._own(request, path)
        if response is not None:
            await response(scope, receive, send)
            return
        try:
            visitor = await self._visitors.find(key_of(request.cookies))
        except DermisError as error:
            response = _service_refused(request, error, self._prefix)
        else:
            response = await self._for_visitor(request, path, visitor, receive, send)
        if response is not None:
            await response(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        """The refusal of a request that a page of another site causes, or that uses another host name.

        An application around the studio may let pages of other origins call its API. They change nothing here: the cookie of
        the key would be theirs.
        """
        host = request.headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self._check_origin and not (is_local(name) or name in self._hosts):
            detail = (
                f"The studio does not answer as {name[:100]}; start it with --trusted-host {name[:100]} if it should."
            )
            return _answer_with_error(request, 421, "Another host name", detail, self._prefix)
        if request.method in {"GET", "HEAD"}:
            return None
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site")
        own = site in {None, "same-origin", "none"}
        if origin is not None and (
            self._check_origin or site is None
        ):  # over plain HTTP a browser sends the origin alone
            own = own and _is_at(origin, host)
        if own:
            return None
        title = "Other origins cannot change anything"
        detail = "A page of another site has sent this. Use the pages of the studio itself."
        return _answer_with_error(request, 403, title, detail, self._prefix)

    async def _own(self, request: Request, path: str) -> Response | None:
        """The response to a request that does not depend on the visitor; None for another request."""
        method = request.method
        if method not in {"GET", "HEAD", "POST"}:
            return JSONResponse({"title": "Method not allowed"}, 405, {"Allow": "GET, HEAD, POST"})
        if path == "":
            return RedirectResponse(f"{self._prefix}/", 308)
        name = path.removeprefix("/own/")
        if method != "POST" and name != path:
            if name not in _OWN:
                return _answer_with_error(request, 404, "Not found", "There is no such file.", self._prefix)
            content = files("dermis_studio").joinpath("assets", name).read_bytes()
            return Response(content, media_type=_OWN[name], headers={"Cache-Control": "max-age=300"})
        if method == "POST" and path == "/session":
            return await self._sign_in(request)
        if method == "POST" and path == "/sign-out":
            response = RedirectResponse(f"{self._prefix}/", 303)
            response.delete_cookie(COOKIE, path=self._prefix, httponly=True, samesite="strict")
            return response
        return None

    async def _sign_in(self, request: Request) -> Response:
        """Check a key, and keep it in a cookie of the session."""
        form = dict(part.split("=", 1) for part in (await _form(request, 3 * MAX_KEY_LENGTH)).split("&") if "=" in part)
        key, page = unquote_plus(form.get("key", "")).strip(), unquote_plus(form.get("page", ""))
        problem = ""
        if not key or len(key) > MAX_KEY_LENGTH:
            problem = "Enter an API key or access token" + (f" of at most {MAX_KEY_LENGTH} characters." if key else ".")
        else:
            try:
                if await self._visitors.find(key) is None:
                    problem = "The service does not accept this key: it is not known, has expired or was revoked."
            except DermisError as error:
                problem = str(error)
        if problem:
            return HTMLResponse(frame.sign_in_page(self._prefix, page, problem), 401, {"Cache-Control": "no-store"})
        target = page if page in {known.path for known in frame.PAGES} else ""
        response = RedirectResponse(f"{self._prefix}/{target}", 303)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, key, path=self._prefix, httponly=True, samesite="strict", secure=secure)
        return response

    async def _for_visitor(
        self, request: Request, path: str, visitor: Visitor | None, receive: Receive, send: Send
    ) -> Response | None:
        """Answer a request that needs a visitor. Returns the response, or None after Gradio has sent one."""
        method = request.method
        page = next((page for page in frame.PAGES if f"/{page.path}" == path), None)
        if method != "POST" and _STATIC.fullmatch(path) and ".." not in path:
            await self._to_gradio(request, receive, send, cached=bool(_HASHED.fullmatch(path)))
            return None
        if visitor is None:
            if page is not None and method != "POST":
                return HTMLResponse(
                    frame.sign_in_page(self._prefix, page.path, ""), headers={"Cache-Control": "no-store"}
                )
            return _answer_with_error(request, 401, "Sign in", "Sign in again: the key has ended.", self._prefix)
        if method == "POST":
            try:
                uploaded = await self._uploads.answer(visitor, path, request)
            except RefusedError as error:
                return _refused(request, "The upload is refused", error, self._prefix)
            if uploaded is not None:
                return uploaded
            if path not in _CALLS:
                return _answer_with_error(request, 404, "Not found", "There is no such path.", self._prefix)
            return await self._event(request, path, visitor, receive, send)
        if page is not None:
            if visitor.lacks(page.needs):
                first = frame.first_page(visitor)
                if page.path == "" and first is not None:  # where the address of the studio leads
                    return RedirectResponse(f"{self._prefix}/{first.path}", 303, {"Cache-Control": "no-store"})
                content = frame.forbidden_page(self._prefix, page, visitor)
                return HTMLResponse(content, 403, {"Cache-Control": "no-store"})
            return await self._page(request, page, visitor)
        if path == _APP_ID and method == "GET":
            await self._to_gradio(request, receive, send)
            return None
        if path == _STREAM and method == "GET":
            try:
                name = checked_session(request.query_params.get("session_hash"))
                if not self._sessions.knows(name):
                    return Response(
                        f"data: {json.dumps(_NO_SESSION)}\n\n", 200, {"Cache-Control": "no-store"}, "text/event-stream"
                    )
                with self._sessions.reading(name, visitor.key):
                    await self._to_gradio(request, receive, send)
            except RefusedError as error:
                return _refused(request, "The event is refused", error, self._prefix)
            return None
        try:
            download = await self._downloads.answer(visitor, path, request)
        except RefusedError as error:
            return _refused(request, "Too many downloads at the moment", error, self._prefix)
        if isinstance(download, FileProblem):
            problem = _answer_with_error(
                request, download.status, download.title, download.detail, self._prefix, download.remedy
            )
            problem.headers.update(download.headers)
            return problem
        if download is not None:
            return download
        return _answer_with_error(request, 404, "Not found", "The studio has no such page.", self._prefix)

    async def _event(
        self, request: Request, path: str, visitor: Visitor, receive: Receive, send: Send
    ) -> Response | None:
        """Pass an event of a page on, or the end of one, after a look at what it contains."""
        joins = path == _JOIN
        limit = MAX_BODY_BYTES if joins else MAX_CANCELLATION_BYTES
        try:
            length = bodies.stated_length(request, limit, _TOO_LARGE)
            large = (limit if length is None else length) > LARGE_BYTES
            with self._large_events.hold(visitor.key) if large else nullcontext():
                content = await bodies.read(request, limit, _TOO_LARGE)
            if joins:
                await self._sessions.admit(session_of(content), visitor.key, large=large)
        except RefusedError as error:
            return _refused(request, "The event is refused", error, self._prefix)
        await self._to_gradio(request, _replayed(content, receive), send)
        return None

    async def _page(self, request: Request, page: frame.Page, visitor: Visitor) -> Response:
        """A page of Gradio inside of the frame of the studio."""
        status, content = 500, bytearray()

        async def collect(message: Message) -> None:
            nonlocal status, content
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                content += message.get("body", b"")

        scope = {**request.scope, "method": "GET"}
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        await self._to_gradio(Request(scope), request.receive, collect)
        if status != 200:
            return _answer_with_error(request, 500, "The page cannot be shown", "See the log.", self._prefix)
        text = frame.framed(content.decode("utf-8"), self._prefix, page, visitor)
        return HTMLResponse(text, headers={"Cache-Control": "no-store"})

    async def _to_gradio(self, request: Request, receive: Receive, send: Send, *, cached: bool = False) -> None:
        """Pass a request on to Gradio."""
        scope = dict(request.scope)
        scope["headers"] = [
            (name, value)
            for name, value in scope["headers"]
            if name not in _NOT_PASSED_ON and not name.startswith(b"x-forwarded-")
        ]
        await self._gradio(scope, receive, _cacheable(send) if cached else send)


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if not name.startswith(b"access-control-") and name != b"server"
            ]
            names = {name for name, _ in kept}
            message["headers"] = [*kept, *((name, value) for name, value in _HEADERS if name not in names)]
        await send(message)

    return send_with_headers


def _cacheable(send: Send) -> Send:
    async def send_cacheable(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 200:
            kept = [pair for pair in message.get("headers", ()) if pair[0] != b"cache-control"]
            message["headers"] = [*kept, (b"cache-control", _IMMUTABLE)]
        await send(message)

    return send_cacheable


def _replayed(content: bytes, receive: Receive) -> Receive:
    """A `receive` that returns a body which was read before, and then what `receive` returns."""
    sent = False

    async def receive_again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": content, "more_body": False}

    return receive_again


async def _form(request: Request, limit: int) -> str:
    """The body of a small form; empty if it is larger than `limit` bytes, does not arrive or is not ASCII."""
    try:
        content = await bodies.read(request, limit, "")
    except RefusedError:
        return ""
    return content.decode("ascii", errors="ignore")


def is_local(name: str) -> bool:
    """Whether a host name or address is that of this machine."""
    return name in {"localhost", "::1"} or re.fullmatch(r"127(?:\.\d{1,3}){3}", name) is not None


def _is_at(origin: str, host: str) -> bool:
    """Whether an origin has this host and port. Behind a proxy that ends TLS, only the browser uses https."""
    scheme, _, authority = origin.partition("://")
    port = {"http": ":80", "https": ":443"}.get(scheme)
    return port is not None and authority.removesuffix(port) == host.removesuffix(port)


def _service_refused(request: Request, error: DermisError, prefix: str) -> Response:
    """The answer when the service does not say who a visitor is."""
    found = markup.explained(error)
    refused = error if isinstance(error, APIStatusError) else None
    status = 503 if refused is None else refused.status_code if refused.status_code in {429, 503} else 502
    response = _answer_with_error(request, status, found.title, found.detail, prefix, found.what_to_do)
    if refused is not None and refused.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, round(refused.retry_after)))
    return response


def _refused(request: Request, title: str, error: RefusedError, prefix: str) -> Response:
    response = _answer_with_error(request, error.status, title, error.detail, prefix)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    return response


def _answer_with_error(
    request: Request, status: int, title: str, detail: str, prefix: str, what_to_do: str = ""
) -> Response:
    """An error as a page for browsers that open it, and as JSON for scripts."""
    if "text/html" in request.headers.get("accept", ""):
        content = frame.error_page(prefix, title, detail, what_to_do)
        return HTMLResponse(content, status, {"Cache-Control": "no-store"})
    return Response(
        json.dumps({"title": title, "status": status, "detail": " ".join(filter(None, (detail, what_to_do)))}),
        status,
        {"Cache-Control": "no-store"},
        "application/problem+json",
    )
