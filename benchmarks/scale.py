"""Scale-out: `python -m benchmarks.scale [--json] [--workers 1 2 4] [--core-share 1] [--simulated 16 32 64]`.

Two parts, both on a real PostgreSQL:

- real workers of a trained bundle, each pinned to a core of its own, with datasets in a real S3 server: images/s. Required:
  for each core 90 % of the rate of one worker, unless all cores of the machine are in use. With `--core-share 0.25` each worker
  has a quarter of a core, so that four of them leave the other core to the gateway, PostgreSQL and the bucket;
- simulated workers, which run the real queue with shards that only sleep for the time that a GPU would need: shards/s, the time
  that a small job takes beside a large one, and the processor time of the database and the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import psutil  # type: ignore[import-untyped]
import psycopg

from benchmarks import DEMO
from benchmarks.cluster import Caller, CoreShare, Replica, stop_everything_on_sigterm, wait_for
from benchmarks.components import MissingComponentError, free_port
from benchmarks.components.postgres import Postgres, running_postgres
from benchmarks.components.s3 import running_s3
from dermis.bundle import Bundle, open_bundle
from dermis.dataset.request import classes_of
from services.jobs import execution, workflow
from services.jobs.context import JobContext, retry_transient
from services.jobs.service import JobService
from services.jobs.table import Job, JobTable
from services.jobs.turns import Turns
from services.settings import read_settings

REQUIRED_EFFICIENCY = 0.9
_FULL_USE = 0.9  # of the cores of the machine, on average; a dataset begins and ends with less
_SHARD_IMAGES = 500
_PROBE_SECONDS = 2.0
_PARTS = ("workers", "gateway", "PostgreSQL", "bucket")


# Real workers


@dataclass(frozen=True)
class Rate:
    """The generation of a dataset, and the processor seconds that each part used for it."""

    images: int
    seconds: float
    processor: Mapping[str, float]


@dataclass(frozen=True)
class Cluster:
    """A gateway without models and workers, on one PostgreSQL and one bucket. `meters` read the processor time of each part."""

    gateway: Replica
    meters: Mapping[str, Callable[[], float]]


@contextmanager
def running_cluster(bundle: Bundle, count: int, core_share: float = 1.0) -> Iterator[Cluster]:
    """Start everything, with the first workers on cores of their own.

    Args:
        bundle: The bundle that the workers serve.
        count: Number of workers.
        core_share: The part of a core that a worker may use from when all are ready; below 1 none is pinned.

    Raises:
        MissingComponentError: PostgreSQL or SeaweedFS is not installed.
        ServiceNotReadyError: A replica did not start.
    """
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = stack.enter_context(running_postgres())
        bucket = stack.enter_context(running_s3())
        shared = {
            "BUNDLES": bundle.location,
            "DATABASE_URL": database.url,
            "STORAGE_URL": bucket.url("datasets"),
            "LOG_LEVEL": "WARNING",
        }

        def replica(name: str, role: str, settings: Mapping[str, str], prefix: Sequence[str] = ()) -> Replica:
            values = {**shared, "ROLE": role, **settings}
            return Replica(name, folder / name, free_port(), values, bucket.environment, prefix=prefix)

        gateway = replica("gateway", "gateway", {"INFERENCE": "false"})
        workers = []
        for number in range(count):
            pinned = ("taskset", "-c", str(cores[number % len(cores)])) if core_share == 1 else ()
            workers.append(replica(f"worker-{number}", "worker", {}, pinned))
        for each in (gateway, *workers):
            stack.callback(each.kill)
            each.start()
        for each in (gateway, *workers):
            each.wait_until_ready()
        if core_share < 1:
            for worker in workers:
                stack.enter_context(CoreShare(worker, core_share))
        trees = {
            "workers": [worker.processes()[0] for worker in workers],
            "gateway": gateway.processes()[:1],
            "PostgreSQL": [database.main_process()],
            "bucket": [psutil.Process(bucket.process.pid)] if bucket.process else [],
        }
        meters = {name: partial(_cpu_seconds_of, processes) for name, processes in trees.items()}
        yield Cluster(gateway, meters)


def real_rates(bundle: Bundle, workers: Sequence[int], seconds: float, core_share: float = 1.0) -> list[dict[str, Any]]:
    """Images/s of datasets by number of workers, and the processor time of each part for an image.

    Args:
        bundle: The bundle that the workers serve.
        workers: Numbers of workers.
        seconds: Approximate time of a dataset.
        core_share: The part of a core that a worker may use.
    """
    results: list[dict[str, Any]] = []
    cores = len(os.sched_getaffinity(0))
    for count in workers:
        with running_cluster(bundle, count, core_share) as cluster:
            _measure(cluster, bundle, 300, 0)  # the first batches are slower
            first = _measure(cluster, bundle, 300, 1)
            images = max(600, round(first.images / first.seconds * seconds / 100) * 100)
            rounds = [_measure(cluster, bundle, images, seed) for seed in (2, 3)]
        best = max(rounds, key=lambda each: each.images / each.seconds)
        results.append(
            {
                "workers": count,
                "core_share": core_share,
                "cores": min(count, cores / core_share),
                "images": images,
                "rates": [each.images / each.seconds for each in rounds],
                "cpu_seconds_per_image": {name: used / best.images for name, used in best.processor.items()},
                "cores_in_use": {name: used / best.seconds for name, used in best.processor.items()},
            }
        )
        print(results[-1], file=sys.stderr, flush=True)
    for row in results:
        row["efficiency"] = max(row["rates"]) / max(results[0]["rates"]) / row["cores"] * results[0]["cores"]
        row["verdict"] = verdict(row["efficiency"], row["cores_in_use"], cores)
    return results


def verdict(efficiency: float, cores_in_use: Mapping[str, float], cores: int) -> str:
    """Whether the requirement is met, or what prevents it.

    Args:
        efficiency: Images/s for each core of the workers, as a part of those of the first number of workers.
        cores_in_use: Cores that each part uses, and "all" for the whole machine.
        cores: Cores of the machine.
    """
    if efficiency >= REQUIRED_EFFICIENCY:
        return "met"
    if cores_in_use["all"] >= _FULL_USE * cores:
        return "all cores in use"
    others = {name: used for name, used in cores_in_use.items() if name not in ("workers", "all")}
    most = max(others, key=lambda name: others[name])
    return f"NOT MET ({most}: {others[most]:.2f} cores)"


def _machine_cpu_seconds() -> float:
    """Processor time of everything on this machine since it was started."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.steal - times.guest - times.guest_nice)


