"""Read the body of a request within a limit."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from services.problems import ProblemError


async def read_bytes(request: Request, limit: int) -> bytes:
    """Read the body of a request, and keep at most `limit` bytes of it in memory.

    Raises:
        ProblemError: The body is larger, is encoded, or ends early.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ProblemError("unsupported-media-type", "send the body without a Content-Encoding")
    too_large = ProblemError("too-large", f"the body can have at most {limit} bytes", headers={"Connection": "close"})
    length = request.headers.get("content-length", "")
    if length.isdigit() and len(length) < 20 and int(length) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise ProblemError("bad-request", "the body ended early") from None
    return b"".join(chunks)
