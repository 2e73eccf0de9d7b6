"""Restarts of one replica after another under load: `python -m benchmarks.rolling_restart [--rounds 3] [--json FILE]`.

Two replicas that do everything (gateway, models and jobs) run on a real PostgreSQL and a real S3 server, behind a load balancer
that sends new connections to those whose /readyz answers 200. With `--separate`, two gateways with models are behind it, and
two workers make the datasets. Clients with the SDK generate images, and request, await, download and verify datasets, without a
pause. Each replica gets SIGTERM, ends, and is started again; when it is ready, the next one follows. Required: no call of
a client fails, as the SDK repeats requests; the same request always has the same bytes; and each replica ends by itself,
without a process that its supervisor had to kill.

Needs PostgreSQL's server, and the extras `cluster` and `cpu`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import DEMO
from benchmarks.cluster import Replica, ServiceNotReadyError, stop_everything_on_sigterm, wait_for
from benchmarks.components import MissingComponentError, free_port
from benchmarks.components.postgres import running_postgres
from benchmarks.components.proxies import LoadBalancer, load_balancer
from benchmarks.components.s3 import running_s3
from benchmarks.faults.cluster import small_bundle
from dermis.bundle import open_bundle
from dermis.dataset.request import classes_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients" / "python" / "src"))
from dermis_client import DermisClient

_PAUSE_SECONDS = 3.0  # between a replica that is ready and the restart of the next one
_STOP_PAUSE_SECONDS = "3"  # longer than the time until the load balancer has seen a failed probe
_PATIENCE_SECONDS = 600.0  # for the last calls of the clients
_END_SECONDS = 120.0  # for a replica that was stopped
_KILLED = (
    b"killed because they did not end in time"  # in the log of a supervisor, which ends with status 0 all the same
)
_KINDS = ("image", "dataset")
_SEEDS = {"image": 3, "dataset": 1}  # few, so that each request is repeated


@dataclass
class Call:
    """What a client did: the time it took with all repetitions, and why it failed."""

    kind: str
    began: float
    seconds: float
    error: str = ""


@dataclass
class Restart:
    """One restart: seconds from SIGTERM to the end, and from the start until the replica was ready.

    `status` is None if the replica did not end. `killed` says whether its supervisor has killed processes.
    """

    replica: str
    began: float
    stopping: float
    starting: float
    status: int | None
    killed: bool = False

    def failures(self) -> list[str]:
        """What was not in order."""
        failures = [f"{self.replica} has killed processes that did not end"] if self.killed else []
        if self.status is None:
            return [*failures, f"{self.replica} did not end within {_END_SECONDS:.0f} s"]
        return [*failures, f"{self.replica} ended with status {self.status}"] if self.status else failures


@dataclass
class Result:
    """All calls and restarts.

    Attributes:
        calls: What clients did.
        restarts: The restarts.
        repetitions: Requests that the SDK repeated.
        compared: Answers that were compared with an earlier one to the same request, by kind.
        different: Requests whose answer was another one than before.
        connections: Connections that each replica got from the load balancer.
    """

    calls: list[Call] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    repetitions: int = 0
    compared: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    different: list[str] = field(default_factory=list)
    connections: list[int] = field(default_factory=list)

    def failures(self) -> list[str]:
        """What was required and is not met."""
        failures = sorted({f"{call.kind}: {call.error}" for call in self.calls if call.error})
        failures += [f"other bytes than before: {name}" for name in self.different]
        failures += [f"no {kind} was requested twice" for kind, count in self.compared.items() if not count]
        failures += [text for each in self.restarts for text in each.failures()]
        return failures if self.calls and self.restarts else [*failures, "nothing was called or restarted"]

    @property
    def met(self) -> bool:
        """Whether no call failed, no answer differed, and each replica ended in order."""
        return not self.failures()

    def is_disturbed(self, call: Call) -> bool:
        """Whether a replica was stopping or starting during a call."""
        return any(
            call.began < each.began + each.stopping + each.starting and call.began + call.seconds > each.began
            for each in self.restarts
        )


class _Repetitions(logging.Handler):
    """Counts the requests that the SDK repeats."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "follows in" in record.msg:
            self.count += 1