def _measure(cluster: Cluster, bundle: Bundle, images: int, seed: int) -> Rate:
    """Make one dataset. Measured is the time from the request until all images are generated, without the end of the dataset.

    Workers report many images at a time, so the time of the first ones says little.

    Raises:
        RuntimeError: The images were not generated in 15 minutes.
    """
    caller, classes = Caller(cluster.gateway.url), classes_of(bundle)
    body: dict[str, Any] = {
        "classes": {name: images // len(classes) for name in classes},
        "seed": seed,
        "shard_size": 50,
    }
    if bundle.classifier:
        body["classifier"] = {"score": False}
    meters = {**cluster.meters, "all": _machine_cpu_seconds}
    started, before = time.monotonic(), {name: read() for name, read in meters.items()}
    dataset = caller.request("POST", "/v1/datasets", json=body).json()

    def is_generated() -> bool:
        progress = caller.job(dataset)["progress"]
        return bool(progress["samples_done"] == progress["samples_total"])

    if not wait_for(is_generated, 900, pause=0.2):
        raise RuntimeError(f"{images} images were not generated in 900 s")
    seconds, after = time.monotonic() - started, {name: read() for name, read in meters.items()}
    wait_for(lambda: caller.job(dataset)["state"] == "succeeded", 600)
    caller.request("DELETE", dataset["links"]["self"])
    return Rate(images, seconds, {name: after[name] - before[name] for name in meters})


# Simulated workers


class SleepingShards:
    """A kind of job (`services.jobs.execution.JobKind`) whose shards sleep instead of generating images."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def path(self, job_id: str) -> str:
        """The path of a dataset in the API."""
        return f"/v1/datasets/{job_id}"

    def has_inputs(self, _ctx: JobContext, _job: Job) -> bool:
        """True: there are none."""
        return True

    def run_shard(self, ctx: JobContext, job: Job, shard: int, on_begin: Callable[[], None]) -> None:
        """Sleep in a place of this worker, and record the progress as a real shard does."""
        with ctx.turns.of(job.tenant, lambda: None):
            on_begin()
            time.sleep(self._seconds * min(1.0, job.samples_total / _SHARD_IMAGES))
        images = min(_SHARD_IMAGES, job.samples_total)
        retry_transient(ctx, lambda: ctx.table.progress(job.id, shard, images, finished=True))

    def finish(self, _ctx: JobContext, _job: Job) -> None:
        """Do nothing: there are no files."""


def simulated_jobs(
    url: str, folder: Path, name: str, seconds: float, poll_seconds: float, *, role: Literal["gateway", "worker"]
) -> JobService:
    """The jobs of one process with sleeping shards, not started.

    Args:
        url: URL of the database.
        folder: Folder of the data folders of all processes.
        name: Name of the worker.
        seconds: Time that a shard of 500 images sleeps.
        poll_seconds: Time between two polls of each queue.
        role: A gateway only enqueues jobs.
    """
    settings = read_settings(
        role=role,
        database_url=url,
        storage_url=str(folder),
        data_dir=folder / name,
        executor_id=name,
        shard_concurrency=2,  # one works, and one waits for its place
        queue_poll_seconds=poll_seconds,
    )
    execution.KINDS = {"dataset": SleepingShards(seconds)}
    ctx = JobContext(
        table=JobTable(url),
        models=cast(Any, None),
        inference=cast(Any, None),
        loop=asyncio.new_event_loop(),
        storage=str(folder),
        turns=Turns(1),
        finish_turns=Turns(1),
        projection_turns=Turns(1),
    )
    return JobService(settings, ctx)


def simulated_workers(url: str, folder: Path, count: int, seconds: float, poll_seconds: float) -> None:
    """Run workers with sleeping shards, each a process of its own, until stdin is closed.

    The processes are copies of this one, so that modules are imported once and not by each of them.
    """
    assert threading.active_count() == 1, "a copy of a process has only the thread that made it"
    parent, children = os.getpid(), []
    for number in range(count):
        child = os.fork()
        if child == 0:
            jobs = simulated_jobs(url, folder, f"w{number}", seconds, poll_seconds, role="worker")
            jobs.start()
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(0)
        children.append(child)
    sys.stdin.read()
    for child in children:
        os.kill(child, signal.SIGKILL)


@contextmanager
def _simulated_workers(
    url: str, folder: Path, count: int, seconds: float, poll_seconds: float
) -> Iterator[psutil.Process]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.scale",
        "--simulated-workers",
        url,
        str(folder),
        str(count),
        str(seconds),
        str(poll_seconds),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log)
    try:
        yield psutil.Process(process.pid)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(60)


class _Connections(threading.Thread):
    """Counts the connections of the database, once a second."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url.replace("+psycopg", "")
        self._ended = threading.Event()
        self.most = 0

    def run(self) -> None:
        """Count until `stop`."""
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._ended.wait(1):
                row = connection.execute(
                    "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"
                ).fetchone()
                self.most = max(self.most, row[0] - 1 if row else 0)

    def stop(self) -> int:
        """End, and return the most connections at one time."""
        self._ended.set()
        self.join()
        return self.most


def simulate(count: int, images: int, seconds_per_shard: float, poll_seconds: float) -> dict[str, Any]:
    """Run jobs of `images` in all with sleeping shards on `count` workers.

    Args:
        count: Number of workers. Each does one shard at a time.
        images: Number of images of all jobs together.
        seconds_per_shard: Time that a shard of 500 images sleeps.
        poll_seconds: Time between two polls of each queue.

    Raises:
        RuntimeError: The workers do not start, or a job fails.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server: Postgres = stack.enter_context(running_postgres(max_connections=60 * (count + 1)))
        gateway = simulated_jobs(server.url, folder, "gateway", seconds_per_shard, poll_seconds, role="gateway")
        gateway.start()
        stack.callback(gateway.stop)
        table = JobTable(server.url)
        stack.callback(table.close)
        launched = time.monotonic()
        parent = stack.enter_context(_simulated_workers(server.url, folder, count, seconds_per_shard, poll_seconds))
        if not wait_for(lambda: len(table.live_executors()) == count + 1, 900, pause=0.5):
            raise RuntimeError(f"{count} workers did not start in 900 s: {(folder / 'log').read_text()[-2000:]}")
        start_seconds = time.monotonic() - launched
        time.sleep(3)  # the queues are registered
        connections = _Connections(server.url)
        connections.start()
        main = server.main_process()
        before = _cpu_seconds(main), _cpu_seconds(parent)
        started = time.monotonic()
        shards = images // _SHARD_IMAGES
        large = [_create(table, "large", part) for part in _parts(shards, min(10, shards))]
        waits, done = [], threading.Event()

        def probe() -> None:
            while not done.wait(_PROBE_SECONDS):
                asked = time.monotonic()
                job_id = _create(table, "small", 1, images=5)
                wait_for(lambda: _is_made(table, job_id), 120, pause=0.05)  # noqa: B023
                waits.append(time.monotonic() - asked)

        prober = threading.Thread(target=probe)
        prober.start()
        try:
            wait_for(lambda: all(_is_made(table, each) for each in large), 3600, pause=0.5)
            elapsed = time.monotonic() - started
            after = _cpu_seconds(main), _cpu_seconds(parent)
        finally:
            done.set()
            prober.join()
        rate, ideal = shards / elapsed, count / seconds_per_shard
        return {
            "workers": count,
            "images": images,
            "shards": shards,
            "seconds_per_shard": seconds_per_shard,
            "poll_seconds": poll_seconds,
            "start_seconds": start_seconds,
            "seconds": elapsed,
            "shards_per_second": rate,
            "ideal_shards_per_second": ideal,
            "efficiency": rate / ideal,
            "database_cores": (after[0] - before[0]) / elapsed,
            "worker_cores": (after[1] - before[1]) / elapsed,
            "database_connections_most": connections.stop(),
            "small_jobs": len(waits),
            "small_job_seconds_median": statistics.median(waits) if waits else None,
            "small_job_seconds_max": max(waits) if waits else None,
        }


def _is_made(table: JobTable, job_id: str) -> bool:
    """Whether a job has succeeded.

    Raises:
        RuntimeError: It has failed.
    """
    job = table.get(job_id)
    if job is None or job.state in ("failed", "cancelled"):
        raise RuntimeError(f"job {job_id} did not succeed: {job}")
    return job.state == "succeeded"


def _parts(total: int, count: int) -> list[int]:
    return [total // count + (number < total % count) for number in range(count)]


def _create(table: JobTable, tenant: str, shards: int, images: int | None = None) -> str:
    """Create and enqueue a job of a number of shards."""
    job_id = f"ds_{uuid.uuid4().hex}"
    job, _ = table.create(
        job_id,
        {},
        tenant=tenant,
        kind="dataset",
        model=("none", "0" * 12),
        samples=images or shards * _SHARD_IMAGES,
        shards=shards,
        body_hash=job_id,
        owner="gateway",
    )
    workflow.submit(job)
    return job_id


def _cpu_seconds_of(processes: Sequence[psutil.Process]) -> float:
    return sum(_cpu_seconds(process) for process in processes)


def _cpu_seconds(process: psutil.Process) -> float:
    """Processor time of a process and its children, those that have ended included."""
    total = 0.0
    for each in [process, *process.children(recursive=True)]:
        try:
            times = each.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _share_text(core_share: float) -> str:
    return "" if core_share == 1 else f", each worker limited to {core_share:g} of a core"


def report(result: Mapping[str, Any]) -> str:
    """The results as Markdown, for docs/benchmarks-cluster.md."""
    lines = []
    if result["real"]:
        lines += [
            f"Real workers, {result['cpus']} cores{_share_text(result['real'][0]['core_share'])}:",
            "",
            "| workers | images of a dataset | images/s | of the rate of one worker, for each core "
            "| processor time of an image, ms: workers | gateway | PostgreSQL | bucket "
            "| cores in use: workers | all | required 90 % |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
            *(
                f"| {row['workers']} | {row['images']:,} | {max(row['rates']):.1f} | {row['efficiency']:.0%} | "
                + " | ".join(f"{1000 * row['cpu_seconds_per_image'][name]:.1f}" for name in _PARTS)
                + f" | {row['cores_in_use']['workers']:.2f} | {row['cores_in_use']['all']:.2f} | {row['verdict']} |"
                for row in result["real"]
            ),
            "",
        ]
    if result["simulated"]:
        lines += [
            f"Simulated workers, {result['cpus']} cores for all of them and PostgreSQL:",
            "",
            "| workers | s for a shard | s between polls | images | shards/s | of the ideal | cores of PostgreSQL "
            "| cores of the workers | connections | small job, median / most |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in result["simulated"]:
            times = (row["small_job_seconds_median"], row["small_job_seconds_max"])
            waits = " / ".join("-" if value is None else f"{value:.1f}" for value in times)
            lines.append(
                f"| {row['workers']} | {row['seconds_per_shard']:g} | {row['poll_seconds']:g} | {row['images']:,} "
                f"| {row['shards_per_second']:.1f} | {row['efficiency']:.0%} | {row['database_cores']:.2f} "
                f"| {row['worker_cores']:.2f} | {row['database_connections_most']} | {waits} s |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4], help="numbers of real workers")
    parser.add_argument(
        "--core-share", type=float, default=1.0, help="part of a core that a real worker may use, such as 0.25"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a dataset of the real workers")
    parser.add_argument("--simulated", type=int, nargs="*", default=[16, 32, 64], help="numbers of simulated workers")
    parser.add_argument("--images", type=int, default=1_000_000, help="the most images of a simulation")
    parser.add_argument(
        "--simulated-seconds",
        type=float,
        default=60.0,
        help="time of ideal workers; the largest number of workers makes --images",
    )
    parser.add_argument(
        "--shard-seconds", type=float, nargs="+", default=[5.0], help="times of 500 images on the simulated GPU"
    )
    parser.add_argument(
        "--poll-seconds", type=float, default=0.5, help="DERMIS_QUEUE_POLL_SECONDS of the simulated workers"
    )
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("--simulated-workers", nargs=5, dest="workers_command", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not 0 < options.core_share <= 1:
        parser.error("--core-share: write a number above 0 and at most 1")
    if options.workers_command:
        url, folder, count, seconds, poll_seconds = options.workers_command
        simulated_workers(url, Path(folder), int(count), float(seconds), float(poll_seconds))
        return
    stop_everything_on_sigterm()
    result: dict[str, Any] = {"cpus": os.cpu_count(), "real": [], "simulated": []}
    try:
        if options.workers:
            result["real"] = real_rates(
                open_bundle(options.bundle), options.workers, options.seconds, options.core_share
            )
        for seconds_per_shard in options.shard_seconds:
            for count in options.simulated:
                images = options.images
                if count < max(options.simulated):
                    shards = max(1, round(count * options.simulated_seconds / seconds_per_shard))
                    images = min(images, shards * _SHARD_IMAGES)
                result["simulated"].append(simulate(count, images, seconds_per_shard, options.poll_seconds))
                print(result["simulated"][-1], file=sys.stderr, flush=True)
    except MissingComponentError as error:
        raise SystemExit(str(error)) from None
    if options.markdown:
        options.markdown.write_text(report(result))
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
