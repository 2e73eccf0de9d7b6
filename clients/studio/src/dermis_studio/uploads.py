"""Files of a visitor for the service: the body passes through the studio, which neither reads nor keeps it."""

from __future__ import annotations

import re

import httpx
from starlette.requests import Request
from starlette.responses import Response

from dermis_studio.access import Visitor
from dermis_studio.service import Service

MAX_BYTES = 48 << 20
_STUDY = re.compile(r"/studies/(st_[0-9a-f]{32})/images")


async def answer(service: Service, visitor: Visitor, path: str, request: Request) -> Response | None:
    """Pass an upload on, with the key of the visitor; None if the path takes none.

    Args:
        service: The service.
        visitor: Whose key is used.
        path: Path of the request below the prefix of the studio.
        request: The request, a form with images.
    """
    match = _STUDY.fullmatch(path)
    if match is None:
        return None
    headers = {"content-type": request.headers.get("content-type", "")}
    if visitor.key is not None:
        headers["authorization"] = f"Bearer {visitor.key}"
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BYTES:
            return _problem(413, "Too large", "Send fewer images at one time.")
    class_name = request.query_params.get("class")
    params = {} if class_name is None else {"class": class_name}
    url = f"{service.base_url}/v1/studies/{match[1]}/images"
    try:
        response = await service.http.post(url, params=params, headers=headers, content=body)
    except httpx.HTTPError as error:
        return _problem(503, "The service does not respond", f"{type(error).__name__}; try again.")
    media_type = response.headers.get("content-type", "application/json")
    return Response(response.content, response.status_code, {"Cache-Control": "no-store"}, media_type)


def _problem(status: int, title: str, detail: str) -> Response:
    content = httpx.Response(status, json={"title": title, "status": status, "detail": detail}).content
    return Response(content, status, {"Cache-Control": "no-store"}, "application/problem+json")
