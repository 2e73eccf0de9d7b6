"""Tests of decoding uploads in separate processes: a file that takes too long is refused, and the next one is read."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dermis.image_reading import MAX_PIXELS, ImageError, read_image
from pictures import BAD, picture, scans
from services.gateway import decoding
from services.gateway.decoding import Decoder


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder(60)
    yield made
    made.close()


def test_decoder_gives_same_pixels_and_errors_as_library(decoder: Decoder) -> None:
    for data in (picture(), picture("JPEG"), picture("WEBP")):
        assert (decoder.decode(data, 16, MAX_PIXELS) == read_image(data, size=16)).all()
    for make, _, _ in BAD.values():
        data = make()
        with pytest.raises(ImageError) as expected:
            read_image(data, size=16, max_pixels=100_000)
        with pytest.raises(ImageError) as caught:
            decoder.decode(data, 16, 100_000)
        assert (caught.value.kind, str(caught.value)) == (expected.value.kind, str(expected.value))


def test_slow_upload_is_refused_and_next_upload_is_decoded() -> None:
    decoder = Decoder(0.1)
    slow = scans(90, Image.new("RGB", (5000, 5000)))
    decoder._running()  # importing does not count
    try:
        started = time.monotonic()
        with pytest.raises(ImageError, match=r"longer than 0\.1 s") as caught:
            decoder.decode(slow, 16, MAX_PIXELS)
        assert caught.value.kind == "unusable" and time.monotonic() - started < 30
        decoder._seconds = 60
        assert decoder.decode(picture(), 16, MAX_PIXELS).shape == (16, 16, 3)
    finally:
        decoder.close()


def test_ended_decoder_process_is_restarted(decoder: Decoder) -> None:
    assert decoder.decode(picture(), 16, MAX_PIXELS).shape == (16, 16, 3)
    first = decoder._running()
    first.kill()
    first.wait()
    assert decoder.decode(picture(), 16, MAX_PIXELS).shape == (16, 16, 3)
    assert decoder._running().pid != first.pid


def test_upload_that_ends_decoder_process_is_refused(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    dying = "import os, sys; os.write(1, b'+'); sys.stdin.buffer.read(20); os._exit(9)"
    popen = subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        return popen([sys.executable, "-c", dying], **options)  # type: ignore[call-overload]

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", start)
        with pytest.raises(ImageError, match="damaged"):
            decoder.decode(picture(), 16, MAX_PIXELS)
    assert decoder.decode(picture(), 16, MAX_PIXELS).shape == (16, 16, 3)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_decoders_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    program = (
        "import time; from services.gateway.decoding import Decoder; decoder = Decoder(60)\n"
        "print(decoder._running().pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], cwd=decoding.REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{child}/cmdline").read_bytes():
            break  # ended, and waits for init
        time.sleep(0.05)
    else:
        assert time.monotonic() < deadline


def test_decoder_protocol_ends_at_end_of_input() -> None:
    data = picture()
    requests = io.BytesIO(struct.pack(">IQQ", 8, MAX_PIXELS, len(data)) + data + b"\0\0")
    answers = io.BytesIO()
    decoding.serve(requests, answers)
    code, length = struct.unpack(">BQ", answers.getvalue()[1:10])
    assert (code, length) == (0, 8 * 8 * 3)
    assert (np.frombuffer(answers.getvalue()[10:], np.uint8).reshape(8, 8, 3) == read_image(data, size=8)).all()
