"""Scale-out: `python -m benchmarks.scale [--json] [--workers 1 2 4] [--simulated 8 16 32 64] [--images 1000000]`.

Two parts, both on a real PostgreSQL:

- real workers of a trained bundle, each pinned to a core of its own, with datasets in a real S3 server: images/s;
- simulated workers, which run the real queue with shards that only sleep for the time that a GPU would need: shards/s, the time
  that a small job takes beside a large one, and the processor time of the database and the workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import psutil  # type: ignore[import-untyped]

from benchmarks.cluster import Caller, Replica, wait_for
from benchmarks.components import MissingComponentError, free_port
from benchmarks.components.postgres import Postgres, running_postgres
from benchmarks.components.s3 import running_s3
from benchmarks.generation import DEMO
from dermis.bundle import Bundle, open_bundle
from dermis.dataset.request import classes_of
from services.jobs import execution, workflow
from services.jobs.context import JobContext, retry_transient
from services.jobs.service import JobService
from services.jobs.table import Job, JobTable
from services.jobs.turns import Turns
from services.settings import read_settings

REQUIRED_EFFICIENCY = 0.9
_SHARD_IMAGES = 500
_PROBE_SECONDS = 2.0


# Real workers


def real_rates(bundle: Bundle, workers: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Images/s of datasets by number of workers, the first of which are pinned to cores of their own."""
    results: list[dict[str, Any]] = []
    cores = sorted(os.sched_getaffinity(0))
    for count in workers:
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
            gateway = Replica(
                "gateway",
                folder / "gateway",
                free_port(),
                {**shared, "ROLE": "gateway", "INFERENCE": "false"},
                bucket.environment,
            )
            replicas = [gateway]
            for number in range(count):
                core = cores[number % len(cores)]
                replicas.append(
                    Replica(
                        f"worker-{number}",
                        folder / f"worker-{number}",
                        free_port(),
                        {**shared, "ROLE": "worker"},
                        bucket.environment,
                        prefix=("taskset", "-c", str(core)),
                    )
                )
            for replica in replicas:
                stack.callback(replica.kill)
                replica.start()
            for replica in replicas:
                replica.wait_until_ready()
            caller = Caller(gateway.url)
            _rate(caller, bundle, 300, 0)  # the first batches are slower
            images = max(600, round(_rate(caller, bundle, 300, 1) * seconds / 100) * 100)
            rates: list[float] = [_rate(caller, bundle, images, seed) for seed in (2, 3)]
            results.append({"workers": count, "cores": min(count, len(cores)), "images": images, "rates": rates})
    best = [max(row["rates"]) for row in results]
    for row, rate in zip(results, best, strict=True):
        row["efficiency"] = rate / best[0] / row["cores"]
    return results


