"""Read the body of a response within limits of size and time. No I/O.

A service may be broken or hostile, so a response must not take more memory or time than its kind needs.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

import httpx

from dermis_client._untrusted import one_line, without_query
from dermis_client.errors import APIResponseError

MAX_BYTES = 16 << 20  # maximum size of a decompressed body, unless the request sets another limit
# Maximum size of the body of an error; a longer one is not a problem document and is not read.
MAX_ERROR_BYTES = 1 << 20
MIN_SPEED = 1000.0  # minimum number of bytes per second, once the client's timeout has passed


class Body:
    """Collect the body of one response.

    Attributes:
        incomplete: False once the rest of the body need not be read.
    """

    def __init__(
        self, response: httpx.Response, max_bytes: int, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start to collect.

        Args:
            response: The response, whose body has not been read.
            max_bytes: Limit of the decompressed size.
            timeout: Seconds after which the body must have arrived at `MIN_SPEED` or faster.
            clock: Returns seconds.

        Raises:
            APIResponseError: The body has an encoding that was not requested.
        """
        self._response, self._clock, self._timeout = response, clock, timeout
        self._max_bytes = max_bytes if response.is_success else min(max_bytes, MAX_ERROR_BYTES)
        self._pieces: list[bytes] = []
        self._size, self._began = 0, clock()
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", "gzip", "x-gzip"} and response.is_success:
            raise APIResponseError(
                f"{without_query(response.url)} sent a response with the encoding {one_line(encoding, 100)}, which was not "
                "requested"
            )
        self._decompressor = zlib.decompressobj(wbits=31) if encoding.endswith("gzip") else None
        self.incomplete = True

    def feed(self, piece: bytes) -> None:
        """Add the next bytes as they were sent.

        Raises:
            APIResponseError: The body is too large or cannot be decompressed.
            httpx.ReadTimeout: The body arrives too slowly.
        """
        if not self.incomplete:
            return
        seconds = self._clock() - self._began
        if seconds > self._timeout + (self._size + len(piece)) / MIN_SPEED:
            raise httpx.ReadTimeout(
                f"less than {MIN_SPEED:.0f} bytes/s for {seconds:.0f} s", request=self._response.request
            )
        if self._decompressor is not None:
            try:
                piece = self._decompressor.decompress(piece, self._max_bytes - self._size + 1)
            except zlib.error as error:
                self._refuse(f"cannot be unpacked ({error})")
                return
        self._size += len(piece)
        if self._size > self._max_bytes:
            self._refuse(f"is larger than {self._max_bytes >> 20} MiB")
            return
        self._pieces.append(piece)

    def _refuse(self, reason: str) -> None:
        """Raise if the status is a success. For an error status, discard the body: the status is sufficient."""
        self._pieces.clear()
        self.incomplete = False
        if self._response.is_success:
            raise APIResponseError(f"{without_query(self._response.url)} sent a response that {reason}; check base_url")

    def response(self) -> httpx.Response:
        """Return the response with its whole decompressed body, as if httpx had read it."""
        headers = [
            (name, value)
            for name, value in self._response.headers.multi_items()
            if name not in {"content-encoding", "content-length", "transfer-encoding"}
        ]
        extensions = {
            name: self._response.extensions[name] for name in ("reason_phrase",) if name in self._response.extensions
        }
        return httpx.Response(
            self._response.status_code,
            headers=headers,
            content=b"".join(self._pieces),
            request=self._response.request,
            extensions=extensions,
        )
