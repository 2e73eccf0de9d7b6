"""Files of a visitor for the service: the body passes through the studio in pieces, which it neither reads nor keeps."""

from __future__ import annotations

import re

import httpx
from starlette.requests import Request
from starlette.responses import Response

from dermis_studio.access import Visitor
from dermis_studio.bodies import BodyLimiter, RefusedError, pieces, stated_length
from dermis_studio.service import Service

MAX_BYTES = 48 << 20
# A page sends one body after another. The service limits uploads too, but each that is passed on needs a connection to it.
MAX_UPLOADS = 8
MAX_UPLOADS_OF_A_KEY = 4
_STUDY = re.compile(r"/studies/(st_[0-9a-f]{32})/images")
_TOO_LARGE = f"At most {MAX_BYTES >> 20} MiB are sent at one time. Send fewer images, or smaller ones."


class Uploads:
    """Passes uploads on to the service.

    Args:
        service: The service.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._limiter = BodyLimiter(MAX_UPLOADS, MAX_UPLOADS_OF_A_KEY)

    async def answer(self, visitor: Visitor, path: str, request: Request) -> Response | None:
        """Pass an upload on, with the key of the visitor; None if the path takes none.

        Args:
            visitor: Whose key is used.
            path: Path of the request below the prefix of the studio.
            request: The request, a form with images.

        Raises:
            RefusedError: The upload is not passed on, or not to its end.
        """
        match = _STUDY.fullmatch(path)
        if match is None:
            return None
        if not visitor.may("studies"):
            raise RefusedError(403, "The key lacks the scope studies. Ask the operator of the service for one with it.")
        length = stated_length(request, MAX_BYTES, _TOO_LARGE)
        headers = {"content-type": request.headers.get("content-type", "")}
        if length is not None:
            headers["content-length"] = str(length)
        if visitor.key is not None:
            headers["authorization"] = f"Bearer {visitor.key}"
        class_name = request.query_params.get("class")
        params = {} if class_name is None else {"class": class_name}
        url = f"{self._service.base_url}/v1/studies/{match[1]}/images"
        with self._limiter.hold(visitor.key):
            body = pieces(request, MAX_BYTES, _TOO_LARGE)
            try:
                response = await self._service.http.post(url, params=params, headers=headers, content=body)
            except httpx.HTTPError as error:
                raise RefusedError(
                    503, f"The service does not respond ({type(error).__name__}). Try again in some seconds.", 5
                ) from None
        kept = {"Cache-Control": "no-store"}
        if (wait := response.headers.get("retry-after")) is not None:
            kept["Retry-After"] = wait
        media_type = response.headers.get("content-type", "application/json")
        return Response(response.content, response.status_code, kept, media_type)
