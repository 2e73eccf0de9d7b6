"""The S3 server of moto, another implementation than SeaweedFS, on a free port of the loopback address, with data in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx

from benchmarks.components import MissingComponentError, free_port
from benchmarks.components.s3 import environment_of

_START_SECONDS = 120.0


def moto_program() -> Path | None:
    """The path of `moto_server`, or None if it is not installed."""
    places = [str(Path(sys.executable).parent / "moto_server"), shutil.which("moto_server")]
    return next((Path(place) for place in places if place and os.access(place, os.X_OK)), None)


@dataclass(frozen=True)
class MotoServer:
    """A running server with one bucket."""

    port: int
    bucket: str

    @property
    def endpoint(self) -> str:
        """URL of the S3 interface."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which s3fs and boto use this server."""
        return environment_of(self.endpoint)

    def url(self, prefix: str) -> str:
        """The fsspec URL of a folder of the bucket."""
        return f"s3://{self.bucket}/{prefix}"


@contextmanager
def running_moto(bucket: str = "datasets") -> Iterator[MotoServer]:
    """A new server, running.

    Raises:
        MissingComponentError: moto or s3fs is not installed.
        RuntimeError: The server does not start.
    """
    program = moto_program()
    if program is None:
        raise MissingComponentError("the S3 server `moto_server` (PyPI package moto[server]) is not installed")
    if find_spec("s3fs") is None:
        raise MissingComponentError("s3fs (the extra `s3`) is not installed")
    server = MotoServer(free_port(), bucket)
    process = subprocess.Popen(
        [str(program), "-H", "127.0.0.1", "-p", str(server.port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _makes_bucket(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("moto_server did not start")
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait()


def _makes_bucket(server: MotoServer) -> bool:
    try:
        return httpx.put(f"{server.endpoint}/{server.bucket}", timeout=10, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
