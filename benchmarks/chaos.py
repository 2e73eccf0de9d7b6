"""Faults on real components, and what they cost: `python -m benchmarks.chaos [--only NAME ...] [--kills 50] [--json FILE]`.

A gateway and workers with a small bundle run on a real PostgreSQL and a real S3 server (SeaweedFS). Datasets of 1,000 images
with a gate are requested, parts of the system are killed or disturbed while they are made, and each finished dataset is
compared, byte by byte, with the one that the library makes without a service. A client that repeats failed requests must notice
nothing.

Needs PostgreSQL's server, the extras `cluster` and `cpu`, and for the full disk the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cluster import Caller, Replica, wait_for
from benchmarks.components import MissingComponentError, free_port
from benchmarks.components.postgres import Postgres, running_postgres
from benchmarks.components.proxies import S3Proxy, TcpProxy, s3_proxy, tcp_proxy
from benchmarks.components.s3 import running_s3
from dermis.bundle import open_bundle

# The bundle and the files to compare with are made by the code of the tests, which is not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from gated_dataset import make_directly  # type: ignore[import-not-found]
from tiny_index import make_complete_bundle  # type: ignore[import-not-found]

FORMATS = ("imagefolder", "webdataset", "parquet")
IMAGES = 1000
_LEASE_SECONDS = 3.0
_PATIENCE_SECONDS = 600.0
# botocore waits for a minute by default; the proxy stalls for 8 seconds.
_S3_OPTIONS = {"config_kwargs": {"read_timeout": 4, "connect_timeout": 4, "retries": {"max_attempts": 2}}}


@dataclass
class Result:
    """What one scenario did and what came of it."""

    scenario: str
    disturbances: int = 0
    datasets: int = 0
    lost: int = 0
    twice: int = 0
    different: int = 0
    unclear: list[str] = field(default_factory=list)
    recovery_seconds: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether nothing was lost, made twice or different, and every failure had a clear state."""
        return not (self.lost or self.twice or self.different or self.unclear) and self.disturbances > 0


class Cluster:
    """One gateway without models and two workers. The database and the bucket are reached through proxies."""

    def __init__(self, bundle: Path, folder: Path, stack: ExitStack, seed: int) -> None:
        self.random = random.Random(seed)
        self.bundle = bundle
        self.postgres: Postgres = stack.enter_context(running_postgres())
        bucket = stack.enter_context(running_s3())
        self.database_proxy: TcpProxy = stack.enter_context(tcp_proxy(self.postgres.port))
        self.s3_proxy: S3Proxy = stack.enter_context(s3_proxy(bucket.endpoint, seed))
        database = self.postgres.url.replace(str(self.postgres.port), str(self.database_proxy.port))
        self._environment = bucket.environment | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.s3_proxy.port}",
            "FSSPEC_S3": json.dumps(_S3_OPTIONS),
            "OMP_NUM_THREADS": "1",
        }
        self._shared = {
            "BUNDLES": str(bundle.parent),
            "DATABASE_URL": f"{database}?connect_timeout=3",
            "STORAGE_URL": bucket.url("datasets"),
            "LEASE_SECONDS": str(_LEASE_SECONDS),
            "LOG_LEVEL": "WARNING",
        }
        self.gateway = self._replica(folder, "gateway", ROLE="gateway", INFERENCE="false")
        self.workers = [self._replica(folder, f"worker-{number}", ROLE="worker") for number in (1, 2)]
        self.caller = Caller(self.gateway.url, patience=_PATIENCE_SECONDS)
        stack.callback(lambda: [replica.kill() for replica in self.replicas])
        for replica in self.replicas:
            replica.start()
        for replica in self.replicas:
            replica.wait_until_ready()

    def _replica(self, folder: Path, name: str, **settings: str) -> Replica:
        return Replica(name, folder / name, free_port(), self._shared | settings, self._environment)

    @property
    def replicas(self) -> list[Replica]:
        """The gateway and the workers."""
        return [self.gateway, *self.workers]

    def request(self, file_format: str, seed: int) -> dict[str, Any]:
        """Request a dataset, with an idempotency key, twice: a client cannot know whether its first request arrived."""
        body = request_of(file_format, seed)
        headers = {"Idempotency-Key": f"{file_format}-{seed}"}
        first = self.caller.request("POST", "/v1/datasets", json=body, headers=headers)
        again = self.caller.request("POST", "/v1/datasets", json=body, headers=headers)
        if first.status_code != 202 or again.status_code not in (200, 202):
            raise RuntimeError(f"not accepted: {first.status_code} {first.text}; {again.status_code}")
        record: dict[str, Any] = first.json()
        if again.json()["id"] != record["id"]:
            raise RuntimeError("one idempotency key made two datasets")
        return record

    def restart_ended(self) -> None:
        """Start replicas whose supervisor has ended, as Kubernetes does."""
        for replica in self.replicas:
            if replica.has_ended:
                replica.start()


