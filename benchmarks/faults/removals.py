"""Faults while datasets are cancelled and deleted: nothing of them may be left."""

from __future__ import annotations

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
        if number % 2:
            end_of(cluster, dataset)
        else:
            _wait_for_images(cluster, dataset)
        _remove(cluster, dataset, result, active=number % 2 == 0)
    yield result


def _wait_for_images(cluster: Cluster, dataset: Mapping[str, Any]) -> None:
    wait_for(lambda: cluster.database.progress(dataset).samples_done > 0, PATIENCE_SECONDS)
    time.sleep(cluster.random.uniform(0, 0.5))


def _remove(cluster: Cluster, dataset: Mapping[str, Any], result: Result, active: bool) -> None:
    began, address = time.monotonic(), dataset["links"]["self"]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(cluster.caller.request, "DELETE", address)
        time.sleep(cluster.random.uniform(0, 1.0 if active else 0.2))
        killed = cluster.random.choice(cluster.workers).kill() if active else cluster.gateway.kill("gateway")
        cluster.restart_ended()
        cancelled = call.result().status_code == 202
    add_faults(result, {_CANCELLING if cancelled else _DELETING: int(killed)})
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
