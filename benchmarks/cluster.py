"""Replicas of the service as processes on this machine, on one PostgreSQL and one bucket, for benchmarks."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import psutil  # type: ignore[import-untyped]

START_SECONDS = 300.0
# The services here have no TLS. Without this, each call reads all certificates of this machine, which costs 20 ms.
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class ServiceNotReadyError(RuntimeError):
    """A service has ended, or is not ready in time."""


@dataclass
class Replica:
    """One replica: a supervisor with its processes, and its own data folder."""

    name: str
    folder: Path
    port: int
    settings: Mapping[str, str]
    environment: Mapping[str, str]
    prefix: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """The address of its gateway."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start its supervisor, which starts the rest."""
        values = {"DATA_DIR": str(self.folder), "PORT": str(self.port), "EXECUTOR_ID": self.name, **self.settings}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DERMIS_")}
        environment |= self.environment
        environment |= {f"DERMIS_{name}": value for name, value in values.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "services.serve"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_ready(self) -> bool:
        """Whether /readyz answers 200."""
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/readyz", timeout=10, trust_env=False, verify=NO_TLS).status_code == 200
        return False

    def wait_until_ready(self) -> None:
        """Wait until /readyz answers 200.

        Raises:
            ServiceNotReadyError: The replica has ended, or is not ready within minutes.
        """
        if not wait_for(lambda: self.has_ended or self.is_ready(), START_SECONDS) or self.has_ended:
            raise ServiceNotReadyError(f"{self.name} did not become ready: {self.log_end()}")

    @property
    def has_ended(self) -> bool:
        """Whether its supervisor has ended."""
        return self.process is None or self.process.poll() is not None

    def processes(self, service: str | None = None) -> list[psutil.Process]:
        """Its processes, or those of one service, such as "gateway" or "Generator"."""
        if self.process is None:
            return []
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        if service is None:
            return [psutil.Process(self.process.pid), *family]
        chosen = []
        for process in family:
            with suppress(psutil.Error):
                line = process.cmdline()
                if "--service-name" in line and line[line.index("--service-name") + 1] == service:
                    chosen.append(process)
        return chosen

    def kill(self, service: str | None = None) -> bool:
        """Kill all of its processes, or those of one service, with SIGKILL. False if there was none."""
        processes = self.processes(service)
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=30)
        if service is None and self.process is not None:
            self.process.wait(30)
        return bool(processes)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all of its processes, such as SIGSTOP."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.send_signal(number)

    def stop(self) -> None:
        """Stop it in order; kill it if that takes longer than a minute."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()

    def log_end(self) -> str:
        """The end of its log."""
        return (self.folder / "log").read_text(errors="replace")[-1500:]


class CoreShare(threading.Thread):
    """Limits all processes of a replica together to a share of a core, with SIGSTOP and SIGCONT. Entered, it is started.

    So a few cores take the place of as many small machines as fit in them. The limit holds on average over a second.
    """

    _PAUSE = 0.05
    _SAVED = 0.5  # seconds of the share that may be used later, after idle times

    def __init__(self, replica: Replica, share: float) -> None:
        super().__init__(daemon=True)
        self._replica, self._share = replica, share
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """Stop the processes while they have used more than their share."""
        processes = self._replica.processes()
        used: dict[int, float] = {}
        saved, before, listed, stopped = 0.0, time.monotonic(), time.monotonic(), False
        while not self._ended.wait(self._PAUSE):
            now = time.monotonic()
            if now - listed > 2:  # listing takes longer than reading times
                processes, listed = self._replica.processes(), now
            spent = 0.0
            for process in processes:
                with suppress(psutil.Error):
                    times = process.cpu_times()
                    spent += times.user + times.system - used.get(process.pid, times.user + times.system)
                    used[process.pid] = times.user + times.system
            saved = min(saved + self._share * (now - before), self._share * self._SAVED) - spent
            before = now
            if (saved < 0) != stopped:
                stopped = not stopped
                for process in processes:
                    with suppress(psutil.Error):
                        process.send_signal(signal.SIGSTOP if stopped else signal.SIGCONT)
        self._replica.signal_all(signal.SIGCONT)


def stop_everything_on_sigterm() -> None:
    """Make SIGTERM an exception in the main thread, so that `with` blocks stop the servers that they have started."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def wait_for(condition: Callable[[], bool], seconds: float, pause: float = 0.1) -> bool:
    """Wait until a condition is true. False if it is not within the time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(pause)
    return condition()


@dataclass
class Caller:
    """A client of a gateway that repeats every request until it is answered, as the SDK does.

    Attributes:
        unclear: How often answers of class 5xx did not say when to repeat the request, by their text.
    """

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: float = 300.0
    unclear: Counter[str] = field(default_factory=Counter)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request until the answer is neither a failed connection nor 5xx.

        Raises:
            RuntimeError: There was no such answer within `patience` seconds.
        """
        deadline = time.monotonic() + self.patience
        last: object = None
        headers = {**self.headers, **options.pop("headers", {})}
        while time.monotonic() < deadline:
            try:
                response = httpx.request(
                    method, f"{self.url}{path}", headers=headers, timeout=30, trust_env=False, verify=NO_TLS, **options
                )
                if response.status_code < 500:
                    return response
                last = f"{response.status_code} {response.text[:300]}"
                if response.status_code != 503 or "Retry-After" not in response.headers:
                    self.unclear[f"{method} {path} was answered {last}"] += 1
            except httpx.HTTPError as error:
                last = repr(error)
            time.sleep(0.2)
        raise RuntimeError(f"{method} {path} was not answered in {self.patience:.0f} s: {last}")

    def job(self, dataset: Mapping[str, Any]) -> dict[str, Any]:
        """The dataset as it is now."""
        record: dict[str, Any] = self.request("GET", dataset["links"]["self"]).json()
        return record

    def files(self, dataset: Mapping[str, Any]) -> dict[str, bytes]:
        """All files of a finished dataset."""
        listed = self.request("GET", dataset["links"]["files"]).json()["data"]
        return {file["name"]: self.request("GET", file["url"]).content for file in listed}
