"""The bodies of requests: their size, the time in which they must arrive, and how many large ones are received at a time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

MAX_SECONDS = 120.0  # for a body to arrive; an image of 32 MiB as text needs 3 Mbit/s
RETRY_SECONDS = 5


class RefusedError(Exception):
    """A request that is not passed on.

    Attributes:
        status: Status of the answer.
        detail: What is wrong and what to do.
        retry_after: Seconds after which the request may be sent again; None if that would not help.
    """

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.retry_after = retry_after


class BodyLimiter:
    """Limits how many bodies are received or sent at the same time. Use it on one event loop.

    Args:
        limit: Bodies of all visitors.
        of_a_key: Bodies of one key. Without access control the visitors cannot be told apart, so they share `limit`.
        refusals: Messages for when `limit` is reached, and for when `of_a_key` is.
    """

    def __init__(self, limit: int, of_a_key: int, refusals: tuple[str, str] | None = None) -> None:
        self._limit, self._of_a_key = limit, of_a_key
        self._refusals = refusals or (
            "Others are sending images at the moment. Try again in some seconds.",
            f"{of_a_key} requests of this key send images already. Wait until they end.",
        )
        self._held: Counter[str | None] = Counter()

    @contextmanager
    def hold(self, key: str | None) -> Iterator[None]:
        """Count a body of a key for the time of a `with` block.

        Raises:
            RefusedError: There are too many at the moment.
        """
        if self._held.total() >= self._limit:
            raise RefusedError(503, self._refusals[0], RETRY_SECONDS)
        if key is not None and self._held[key] >= self._of_a_key:
            raise RefusedError(429, self._refusals[1], RETRY_SECONDS)
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]


def stated_length(request: Request, limit: int, too_large: str) -> int | None:
    """Return the length of a body that the header states; None if there is no such header.

    Args:
        request: The request.
        limit: The largest number of bytes that is accepted.
        too_large: What the visitor is told about a larger body.

    Raises:
        RefusedError: The body is larger than the limit, or the header is not a number.
    """
    text = request.headers.get("content-length")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise RefusedError(400, "The header Content-Length is not a number. Load the page again.")
    if int(text) > limit:
        raise RefusedError(413, too_large)
    return int(text)


async def pieces(request: Request, limit: int, too_large: str) -> AsyncIterator[bytes]:
    """Yield the body of a request as it arrives.

    Args:
        request: The request.
        limit: The largest number of bytes that is accepted.
        too_large: What the visitor is told about a larger body.

    Raises:
        RefusedError: The body is larger than the limit, does not arrive in time, or ends early.
    """
    deadline = asyncio.get_running_loop().time() + MAX_SECONDS
    stream = request.stream()
    size = 0
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                piece = await anext(stream, None)
        except TimeoutError:
            raise RefusedError(
                408, f"The images did not arrive within {MAX_SECONDS:.0f} seconds. Send fewer or smaller ones."
            ) from None
        except ClientDisconnect:
            raise RefusedError(400, "The request ended early. Send it again.") from None
        if piece is None:
            return
        size += len(piece)
        if size > limit:
            raise RefusedError(413, too_large)
        yield piece


async def read(request: Request, limit: int, too_large: str) -> bytes:
    """Return the body of a request. Raises the errors of `pieces`."""
    content = bytearray()
    async for piece in pieces(request, limit, too_large):
        content += piece
    return bytes(content)
