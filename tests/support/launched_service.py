"""A real service in separate processes, started from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from service_kit import wait_for

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300  # limit that detects a service that hangs; long enough for a busy machine


@dataclass
class Launched:
    """A service in processes of its own."""

    process: subprocess.Popen[str]
    client: httpx.Client
    log: Path

    def progress(self, dataset: dict[str, Any]) -> dict[str, Any]:
        status: dict[str, Any] = self.client.get(dataset["links"]["self"]).json()
        return status

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        try:
            wait_for(lambda: self._up() and condition(), seconds, pause=0.1)
        except TimeoutError:
            pytest.fail(f"not in {seconds} s; {self.client.get('/v1/datasets').text}; the log:\n{self.log.read_text()}")

    def _up(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the service has ended:\n{self.log.read_text()}")
        return True

    def ready(self) -> bool:
        with suppress(httpx.HTTPError):
            return self.client.get("/readyz").status_code == 200
        return False


def launching(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """The body of the fixture `launch`: yields a function that starts a service, and stops all that it has started."""
    launched: list[Launched] = []

    def start(bundle: str, port: int, command: Sequence[str] = ("-m", "services.serve"), **settings: str) -> Launched:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DERMIS_")}
        environment |= {
            "DERMIS_BUNDLES": bundle,
            "DERMIS_DATA_DIR": str(tmp_path / "data"),
            "DERMIS_PORT": str(port),
            "DERMIS_LOG_LEVEL": "WARNING",
        }
        log = tmp_path / f"log-{len(launched)}"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment | {f"DERMIS_{name.upper()}": value for name, value in settings.items()},
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        launched.append(Launched(process, client, log))
        return launched[-1]

    try:
        yield start
    finally:  # also when the test fails or leaves a loop over this generator
        for service in launched:
            service.client.close()
            service.process.terminate()
        for service in launched:
            try:
                service.process.wait(20)
            except subprocess.TimeoutExpired:
                service.process.kill()
