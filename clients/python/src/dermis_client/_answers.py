"""Read the body of an answer within bounds of size and time. No I/O.

A service may be broken or hostile, so nothing that it sends may take more memory or time than an answer of its kind needs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import httpx

from dermis_client._foreign import one_line
from dermis_client.errors import APIResponseError

MOST_BYTES = 16 << 20  # of an answer, unpacked, unless the request says otherwise
MOST_ERROR_BYTES = 1 << 20  # of an error's body; a longer one is no problem document and is left unread
SLOWEST = 1000.0  # bytes per second, after the client's timeout has passed


class Body:
    """Collects the body of one answer; `response()` is the answer with its whole body, as if httpx had read it."""

    def __init__(
        self, answer: httpx.Response, most: int, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """most: bytes allowed, unpacked. timeout: seconds after which it must arrive at `SLOWEST` or faster."""
        self._answer, self._clock, self._timeout = answer, clock, timeout
        self._most = most if answer.is_success else min(most, MOST_ERROR_BYTES)
        self._pieces: list[bytes] = []
        self._size, self._began = 0, clock()
        encoding = answer.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", "gzip", "x-gzip"} and answer.is_success:
            raise APIResponseError(f"{answer.url} gave an answer packed as {one_line(encoding, 100)}: not asked for")
        self._unpack = zlib.decompressobj(wbits=31) if encoding.endswith("gzip") else None
        self.wanted = True
        """False once the rest of the body need not be read."""

    def feed(self, piece: bytes) -> None:
        """Add the next bytes as they were sent. Raises APIResponseError, httpx.ReadTimeout."""
        if not self.wanted:
            return
        seconds = self._clock() - self._began
        if seconds > self._timeout + (self._size + len(piece)) / SLOWEST:
            raise httpx.ReadTimeout(
                f"less than {SLOWEST:.0f} bytes/s for {seconds:.0f} s", request=self._answer.request
            )
        if self._unpack is not None:
            try:
                piece = self._unpack.decompress(piece, self._most - self._size + 1)
            except zlib.error as error:
                self._refuse(f"cannot be unpacked ({error})")
                return
        self._size += len(piece)
        if self._size > self._most:
            self._refuse(f"is larger than {self._most >> 20} MiB")
            return
        self._pieces.append(piece)

    def _refuse(self, reason: str) -> None:
        """A success is refused; of an error answer its status says enough."""
        self._pieces.clear()
        self.wanted = False
        if self._answer.is_success:
            raise APIResponseError(f"{self._answer.url} gave an answer that {reason}; is base_url right?")

    def response(self) -> httpx.Response:
        headers = [
            (name, value)
            for name, value in self._answer.headers.multi_items()
            if name not in {"content-encoding", "content-length", "transfer-encoding"}
        ]
        kept = {name: self._answer.extensions[name] for name in ("reason_phrase",) if name in self._answer.extensions}
        return httpx.Response(
            self._answer.status_code,
            headers=headers,
            content=b"".join(self._pieces),
            request=self._answer.request,
            extensions=kept,
        )
