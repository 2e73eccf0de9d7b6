"""Uploaded images: read within limits, decoded in other processes, and not written to a disk, logged or kept.

A body is multipart/form-data with one or more parts called `files`, or one image by itself. Starlette's own form parser
would write files above 1 MB to temporary files, so this module directly uses python-multipart, on which that parser is built.
It finds the parts of a body that is in memory and within the limit. File names and declared media types are ignored;
`dermis.image_reading` recognises images by their content.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from dermis.image_reading import FORMATS, ImageError, pixels_of_header
from dermis.imaging import Images
from services.gateway.bodies import read_bytes
from services.gateway.decoding import Decoder
from services.problems import FieldError, ProblemError, invalid_request
from services.settings import Settings

FIELD = "files"
MULTIPART = "multipart/form-data"
_MAX_CONTENT_TYPE = 1000
_KINDS = {"unsupported": "unsupported-media-type", "too-large": "image-too-large", "unusable": "unusable-image"}

# Pillow logs values of EXIF at DEBUG, python-multipart parts of a malformed body at WARNING.
logging.getLogger("PIL").setLevel(logging.WARNING)
logging.getLogger("python_multipart").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Limit:
    """The maximum number of images in a call.

    Attributes:
        images: The number.
        reason: Text for the message of a refusal, such as " with heat_map".
    """

    images: int
    reason: str = ""


class Uploads:
    """Reads uploads and decodes a limited number of images at the same time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(settings.upload_decoders, thread_name_prefix="dermis-decode")
        self._decoders = [Decoder(settings.upload_decode_seconds) for _ in range(settings.upload_decoders)]
        self._idle: SimpleQueue[Decoder] = SimpleQueue()
        for decoder in self._decoders:
            self._idle.put(decoder)

    async def images(
        self,
        request: Request,
        size: int,
        limit: Limit | None = None,
        admit: Callable[[int], Awaitable[None]] | None = None,
    ) -> list[Images]:
        """Read and decode the images of an upload. At most as many full-size images as decoders exist at one time.

        Args:
            request: The request.
            size: Side of the squares in px.
            limit: A lower limit than that of the settings.
            admit: Called with the number of pixels of all images together, as their headers state, before they are decoded.
                An exception ends the call.

        Returns:
            The largest centred square of each image, uint8 [size, size, 3], in order.

        Raises:
            ProblemError: The upload is not valid. The fields are `files[2]` for the third file, and `body` for an image that
                is the body.
        """
        files, names = await self._files(request, limit)
        if admit is not None:
            await admit(await asyncio.to_thread(self._pixels, files))
        loop = asyncio.get_running_loop()
        decode = [loop.run_in_executor(self._threads, self._decode, files, i, size) for i in range(len(files))]
        outcomes = await asyncio.gather(*decode, return_exceptions=True)
        refused: list[tuple[str, ImageError]] = []
        images: list[Images] = []
        for name, outcome in zip(names, outcomes, strict=True):
            if isinstance(outcome, ImageError):
                refused.append((name, outcome))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                images.append(outcome)
        if refused:
            raise _refusal(refused)
        return images

    def close(self) -> None:
        """End the threads and the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:
            decoder.interrupt()
        self._threads.shutdown(wait=True)
        for decoder in self._decoders:
            decoder.close()

    def _pixels(self, files: Sequence[bytes]) -> int:
        """The number of pixels that are about to be decoded. Larger images than the limit are refused, not decoded."""
        each = (pixels_of_header(data) for data in files)
        return sum(pixels for pixels in each if pixels <= self._settings.max_upload_pixels)

    def _decode(self, files: list[bytes], place: int, size: int) -> Images:
        data, files[place] = files[place], b""  # release the encoded bytes as soon as possible
        decoder = self._idle.get()  # there is one for each thread
        try:
            return decoder.decode(data, size, self._settings.max_upload_pixels)
        finally:
            self._idle.put(decoder)

    async def _files(self, request: Request, limit: Limit | None) -> tuple[list[bytes], list[str]]:
        """The encoded images of a request, and the name of each in problem documents."""
        header = request.headers.get("content-type")
        if header is not None and len(header) > _MAX_CONTENT_TYPE:  # parsing takes time in the square of its length
            raise ProblemError(
                "bad-request", f"the header Content-Type can have at most {_MAX_CONTENT_TYPE} characters"
            )
        kind, options = parse_options_header(header.encode("latin-1") if header else None)
        media_type = kind.decode("latin-1").strip().lower()
        if media_type != MULTIPART and not media_type.startswith("image/"):
            known = ", ".join(FORMATS.values())
            raise ProblemError(
                "unsupported-media-type",
                f"send {MULTIPART} with one part {FIELD} for each image, or one image with its Content-Type ({known})",
            )
        try:
            async with asyncio.timeout(self._settings.upload_timeout_seconds):
                body = await read_bytes(request, self._settings.max_upload_bytes)
        except TimeoutError:
            seconds = f"{self._settings.upload_timeout_seconds:g} s"
            raise ProblemError(
                "upload-timeout",
                f"the body did not arrive in {seconds}; send fewer images",
                headers={"Connection": "close"},
            ) from None
        if media_type != MULTIPART:
            return [body], ["body"]
        lowest = Limit(self._settings.max_upload_images)
        if limit is not None and limit.images < lowest.images:
            lowest = limit
        files = await asyncio.to_thread(_split, body, options.get(b"boundary", b""), lowest)
        if not files:
            raise invalid_request([FieldError(field=FIELD, message="send at least one image")])
        return files, [f"{FIELD}[{i}]" for i in range(len(files))]


def _refusal(refused: Sequence[tuple[str, ImageError]]) -> ProblemError:
    """One problem for all refused images; its kind is that of the first."""
    errors = [FieldError(field=name, message=str(error)) for name, error in refused[:20]]
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return ProblemError(_KINDS[refused[0][1].kind], f"{errors[0].field}: {errors[0].message}{more}", errors=errors)


def _split(body: bytes, boundary: bytes, limit: Limit) -> list[bytes]:
    """The contents of the parts `files` of a multipart body.

    Raises:
        ProblemError: The body is not multipart/form-data, has more parts than the limit, or parts of other names.
    """
    files: list[bytes] = []
    headers: list[list[bytes]] = []
    pieces: list[bytes] = []
    ended = False

    def begin() -> None:
        if len(files) == limit.images:
            images = "1 image is" if limit.images == 1 else f"{limit.images} images are"
            message = f"at most {images} taken in one call{limit.reason}; send several calls"
            errors = [FieldError(field=FIELD, message=message)]
            raise ProblemError("request-too-large", f"{FIELD}: {message}", errors=errors)
        headers.clear()
        pieces.clear()

    def header_begin() -> None:
        headers.append([b"", b""])

    def header_field(data: bytes, start: int, end: int) -> None:
        headers[-1][0] += data[start:end]

    def header_value(data: bytes, start: int, end: int) -> None:
        headers[-1][1] += data[start:end]

    def content(data: bytes, start: int, end: int) -> None:
        pieces.append(data[start:end])

    def headers_finished() -> None:
        fields = {name.lower(): value for name, value in headers}
        options = parse_options_header(fields.get(b"content-disposition"))[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != FIELD:
            message = f"unknown part; images go into parts called {FIELD}, options into the query"
            raise invalid_request([FieldError(field=name[:100] or "body", message=message)])

    def finish() -> None:
        files.append(b"".join(pieces))
        pieces.clear()

    def end() -> None:
        nonlocal ended
        ended = True

    malformed = f"the body is not {MULTIPART} with the boundary that Content-Type names"
    if not boundary:
        raise ProblemError("bad-request", f"Content-Type: {MULTIPART} needs a boundary; let your HTTP library set it")
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_header_begin": header_begin,
                "on_header_field": header_field,
                "on_header_value": header_value,
                "on_headers_finished": headers_finished,
                "on_part_data": content,
                "on_part_end": finish,
                "on_end": end,
            },
        )
        parser.write(body)
    except FormParserError:
        raise ProblemError("bad-request", malformed) from None
    if not ended:
        raise ProblemError("bad-request", f"{malformed}, or it ended early")
    return files
