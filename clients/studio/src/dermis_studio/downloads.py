"""Files of the service for a visitor's browser, which has the key in a cookie that the service does not read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import httpx
from dermis_client.models import Problem
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dermis_studio import markup
from dermis_studio.access import Visitor
from dermis_studio.bodies import BodyLimiter
from dermis_studio.service import Service

_DATASET = r"ds_[0-9a-f]{32}"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}"
# Path of the studio -> path of the API.
_PATHS = (
    (re.compile(rf"/files/({_DATASET})/({_NAME})"), "/v1/datasets/{}/files/{}"),
    (re.compile(rf"/report/({_DATASET})"), "/v1/datasets/{}/report?format=html"),
    (re.compile(r"/study-answers/(st_[0-9a-f]{32})\.(csv|json)"), "/v1/studies/{}/answers?format={}"),
    (re.compile(rf"/projections/(pr_[0-9a-f]{{32}})/({_NAME})"), "/v1/projections/{}/files/{}"),
)
_ASKED = ("range", "if-range", "if-none-match", "accept-encoding")
_ANSWERED = (
    "content-type",
    "content-length",
    "content-encoding",
    "content-disposition",
    "content-range",
    "content-security-policy",
    "accept-ranges",
    "etag",
    "location",
    "vary",
)


MAX_PROBLEM_BYTES = 64 << 10
MAX_DOWNLOADS = 90  # at a time; the service's connections for files are 100
MAX_DOWNLOADS_OF_A_KEY = 30
_REFUSALS = (
    "Many files are being downloaded at the moment. Try again in some seconds.",
    f"{MAX_DOWNLOADS_OF_A_KEY} files are being downloaded with this key. Wait until one of them is complete, or stop one.",
)


@dataclass(frozen=True)
class FileProblem:
    """Why a file cannot be sent, for a page or for a script.

    Attributes:
        status: Status of the answer.
        title: Title of the problem.
        detail: What is wrong.
        remedy: What to do.
        headers: Headers of the service that the answer keeps.
    """

    status: int
    title: str
    detail: str
    remedy: str
    headers: Mapping[str, str] = field(default_factory=dict)


class Downloads:
    """Passes files of the service on.

    Args:
        service: The service.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limiter = BodyLimiter(MAX_DOWNLOADS, MAX_DOWNLOADS_OF_A_KEY, _REFUSALS)

    async def answer(self, visitor: Visitor, path: str, request: Request) -> Response | FileProblem | None:
        """Return a file of the service, as it is sent, or why there is none; None if the path is not one of a file.

        Args:
            visitor: Whose key is used.
            path: Path of the request below the prefix of the studio.
            request: The request.

        Raises:
            RefusedError: Too many files are being sent.
        """
        target = next((to.format(*match.groups()) for at, to in _PATHS if (match := at.fullmatch(path))), None)
        if target is None:
            return None
        async with AsyncExitStack() as stack:
            stack.enter_context(self._limiter.hold(visitor.key))
            try:
                response = await self._ask(visitor, target, request)
            except httpx.HTTPError as error:
                detail = f"No file was sent ({type(error).__name__})."
                return FileProblem(503, "The service does not respond", detail, markup.remedy(503))
            stack.push_async_callback(response.aclose)
            if response.is_error:
                return await _problem_of(response)
            kept = {name: value for name in _ANSWERED if (value := response.headers.get(name)) is not None}
            # What a dataset contains is shown as the service sends it, and never as a page of the studio.
            kept.setdefault("content-security-policy", "default-src 'none'; sandbox")
            # The service forbids to keep answers with the truth and images of patients; a signed address ends.
            no_store = "location" in kept or "no-store" in response.headers.get("cache-control", "").lower()
            kept["Cache-Control"] = "no-store" if no_store else "private, no-cache"
            return _Download(response, kept, stack.pop_all())

    async def _ask(self, visitor: Visitor, target: str, request: Request) -> httpx.Response:
        """Ask the service for a file, whose content is read later."""
        headers = {name: value for name in _ASKED if (value := request.headers.get(name)) is not None}
        headers.setdefault("accept-encoding", "identity")
        if visitor.key is not None:
            headers["authorization"] = f"Bearer {visitor.key}"
        http = self._service.files
        asked = http.build_request(request.method, self._service.base_url + target, headers=headers)
        response = await http.send(asked, stream=True, follow_redirects=False)
        if response.status_code == 307 and target.endswith("/preview.png"):
            # To a signed address of the storage, from which a page may not show images. No credentials are sent there.
            await response.aclose()
            signed = http.build_request(request.method, response.headers["location"])
            response = await http.send(signed, stream=True, follow_redirects=False)
        return response


class _Download(StreamingResponse):
    """A file that is passed on. `ends` is closed after its last byte, and when the visitor has left before."""

    def __init__(self, response: httpx.Response, headers: Mapping[str, str], ends: AsyncExitStack) -> None:
        super().__init__(response.aiter_raw(), response.status_code, headers)
        self._ends = ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._ends:
            await super().__call__(scope, receive, send)


async def _problem_of(response: httpx.Response) -> FileProblem:
    """What an answer says of the error; it is not trusted to be a problem document."""
    content = bytearray()
    try:
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > MAX_PROBLEM_BYTES:
                break
    except httpx.HTTPError:
        content.clear()
    finally:
        await response.aclose()
    try:
        found = Problem.model_validate_json(bytes(content))
    except ValueError:
        found = Problem()
    wait = response.headers.get("retry-after")
    seconds = float(wait) if wait is not None and wait.isascii() and wait.isdigit() else None
    detail = found.detail or f"It answered with status {response.status_code}."
    headers = {name: value for name in ("retry-after", "content-range") if (value := response.headers.get(name))}
    title = found.title or "The service did not send the file"
    return FileProblem(response.status_code, title, detail, markup.remedy(response.status_code, seconds), headers)


MAX_BYTES = 64 << 20


async def projection_file(service: Service, key: str | None, projection_id: str, name: str) -> bytes:
    """Return a file of a projection. The SDK writes such files to a folder only.

    Raises:
        ExplainedError: The service does not send it.
        ValueError: It cannot be fetched for another reason.
    """
    path = f"/projections/{projection_id}/{name}"
    pattern, target = _PATHS[-1]
    match = pattern.fullmatch(path)
    if match is None:
        raise ValueError("the service named a file that the studio does not know")
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    content = bytearray()
    try:
        async with service.http.stream(
            "GET", service.base_url + target.format(*match.groups()), headers=headers
        ) as response:
            if response.status_code != 200:
                found = await _problem_of(response)
                raise markup.ExplainedError(found.title, found.detail, found.remedy)
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MAX_BYTES:
                    raise ValueError("the file is too large to be shown; download it")
    except httpx.HTTPError as error:
        raise ValueError(f"the service does not respond ({type(error).__name__}); try again") from None
    return bytes(content)
