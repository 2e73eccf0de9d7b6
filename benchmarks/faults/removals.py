"""Faults while datasets are cancelled and deleted: nothing of them may be left."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.cluster import wait_for
from benchmarks.faults.cluster import PATIENCE_SECONDS, Cluster, Undisturbed
from benchmarks.faults.jobs import Extent, end_of
from benchmarks.faults.results import Result, add_faults

_CANCELLING, _DELETING = "cancelling", "deleting"
_GONE_SECONDS = 60.0  # a killed worker's last request can still arrive at the storage


def removals(cluster: Cluster, _undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """Kill -9 of a worker's replica while a dataset is cancelled, and of the gateway's process while one is deleted.

    The caller repeats calls that were not answered. Then neither the bucket nor the database may have anything of the dataset.
    """
    result = Result("kill -9 while a dataset is cancelled or deleted", extent.format_of(1), (_CANCELLING, _DELETING))
    for number in range(2 * extent.rounds):
        dataset = cluster.request(result.file_format, number)
        result.datasets += 1
        active = number % 2 == 0
        job = _with_images(cluster, dataset) if active else end_of(cluster, dataset)
        goes_on = active and job["state"] == "running" and job["progress"]["samples_done"] > 0
        if not goes_on and job["state"] != "succeeded":
            result.lost += 1
            result.unclear.append(f"{dataset['id']} is {job['state']}: {json.dumps(job.get('error'))[:300]}")
        _remove(cluster, dataset, result, active)
    yield result


def _with_images(cluster: Cluster, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Wait until a dataset has images or has ended, and for a moment more, and return it."""

    def has_images() -> bool:
        progress = cluster.database.progress(dataset)
        return progress.samples_done > 0 or progress.phase == "ended"

    wait_for(has_images, PATIENCE_SECONDS)
    time.sleep(cluster.random.uniform(0, 0.5))
    return cluster.caller.job(dataset)


def _remove(cluster: Cluster, dataset: Mapping[str, Any], result: Result, active: bool) -> None:
    began, address = time.monotonic(), dataset["links"]["self"]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cluster.caller.request, "DELETE", address)
        time.sleep(cluster.random.uniform(0, 1.0 if active else 0.2))
        killed = cluster.random.choice(cluster.workers).kill() if active else cluster.gateway.kill("gateway")
        cluster.restart_ended()
        cancelled = call.result().status_code == 202
    if cancelled == active:  # otherwise it ended before the call, and the kill hit nothing, or it has not ended
        add_faults(result, {_CANCELLING if active else _DELETING: int(killed)})
    if cancelled:
        if not wait_for(lambda: cluster.caller.job(dataset)["state"] == "cancelled", PATIENCE_SECONDS):
            result.unclear.append(f"{dataset['id']} was cancelled and is {cluster.caller.job(dataset)['state']}")
        if not wait_for(lambda: not cluster.stored(dataset), _GONE_SECONDS):
            result.unclear.append(f"{dataset['id']} is cancelled and has {cluster.stored(dataset)[:3]}")
        cluster.caller.request("DELETE", address)
    if not wait_for(lambda: not cluster.stored(dataset) and not cluster.database.rows_of(dataset), _GONE_SECONDS):
        left = f"{cluster.stored(dataset)[:3]} and {cluster.database.rows_of(dataset)} rows"
        result.unclear.append(f"{dataset['id']} is deleted, and left are {left}")
    result.recovery_seconds.append(time.monotonic() - began)
