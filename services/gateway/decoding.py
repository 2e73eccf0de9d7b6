"""Decode uploaded images in processes that can be killed, so that a malicious file cannot block a decoder.

`python -m services.gateway.decoding` is such a process. It reads requests from its standard input and writes the pixels, or the
reason why there are none, to its standard output. It does not write to a disk, and its messages are discarded.
"""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from typing import IO, cast, get_args

import numpy as np

from dermis.image_reading import ImageError, ImageErrorKind, read_image
from dermis.imaging import Images
from services.errors import InferenceUnavailableError
from services.parent_watchdog import exit_with_parent
from services.settings import REPOSITORY

logger = logging.getLogger("dermis.uploads")

_REQUEST = struct.Struct(">IQQ")  # side of the square, limit of pixels, number of bytes of the file, which follows
# 0 for pixels, 1 for "out of memory", otherwise 2 + number of an ImageErrorKind; then the number of bytes that follow
_RESPONSE = struct.Struct(">BQ")
_PIXELS, _NO_MEMORY, _FIRST_ERROR = 0, 1, 2
_ERROR_KINDS: tuple[ImageErrorKind, ...] = get_args(ImageErrorKind)
_START_SECONDS = 60.0  # time limit of the imports of the process, which can be slow on a busy machine


class Decoder:
    """One decoding process, which is started at the first call and after it has ended. Use it in one thread at a time.

    Args:
        seconds: Time limit for one image.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes, size: int, max_pixels: int) -> Images:
        """Call `dermis.image_reading.read_image` in the other process.

        Raises:
            ImageError: The image cannot be used, takes too long, or ends the process.
        """
        process = self._running()
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds, end)
        timer.daemon = True
        timer.start()
        try:
            code, payload = self._request(process, data, size, max_pixels)
        except (EOFError, OSError):
            self.close()
            if late.is_set():
                logger.warning("decoder killed because it took too long", extra={"seconds": self._seconds})
                message = f"takes longer than {self._seconds:g} s to decode; save it again as a plain PNG or JPEG"
                raise ImageError("unusable", message) from None
            logger.error("decoder ended by itself", extra={"status": process.returncode})
            raise ImageError("unusable", "cannot be decoded; it is damaged, save it again") from None
        except BaseException:
            self.close()  # the process is in the middle of a message
            raise
        finally:
            timer.cancel()
        if late.is_set():  # the response arrived just before
            self.close()
        if code == _NO_MEMORY:
            raise MemoryError
        if code != _PIXELS:
            raise ImageError(_ERROR_KINDS[code - _FIRST_ERROR], payload.decode())
        return np.frombuffer(payload, np.uint8).reshape(size, size, 3)

    def interrupt(self) -> None:
        """Kill the process, which ends a call of `decode` in another thread."""
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Kill the process. A further call of `decode` starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    cast(IO[bytes], pipe).close()
            process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "services.gateway.decoding"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        timer = threading.Timer(_START_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        started = cast(IO[bytes], process.stdout).read(1) == b"+"
        timer.cancel()
        self._process = process
        if not started:
            self.close()
            raise InferenceUnavailableError("the decoder of uploaded images cannot be started; try again")
        return process

    @staticmethod
    def _request(process: subprocess.Popen[bytes], data: bytes, size: int, max_pixels: int) -> tuple[int, bytes]:
        requests, responses = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        requests.write(_REQUEST.pack(size, max_pixels, len(data)))
        requests.write(data)
        requests.flush()
        code, length = _RESPONSE.unpack(_read(responses, _RESPONSE.size))
        return code, _read(responses, length)


def _read(pipe: IO[bytes], length: int) -> bytes:
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return data


def serve(requests: IO[bytes], responses: IO[bytes]) -> None:
    """Decode the images of `requests` until its end."""
    responses.write(b"+")
    responses.flush()
    with suppress(EOFError):
        while True:
            size, max_pixels, length = _REQUEST.unpack(_read(requests, _REQUEST.size))
            code, payload = _decode(_read(requests, length), size, max_pixels)
            responses.write(_RESPONSE.pack(code, len(payload)))
            responses.write(payload)
            responses.flush()


def _decode(data: bytes, size: int, max_pixels: int) -> tuple[int, bytes]:
    try:
        return _PIXELS, read_image(data, size=size, max_pixels=max_pixels).tobytes()
    except ImageError as error:
        return _FIRST_ERROR + _ERROR_KINDS.index(error.kind), str(error).encode()
    except MemoryError:
        return _NO_MEMORY, b""


def main() -> None:
    """Serve the process that started this one."""
    exit_with_parent()
    warnings.simplefilter("ignore")
    logging.disable()  # Pillow logs values of EXIF
    responses = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the output of a library must not be mixed with the responses
    serve(sys.stdin.buffer, responses)


if __name__ == "__main__":
    main()