def request_of(file_format: str, seed: int) -> dict[str, Any]:
    """The body of a request for a gated dataset."""
    return {
        "model": "tiny",
        "classes": {"benign": IMAGES * 6 // 10, "malignant": IMAGES - IMAGES * 6 // 10},
        "seed": seed,
        "shard_size": 25,
        "format": file_format,
        "classifier": {"keep": "agreeing", "tries": 2},
        "privacy": {"gate": "min_distance", "percentile": 50.0, "tries": 2},
    }


class Undisturbed:
    """The files of datasets as the library makes them in one process."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        self._bundle, self._folder = bundle, folder
        self._made: dict[tuple[str, int], dict[str, bytes]] = {}

    def files(self, file_format: str, seed: int) -> dict[str, bytes]:
        """The files by name."""
        key = (file_format, seed)
        if key not in self._made:
            out = self._folder / "-".join(map(str, key))
            body = request_of(file_format, seed)
            self._made[key] = make_directly(open_bundle(self._bundle), out, body)
        return self._made[key]


Disturb = Callable[[], None]


def run_jobs(
    cluster: Cluster, undisturbed: Undisturbed, result: Result, disturb: Disturb, count: int, file_format: str
) -> None:
    """Request datasets until `count` disturbances have been made at random moments, and compare each with the undisturbed one.

    Args:
        cluster: The replicas.
        undisturbed: The files to compare with.
        result: The result, which is added to.
        disturb: Makes one disturbance and returns when it is over.
        count: Number of disturbances.
        file_format: Format of the datasets.
    """
    seed = 0
    while result.disturbances < count:
        seed += 1
        expected = undisturbed.files(file_format, seed)
        dataset = cluster.request(file_format, seed)
        result.datasets += 1
        pause = cluster.random.uniform(0.0, 4.0)
        started = time.monotonic()
        job = cluster.caller.job(dataset)
        while job["state"] in ("queued", "running") and time.monotonic() - started < _PATIENCE_SECONDS:
            if result.disturbances < count and time.monotonic() - started >= pause:
                before = job["progress"]["samples_done"]
                began = time.monotonic()
                disturb()
                result.disturbances += 1
                cluster.restart_ended()
                result.recovery_seconds.append(_recovered(cluster, dataset, before, began))
                pause = time.monotonic() - started + cluster.random.uniform(0.2, 4.0)
            time.sleep(0.05)
            job = cluster.caller.job(dataset)
        compare(cluster, dataset, job, expected, result)


def _recovered(cluster: Cluster, dataset: Mapping[str, Any], before: int, began: float) -> float:
    """Seconds from a disturbance until the dataset has more images or has ended."""

    def goes_on() -> bool:
        job = cluster.caller.job(dataset)
        cluster.restart_ended()
        return job["state"] not in ("queued", "running") or job["progress"]["samples_done"] > before

    wait_for(goes_on, _PATIENCE_SECONDS)
    return time.monotonic() - began


def compare(
    cluster: Cluster, dataset: Mapping[str, Any], job: Mapping[str, Any], expected: Mapping[str, bytes], result: Result
) -> None:
    """Count what is lost, twice or different in a finished dataset, and remove it."""
    if job["state"] != "succeeded":
        result.lost += 1
        result.unclear.append(f"{dataset['id']} is {job['state']}: {json.dumps(job.get('error'))[:300]}")
        return
    files = cluster.caller.files(dataset)
    if files != expected:
        names = sorted(name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name))
        result.different += 1
        result.unclear.append(f"{dataset['id']} differs in {', '.join(names)[:200]}")
    rows = files.get("metadata.csv", b"").decode().splitlines()[1:]
    result.twice += len(rows) - len(set(rows))
    if job["progress"]["samples_done"] != job["progress"]["samples_total"]:
        result.unclear.append(f"{dataset['id']} counts {job['progress']}")
    listed = [each["id"] for each in cluster.caller.request("GET", "/v1/datasets?limit=100").json()["data"]]
    result.twice += listed.count(dataset["id"]) - 1
    cluster.caller.request("DELETE", dataset["links"]["self"])


# Scenarios


def kills(cluster: Cluster, undisturbed: Undisturbed, count: int) -> Iterator[Result]:
    """Kill -9 of the gateway's process, a generator, the process that runs jobs, and a whole replica, in each format."""
    targets: dict[str, Callable[[], bool]] = {
        "gateway": lambda: cluster.gateway.kill("gateway"),
        "generator": lambda: cluster.random.choice(cluster.workers).kill("Generator"),
        "worker": lambda: cluster.random.choice(cluster.workers).kill("gateway"),
        "replica": lambda: cluster.random.choice(cluster.replicas).kill(),
    }
    for file_format in FORMATS:
        result = Result(f"kill -9, {file_format}")
        names: list[str] = []

        def kill(names: list[str] = names) -> None:
            while True:
                name = cluster.random.choice(list(targets))
                if targets[name]():
                    names.append(name)
                    return
                time.sleep(0.2)  # it is being restarted

        run_jobs(cluster, undisturbed, result, kill, count, file_format)
        result.note = ", ".join(f"{names.count(name)} x {name}" for name in targets)
        yield result


def lost_machines(cluster: Cluster, undisturbed: Undisturbed, count: int) -> Iterator[Result]:
    """A worker is killed and PostgreSQL does not learn of it, as when a machine loses power: its transactions stay open."""
    result = Result("loss of a worker's machine")

    def lose() -> None:
        cluster.database_proxy.reports_end = False
        worker = cluster.random.choice(cluster.workers)
        worker.kill()
        cluster.database_proxy.reports_end = True

    run_jobs(cluster, undisturbed, result, lose, max(2, count // 5), "parquet")
    yield result


def database_restarts(cluster: Cluster, undisturbed: Undisturbed, count: int) -> Iterator[Result]:
    """PostgreSQL stopped in the modes fast and immediate, and killed, and started again after up to 5 seconds."""
    for mode in ("fast", "immediate", "kill -9"):

        def restart(mode: str = mode) -> None:
            if mode == "kill -9":
                cluster.postgres.kill()
            else:
                cluster.postgres.stop(mode)
            time.sleep(cluster.random.uniform(0, 5))
            cluster.postgres.start()

        result = Result(f"PostgreSQL restarted ({mode})")
        run_jobs(cluster, undisturbed, result, restart, max(2, count // 5), "webdataset")
        yield result


def database_connections(cluster: Cluster, undisturbed: Undisturbed, count: int) -> Iterator[Result]:
    """Connections to PostgreSQL cut, and stalled, for up to 6 seconds."""
    for mode in ("cut", "stall"):

        def disturb(mode: Any = mode) -> None:
            cluster.database_proxy.set_mode(mode)
            time.sleep(cluster.random.uniform(0.1, 6))
            cluster.database_proxy.set_mode("pass")

        result = Result(f"connections to PostgreSQL: {mode}")
        run_jobs(cluster, undisturbed, result, disturb, max(2, count // 5), "parquet")
        yield result


def storage_faults(cluster: Cluster, undisturbed: Undisturbed, count: int) -> Iterator[Result]:
    """A third of the requests to S3 answered 500 or 503, not answered, or with half of the body, for up to 5 seconds."""
    for file_format in FORMATS:
        result = Result(f"S3: 500, 503, time-outs, half bodies, {file_format}")
        before = dict(cluster.s3_proxy.counts)

        def disturb() -> None:
            cluster.s3_proxy.share = 0.35
            time.sleep(cluster.random.uniform(1, 5))
            cluster.s3_proxy.share = 0.0

        run_jobs(cluster, undisturbed, result, disturb, max(2, count // 10), file_format)
        made = {fault: number - before[fault] for fault, number in cluster.s3_proxy.counts.items()}
        result.note = ", ".join(f"{number} x {fault}" for fault, number in made.items())
        yield result


def paused_workers(cluster: Cluster, undisturbed: Undisturbed, count: int) -> Iterator[Result]:
    """A worker stopped by SIGSTOP for longer than its lease, so that two workers believe that they own its job."""

    def pause() -> None:
        worker = cluster.random.choice(cluster.workers)
        worker.signal_all(signal.SIGSTOP)
        time.sleep(_LEASE_SECONDS * cluster.random.uniform(1.5, 3))
        worker.signal_all(signal.SIGCONT)

    result = Result("SIGSTOP of a worker beyond its lease")
    run_jobs(cluster, undisturbed, result, pause, max(2, count // 5), "imagefolder")
    yield result


_CLOCK = """import os, time
_file, _real = os.environ["DERMIS_CHAOS_CLOCK"], time.time
def _changed():
    try:
        with open(_file) as file:
            return _real() + float(file.read() or 0)
    except (OSError, ValueError):
        return _real()
time.time = _changed
"""


def clock_jumps(cluster: Cluster, undisturbed: Undisturbed, count: int) -> Iterator[Result]:
    """The clock of Python in one worker set an hour forward and back while it works."""
    result = Result("clock of a worker: one hour forward and back")
    worker = cluster.workers[0]
    worker.stop()
    offset = worker.folder / "clock"
    offset.write_text("0")
    changed = worker.folder / "changed-clock"
    changed.mkdir()
    (changed / "sitecustomize.py").write_text(_CLOCK)
    usual, more = worker.environment, {"PYTHONPATH": str(changed), "DERMIS_CHAOS_CLOCK": str(offset)}
    worker.environment = {**usual, **more}
    worker.start()
    worker.wait_until_ready()

    def jump() -> None:
        offset.write_text(cluster.random.choice(["3600", "-3600", "0"]))
        time.sleep(_LEASE_SECONDS)

    run_jobs(cluster, undisturbed, result, jump, max(2, count // 5), "webdataset")
    worker.stop()
    worker.environment = usual
    worker.start()
    worker.wait_until_ready()
    yield result


def full_disk(cluster: Cluster, undisturbed: Undisturbed, _count: int) -> Iterator[Result]:
    """One machine with SQLite, on a tmpfs that another program fills.

    The dataset must fail with `storage-full` and leave no files, or be completed. When not a byte is free, not even that can be
    recorded, so it waits until space is free.
    """
    for free, name in ((2 << 20, "little space"), (0, "no space")):
        result = Result(f"disk with {name} (one machine, SQLite)")
        folder = Path(tempfile.mkdtemp(prefix="dermis-full-"))
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            result.note = "not run: a tmpfs cannot be mounted"
            yield result
            continue
        settings = {"BUNDLES": str(cluster.bundle.parent), "LOG_LEVEL": "WARNING", "MIN_FREE_BYTES": str(4 << 20)}
        one = Replica("one", folder / "data", free_port(), settings, {"OMP_NUM_THREADS": "1"})
        try:
            one.start()
            one.wait_until_ready()
            _fill_disk(one, folder, free, undisturbed, result)
            yield result
        finally:
            one.stop()
            subprocess.run(["umount", str(folder)], check=False)
            shutil.rmtree(folder, ignore_errors=True)


def _fill_disk(one: Replica, folder: Path, free: int, undisturbed: Undisturbed, result: Result) -> None:
    caller, filler = Caller(one.url), folder / "filler"
    body = request_of("webdataset", 1)

    def has_ended(dataset: Mapping[str, Any]) -> bool:
        return caller.job(dataset)["state"] not in ("queued", "running")

    dataset = caller.request("POST", "/v1/datasets", json=body).json()
    result.datasets += 1
    wait_for(lambda: caller.job(dataset)["progress"]["samples_done"] > 0, 120)
    with suppress(OSError), filler.open("wb") as file:
        while shutil.disk_usage(folder).free > free:
            file.write(b"\0" * (1 << 16))
            file.flush()
    result.disturbances += 1
    if free:
        wait_for(lambda: has_ended(dataset), 120)
        if not has_ended(dataset):
            result.unclear.append("with little space the dataset did not end")
    else:
        time.sleep(10)
    filler.unlink()
    began = time.monotonic()
    wait_for(lambda: has_ended(dataset), 120)
    job = caller.job(dataset)
    if job["state"] == "failed":
        if not job["error"]["type"].endswith("storage-full"):
            result.unclear.append(f"with a full disk the dataset failed with {job['error']}")
        if any((folder / "data" / "datasets").rglob("*.tar")):
            result.unclear.append("files of the failed dataset were left")
        result.note = "the dataset failed with storage-full and was requested again"
        dataset = caller.request("POST", "/v1/datasets", json=body).json()
        result.datasets += 1
        wait_for(lambda: has_ended(dataset), 300)
    result.recovery_seconds.append(time.monotonic() - began)
    if caller.job(dataset)["state"] != "succeeded":
        result.lost += 1
        result.unclear.append(f"after the disk was full the dataset is {caller.job(dataset)}")
    elif caller.files(dataset) != undisturbed.files("webdataset", 1):
        result.different += 1


SCENARIOS: Mapping[str, Callable[[Cluster, Undisturbed, int], Iterator[Result]]] = {
    "kills": kills,
    "lost": lost_machines,
    "database": database_restarts,
    "connections": database_connections,
    "storage": storage_faults,
    "paused": paused_workers,
    "clock": clock_jumps,
    "disk": full_disk,
}


@contextmanager
def small_bundle() -> Iterator[Path]:
    """A complete bundle of 16 px with a classifier and an index, made by the tests' own code."""
    with tempfile.TemporaryDirectory(prefix="dermis-chaos-") as folder:
        training = np.random.default_rng(0).integers(0, 256, (50, 16, 16, 3), dtype=np.uint8)
        made = Path(make_complete_bundle(Path(folder) / "made", training).location)
        (Path(folder) / "bundles").mkdir()
        yield made.rename(Path(folder) / "bundles" / "tiny")


def run(names: list[str], count: int, seed: int) -> Iterator[Result]:
    """Run scenarios and yield their results.

    Raises:
        MissingComponentError: PostgreSQL or the S3 server is not installed.
    """
    with ExitStack() as stack:
        bundle = stack.enter_context(small_bundle())
        folder = bundle.parent.parent
        cluster = Cluster(bundle, folder / "replicas", stack, seed)
        undisturbed = Undisturbed(bundle, folder)
        for name in names:
            yield from SCENARIOS[name](cluster, undisturbed, count)


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(SCENARIOS), help="these scenarios; default: all")
    parser.add_argument("--kills", type=int, default=50, help="in each format; other scenarios make a part of it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", help="file to which the results are written after each scenario")
    options = parser.parse_args()
    results: list[Result] = []
    print(
        f"{'scenario':<52}{'faults':>7}{'sets':>6}{'lost':>6}{'twice':>6}{'other':>6}{'recovery s, median / max':>26}",
        flush=True,
    )
    try:
        for result in run(options.only or list(SCENARIOS), options.kills, options.seed):
            results.append(result)
            times = result.recovery_seconds
            shown = f"{statistics.median(times):.1f} / {max(times):.1f}" if times else "-"
            counts = (result.disturbances, result.datasets, result.lost, result.twice, result.different)
            print(
                f"{result.scenario:<52}{counts[0]:>7}" + "".join(f"{each:>6}" for each in counts[1:]) + f"{shown:>26}",
                flush=True,
            )
            for line in (*result.unclear, *([result.note] if result.note else [])):
                print(f"    {line}", flush=True)
            if options.json:
                Path(options.json).write_text(json.dumps([asdict(each) for each in results], indent=1))
    except MissingComponentError as error:
        raise SystemExit(str(error)) from None
    return 0 if all(result.met or result.note.startswith("not run") for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