class Clients:
    """Threads that call the service through the SDK until they are stopped."""

    def __init__(self, url: str, model: str, classes: Sequence[str], folder: Path, result: Result, images: int) -> None:
        self._url, self._model, self._classes, self._folder = url, model, classes, folder
        self._result, self._images = result, images
        self._digests: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._threads: dict[threading.Thread, str] = {}

    def start(self, count: int) -> None:
        """Start this number of clients for images and as many for datasets."""
        for number in range(count):
            for kind, work in zip(_KINDS, (self._image, self._dataset), strict=True):
                thread = threading.Thread(target=self._repeat, args=(kind, work, number), daemon=True)
                thread.start()
                self._threads[thread] = kind

    def stop(self) -> None:
        """Let the present calls end, and further ones until each client has repeated a request."""
        self._stopped.set()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for thread, kind in self._threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                error = f"a client did not end within {_PATIENCE_SECONDS:.0f} s after the last restart"
                with self._lock:
                    self._result.calls.append(Call(kind, time.time() - _PATIENCE_SECONDS, _PATIENCE_SECONDS, error))

    def _repeat(self, kind: str, work: Callable[[DermisClient, int, Path], str], number: int) -> None:
        with DermisClient(self._url) as client:
            for turn in range(1_000_000):
                if self._stopped.is_set() and turn > _SEEDS[kind]:
                    return
                seed = (number + turn) % _SEEDS[kind]
                call = Call(kind, time.time(), 0.0)
                try:
                    digest = work(client, seed, self._folder / f"{number}-{turn}")
                    with self._lock:
                        if (kind, seed) in self._digests:
                            self._result.compared[kind] += 1
                        if self._digests.setdefault((kind, seed), digest) != digest:
                            self._result.different.append(f"{kind} {seed}")
                except Exception as error:
                    call.error = f"{type(error).__name__}: {error}"[:500]
                call.seconds = time.time() - call.began
                with self._lock:
                    self._result.calls.append(call)

    def _image(self, client: DermisClient, seed: int, _folder: Path) -> str:
        images = client.images.generate({self._classes[0]: 2}, seed=seed, model=self._model)
        return hashlib.sha256(b"".join(image.content for image in images)).hexdigest()

    def _dataset(self, client: DermisClient, seed: int, folder: Path) -> str:
        counts = {name: self._images // len(self._classes) for name in self._classes}
        dataset = client.datasets.create(counts, seed=seed, model=self._model, shard_size=10).wait()
        dataset.download(folder)  # compares all hashes
        return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


@contextmanager
def running_replicas(bundle: Path, folder: Path, separate: bool) -> Iterator[list[Replica]]:
    """Replicas on one database and one bucket, ready: two that do everything, or two gateways and two workers."""
    roles = {"replica": "all"} if not separate else {"gateway": "gateway", "worker": "worker"}
    with ExitStack() as stack:
        database = stack.enter_context(running_postgres())
        bucket = stack.enter_context(running_s3())
        settings = {
            "BUNDLES": str(bundle),
            "DATABASE_URL": database.url,
            "STORAGE_URL": bucket.url("datasets"),
            "LEASE_SECONDS": "5",
            "STOP_PAUSE_SECONDS": _STOP_PAUSE_SECONDS,
            "LOG_LEVEL": "WARNING",
        }
        environment = bucket.environment | {"OMP_NUM_THREADS": "1"}
        replicas = [
            Replica(name, folder / name, free_port(), settings | {"ROLE": role}, environment)
            for kind, role in roles.items()
            for name in (f"{kind}-1", f"{kind}-2")
        ]
        for replica in replicas:
            stack.callback(replica.stop)
            replica.start()
        for replica in replicas:
            replica.wait_until_ready()
        yield replicas


def answers_clients(replica: Replica) -> bool:
    """Whether a replica is behind the load balancer: it is not only a worker."""
    return replica.settings["ROLE"] != "worker"


def stop(replica: Replica) -> tuple[int | None, bool]:
    """Stop a replica by SIGTERM, and kill it if it does not end.

    Returns:
        Its status, None if it did not end; and whether its supervisor has killed processes.
    """
    assert replica.process is not None
    log = replica.folder / "log"
    before = log.stat().st_size
    replica.process.terminate()
    status: int | None = None
    try:
        status = replica.process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        replica.kill()
    return status, _KILLED in log.read_bytes()[before:]


def restart(replica: Replica, balancer: LoadBalancer) -> Restart:
    """Stop a replica by SIGTERM, start it again and wait until it is ready and, but for a worker, gets connections.

    Raises:
        ServiceNotReadyError: It is not ready within minutes.
    """
    began = time.time()
    status, killed = stop(replica)
    stopped = time.time()
    replica.start()
    replica.wait_until_ready()
    if answers_clients(replica) and not wait_for(lambda: replica.port in balancer.ready, 60):
        raise ServiceNotReadyError(f"{replica.name} gets no connections")
    return Restart(replica.name, began, stopped - began, time.time() - stopped, status, killed)


def run(bundle: Path, folder: Path, rounds: int, clients: int, images: int, separate: bool = False) -> Result:
    """Restart all replicas `rounds` times while clients work.

    Args:
        bundle: The bundle to serve.
        folder: Folder for data and downloads.
        rounds: How often each replica is restarted.
        clients: Number of clients for images, and of those for datasets.
        images: Images of a dataset.
        separate: Whether gateways and workers are separate replicas.

    Raises:
        MissingComponentError: PostgreSQL or the S3 server is not installed.
        ServiceNotReadyError: A replica did not start.
    """
    opened, result, repetitions = open_bundle(bundle), Result(), _Repetitions()
    logging.getLogger("dermis_client").addHandler(repetitions)
    with ExitStack() as stack:
        replicas = stack.enter_context(running_replicas(bundle, folder, separate))
        ports = [each.port for each in replicas if answers_clients(each)]
        balancer = stack.enter_context(load_balancer(ports))
        wait_for(lambda: len(balancer.ready) == len(ports), 60)
        url = f"http://127.0.0.1:{balancer.port}"
        working = Clients(url, opened.name, classes_of(opened), folder, result, images)
        working.start(clients)
        try:
            time.sleep(2 * _PAUSE_SECONDS)
            for _ in range(rounds):
                for replica in replicas:
                    result.restarts.append(restart(replica, balancer))
                    time.sleep(_PAUSE_SECONDS)
        finally:
            working.stop()
        result.connections = list(balancer.connections.values())
    logging.getLogger("dermis_client").removeHandler(repetitions)
    result.repetitions = repetitions.count
    return result


def _median_and_most(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.1f} s (most: {max(seconds):.1f} s)"


def report(result: Result) -> str:
    """The results as Markdown, for docs/benchmarks-cluster.md."""
    stopping = _median_and_most([each.stopping for each in result.restarts])
    starting = _median_and_most([each.starting for each in result.restarts])
    lines = [
        f"{len(result.restarts)} restarts: a replica ended {stopping} after SIGTERM, and got connections {starting} after its "
        f"start. Requests that the SDK repeated: {result.repetitions}.",
        "",
        "| call | calls | failed | median, s | p95, s | longest, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in _KINDS:
        for disturbed in (False, True):
            calls = [call for call in result.calls if call.kind == kind and result.is_disturbed(call) == disturbed]
            if calls:
                seconds = [call.seconds for call in calls]
                times = (statistics.median(seconds), float(np.percentile(seconds, 95)), max(seconds))
                name = f"{kind}{', during a restart' if disturbed else ''}"
                failed = sum(bool(call.error) for call in calls)
                lines.append(f"| {name} | {len(calls):,} | {failed} | {' | '.join(f'{each:.2f}' for each in times)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each replica is restarted")
    parser.add_argument("--clients", type=int, default=3, help="for images, and as many for datasets")
    parser.add_argument("--images", type=int, default=100, help="of a dataset")
    parser.add_argument(
        "--separate", action="store_true", help="two gateways and two workers, in place of two of all roles"
    )
    parser.add_argument("--bundle", type=Path, default=DEMO, help="a folder, or `small` for a bundle of 16 px")
    parser.add_argument("--json", type=Path, help="file for all calls and restarts")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    options = parser.parse_args()
    stop_everything_on_sigterm()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dermis-rolling-")))
        bundle = options.bundle
        if str(bundle) == "small":
            bundle = stack.enter_context(small_bundle())
        try:
            result = run(bundle, folder, options.rounds, options.clients, options.images, options.separate)
        except (MissingComponentError, ServiceNotReadyError) as error:
            raise SystemExit(str(error)) from None
    print(report(result))
    for text in result.failures():
        print(f"NOT MET: {text}")
    print(f"met (no failed call, the same bytes, each replica ended in order): {'yes' if result.met else 'NO'}")
    if options.json:
        options.json.write_text(json.dumps(asdict(result) | {"failures": result.failures()}, indent=1))
    if options.markdown:
        options.markdown.write_text(report(result))
    return 0 if result.met else 1


if __name__ == "__main__":
    sys.exit(main())