def _rate(caller: Caller, bundle: Bundle, images: int, seed: int) -> float:
    """Images/s of one dataset, from its first image to its last."""
    classes = classes_of(bundle)
    body: dict[str, Any] = {
        "classes": {name: images // len(classes) for name in classes},
        "seed": seed,
        "shard_size": 50,
    }
    if bundle.classifier:
        body["classifier"] = {"score": False}
    dataset = caller.request("POST", "/v1/datasets", json=body).json()
    moments: list[tuple[float, int]] = []

    def is_generated() -> bool:
        progress = caller.job(dataset)["progress"]
        if progress["samples_done"] and (not moments or progress["samples_done"] > moments[-1][1]):
            moments.append((time.monotonic(), progress["samples_done"]))
        return bool(progress["samples_done"] == progress["samples_total"])

    wait_for(is_generated, 600, pause=0.2)
    wait_for(lambda: caller.job(dataset)["state"] == "succeeded", 600)
    caller.request("DELETE", dataset["links"]["self"])
    (start, first), (end, last) = moments[0], moments[-1]
    return (last - first) / (end - start)


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

    def run_shard(self, ctx: JobContext, job: Job, shard: int) -> None:
        """Sleep in a place of this worker, and record the progress as a real shard does."""
        with ctx.turns.of(job.tenant, lambda: None):
            time.sleep(self._seconds * min(1.0, job.samples_total / _SHARD_IMAGES))
        images = min(_SHARD_IMAGES, job.samples_total)
        retry_transient(ctx, lambda: ctx.table.progress(job.id, shard, images, finished=True))

    def finish(self, _ctx: JobContext, _job: Job) -> None:
        """Do nothing: there are no files."""


def simulated_jobs(
    url: str, folder: Path, name: str, seconds: float, *, role: Literal["gateway", "worker"]
) -> JobService:
    """The jobs of one process with sleeping shards, not started.

    Args:
        url: URL of the database.
        folder: Folder of the data folders of all processes.
        name: Name of the worker.
        seconds: Time that a shard of 500 images sleeps.
        role: A gateway only enqueues jobs.
    """
    settings = read_settings(
        role=role,
        database_url=url,
        storage_url=str(folder),
        data_dir=folder / name,
        executor_id=name,
        shard_concurrency=2,  # one works, and one waits for its place
    )
    execution.KINDS = {"dataset": SleepingShards(seconds)}
    ctx = JobContext(
        table=JobTable(url),
        models=cast(Any, None),
        inference=cast(Any, None),
        loop=asyncio.new_event_loop(),
        storage=str(folder),
        turns=Turns(1),
        projection_turns=Turns(1),
    )
    return JobService(settings, ctx)


def simulated_worker(url: str, folder: Path, name: str, seconds: float) -> None:
    """Run one worker with sleeping shards until stdin is closed."""
    jobs = simulated_jobs(url, folder, name, seconds, role="worker")
    jobs.start()
    sys.stdin.read()
    jobs.stop()


@contextmanager
def _simulated_workers(url: str, folder: Path, count: int, seconds: float) -> Iterator[list[psutil.Process]]:
    processes = []
    try:
        for number in range(count):
            command = [
                sys.executable,
                "-m",
                "benchmarks.scale",
                "--simulated-worker",
                url,
                str(folder),
                f"w{number}",
                str(seconds),
            ]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL))
        yield [psutil.Process(process.pid) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def simulate(count: int, images: int, seconds_per_shard: float) -> dict[str, Any]:
    """Run jobs of `images` in all with sleeping shards on `count` workers.

    Args:
        count: Number of workers. Each does one shard at a time.
        images: Number of images of all jobs together.
        seconds_per_shard: Time that a shard of 500 images sleeps.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server: Postgres = stack.enter_context(running_postgres())
        gateway = simulated_jobs(server.url, folder, "gateway", seconds_per_shard, role="gateway")
        gateway.start()
        stack.callback(gateway.stop)
        table = JobTable(server.url)
        stack.callback(table.close)
        workers = stack.enter_context(_simulated_workers(server.url, folder, count, seconds_per_shard))
        wait_for(lambda: len(table.live_executors()) == count + 1, 300)
        time.sleep(3)  # the queues are registered
        main = psutil.Process(int((server.folder / "data" / "postmaster.pid").read_text().splitlines()[0]))
        before = _cpu_seconds(main), sum(_cpu_seconds(each) for each in workers)
        started = time.monotonic()
        shards = images // _SHARD_IMAGES
        large = [_create(table, "large", part) for part in _parts(shards, 10)]
        waits, done = [], threading.Event()

        def probe() -> None:
            while not done.wait(_PROBE_SECONDS):
                asked = time.monotonic()
                job_id = _create(table, "small", 1, images=5)
                wait_for(lambda: table.get(job_id).state == "succeeded", 120, pause=0.05)  # type: ignore[union-attr]  # noqa: B023
                waits.append(time.monotonic() - asked)

        prober = threading.Thread(target=probe)
        prober.start()
        wait_for(lambda: all(table.get(each).state == "succeeded" for each in large), 3600, pause=0.5)  # type: ignore[union-attr]
        elapsed = time.monotonic() - started
        after = _cpu_seconds(main), sum(_cpu_seconds(each) for each in workers)
        done.set()
        prober.join()
        return {
            "workers": count,
            "images": images,
            "shards": shards,
            "seconds": elapsed,
            "shards_per_second": shards / elapsed,
            "ideal_shards_per_second": count / seconds_per_shard,
            "database_cores": (after[0] - before[0]) / elapsed,
            "worker_cores": (after[1] - before[1]) / elapsed,
            "small_job_seconds_median": statistics.median(waits) if waits else None,
            "small_job_seconds_max": max(waits) if waits else None,
        }


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


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4], help="numbers of real workers")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a dataset of the real workers")
    parser.add_argument(
        "--simulated", type=int, nargs="*", default=[8, 16, 32, 64], help="numbers of simulated workers"
    )
    parser.add_argument("--images", type=int, default=1_000_000, help="of the simulation")
    parser.add_argument("--shard-seconds", type=float, default=5.0, help="time of 500 images on the simulated GPU")
    parser.add_argument("--simulated-worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.simulated_worker:
        url, folder, name, seconds = options.simulated_worker
        simulated_worker(url, Path(folder), name, float(seconds))
        return
    result: dict[str, Any] = {"cpus": os.cpu_count(), "real": [], "simulated": []}
    try:
        if options.workers:
            result["real"] = real_rates(open_bundle(options.bundle), options.workers, options.seconds)
        for row in result["real"] if not options.json else []:
            print(
                f"{row['workers']} workers: {max(row['rates']):.1f} images/s, {row['efficiency']:.0%} for each core",
                flush=True,
            )
        for count in options.simulated:
            row = simulate(count, options.images, options.shard_seconds)
            result["simulated"].append(row)
            if not options.json:
                print(
                    ", ".join(
                        f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}"
                        for name, value in row.items()
                    ),
                    flush=True,
                )
    except MissingComponentError as error:
        raise SystemExit(str(error)) from None
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
