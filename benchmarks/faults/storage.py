"""Faults of the storage: errors of S3, and a full disk."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cluster import Caller, Replica, wait_for
from benchmarks.components import free_port
from benchmarks.components.proxies import FAULTS
from benchmarks.faults.cluster import Cluster, Undisturbed, request_of
from benchmarks.faults.jobs import Extent, run_jobs
from benchmarks.faults.results import Result, add_faults

_SHARE = 0.35


def faults_of_s3(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """A third of the requests to S3 fail for up to 5 seconds, again and again.

    They are answered 500 or 503, or not at all, or the connection ends after half of the upload or of the answer.
    """
    proxy = cluster.s3_proxy
    for file_format in extent.formats:
        result = Result("a third of the requests to S3 for 1 to 5 s", file_format, FAULTS)
        times = 0

        def disturb() -> Mapping[str, int]:
            nonlocal times
            times += 1
            before = dict(proxy.counts)
            proxy.share = _SHARE
            time.sleep(cluster.random.uniform(1, 5))
            proxy.share = 0.0
            return {fault: number - before[fault] for fault, number in proxy.counts.items()}

        run_jobs(cluster, undisturbed, result, disturb, max(1, extent.rounds // 2))
        result.note = f"{times} times with faults"
        yield result


def full_disk(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """One machine with SQLite, on a tmpfs that another program fills.

    The dataset must fail with `storage-full` and leave no files, or be completed. When not a byte is free, not even that can be
    recorded, so it waits until space is free.
    """
    for free, name in ((2 << 20, "little space"), (0, "no space")):
        result = Result(f"disk of one machine (SQLite) with {name}", "webdataset")
        folder = Path(tempfile.mkdtemp(prefix="dermis-full-"))
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            result.not_run = "a tmpfs cannot be mounted"
            shutil.rmtree(folder, ignore_errors=True)
            yield result
            continue
        settings = {"BUNDLES": str(cluster.bundle.parent), "LOG_LEVEL": "WARNING", "MIN_FREE_BYTES": str(4 << 20)}
        one = Replica("one", folder / "data", free_port(), settings, {"OMP_NUM_THREADS": "1"})
        try:
            one.start()
            one.wait_until_ready()
            _fill_disk(one, folder, free, undisturbed.files("webdataset", 1), extent.images, result)
        finally:
            one.stop()
            subprocess.run(["umount", str(folder)], check=False)
            shutil.rmtree(folder, ignore_errors=True)
        yield result


def _fill_disk(
    one: Replica, folder: Path, free: int, expected: Mapping[str, bytes], images: int, result: Result
) -> None:
    caller, filler = Caller(one.url), folder / "filler"
    body = request_of("webdataset", 1, images)

    def has_ended(dataset: Mapping[str, Any]) -> bool:
        return caller.job(dataset)["state"] not in ("queued", "running")

    dataset = caller.request("POST", "/v1/datasets", json=body).json()
    result.datasets += 1
    wait_for(lambda: caller.job(dataset)["progress"]["samples_done"] > 0, 120)
    with suppress(OSError), filler.open("wb") as file:
        while shutil.disk_usage(folder).free > free:
            file.write(b"\0" * (1 << 16))
            file.flush()
    if has_ended(dataset):
        result.unclear.append("the dataset had ended before the disk was full")
    add_faults(result, {"full disk": 1})
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
        if (folder / "data" / "datasets" / dataset["id"]).exists():
            result.unclear.append("files of the failed dataset were left")
        result.note = "the dataset failed with storage-full and was requested again"
        dataset = caller.request("POST", "/v1/datasets", json=body).json()
        result.datasets += 1
        wait_for(lambda: has_ended(dataset), 300)
    result.recovery_seconds.append(time.monotonic() - began)
    if caller.job(dataset)["state"] != "succeeded":
        result.lost += 1
        result.unclear.append(f"after the disk was full the dataset is {caller.job(dataset)}")
    elif caller.files(dataset) != expected:
        result.different += 1
