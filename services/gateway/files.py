"""Responses with one file, with validators and ranges (RFC 9110, sections 13 and 14)."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import PurePosixPath
from typing import IO

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from services.gateway.threads import Threads
from services.jobs.context import FileInfo
from services.problems import ProblemError

OpenFile = Callable[[], AbstractContextManager[IO[bytes]]]

_CHUNK = 1 << 18
_RANGE = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*", re.IGNORECASE)
_MEDIA_TYPES = {
    ".zip": "application/zip",
    ".tar": "application/x-tar",
    ".parquet": "application/vnd.apache.parquet",
    ".csv": "text/csv; charset=utf-8",
    ".json": "application/json",
    ".html": "text/html; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".safetensors": "application/octet-stream",
}


def media_type_of(name: str) -> str:
    """The media type for the suffix of a file name."""
    return _MEDIA_TYPES.get(PurePosixPath(name).suffix.lower(), "application/octet-stream")


# The media types of files of a dataset or projection, without parameters.
MEDIA_TYPES = sorted({media_type.split(";")[0] for media_type in _MEDIA_TYPES.values()} | {"application/octet-stream"})


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range that a Range header names; None for the whole file.

    Several ranges, other units and malformed headers mean the whole file, as the RFC allows.

    Args:
        header: The header.
        size: Size of the file in bytes.

    Raises:
        ProblemError: The range is outside of the file.
    """
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or (not match[1] and not match[2]):
        return None
    if match[1]:
        start = int(match[1])
        stop = min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    else:
        start, stop = max(0, size - int(match[2])), size
    if start >= size or start >= stop:
        raise ProblemError(
            "range-not-satisfiable", f"the file has {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, stop


def etag_of(info: FileInfo) -> str:
    """The entity tag of a file."""
    return f'"{info.sha256}"'


def matches(header: str | None, etag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags contains `etag`.

    Args:
        header: The list of entity tags.
        etag: The entity tag of the file.
        weak: Whether the prefix W/ is ignored, as If-None-Match does and If-Range does not.
    """
    if header is None:
        return False
    tags = [tag.strip() for tag in header.split(",")]
    return etag in tags or (weak and (f"W/{etag}" in tags or "*" in tags))


def disposition_of(name: str, *, inline: bool = False) -> str:
    """The header Content-Disposition for a file: whether a browser shows it instead of saving it, and its name."""
    return f'{"inline" if inline else "attachment"}; filename="{name}"'


def file_response(
    info: FileInfo,
    headers: Mapping[str, str],
    open_file: OpenFile,
    threads: Threads,
    *,
    download: AbstractContextManager[None] | None = None,
    head: bool = False,
    inline: bool = False,
    more: Mapping[str, str] | None = None,
) -> Response:
    """The response to GET or HEAD of one immutable file.

    Args:
        info: The file.
        headers: Headers of the request.
        open_file: Opens the file.
        threads: The threads that open and read it.
        download: Entered for as long as content is sent; it can refuse that with a ProblemError.
        head: Whether to leave out the content.
        inline: Whether a browser shows the file instead of saving it.
        more: Further headers of the response.
    """
    etag = etag_of(info)
    common = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-transform",
        "X-Content-Type-Options": "nosniff",
        **(more or {}),
    }
    if matches(headers.get("if-none-match"), etag, weak=True):
        return Response(status_code=304, headers=common)
    requested = None
    if not head and ("if-range" not in headers or matches(headers["if-range"], etag, weak=False)):
        requested = byte_range(headers.get("range"), info.bytes)
    start, stop = requested or (0, info.bytes)
    common |= {"Content-Length": str(stop - start), "Content-Type": media_type_of(info.name)}
    common["Content-Disposition"] = disposition_of(info.name, inline=inline)
    if head:
        return Response(headers=common)
    if requested is not None:
        common["Content-Range"] = f"bytes {start}-{stop - 1}/{info.bytes}"
    status = 200 if requested is None else 206
    return _Download(_read(open_file, threads, start, stop), status, common, download or nullcontext())


class _Download(StreamingResponse):
    """A response that enters a context before its start, and leaves it at its end, also if the client has gone before."""

    def __init__(
        self,
        parts: AsyncIterator[bytes],
        status_code: int,
        headers: Mapping[str, str],
        download: AbstractContextManager[None],
    ) -> None:
        super().__init__(parts, status_code=status_code, headers=headers)
        self._download = download

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._download:
            await super().__call__(scope, receive, send)


async def _read(open_file: OpenFile, threads: Threads, start: int, stop: int) -> AsyncIterator[bytes]:
    with ExitStack() as stack:
        file = await threads.run(stack.enter_context, open_file())
        if start:
            await threads.run(file.seek, start)
        while start < stop:
            chunk = await threads.run(file.read, min(_CHUNK, stop - start))
            if not chunk:
                # An error breaks the connection, so that the client does not treat the incomplete file as complete.
                raise OSError("a file of the dataset is shorter than its manifest says")
            start += len(chunk)
            yield chunk
