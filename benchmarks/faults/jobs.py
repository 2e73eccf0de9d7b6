"""Requesting datasets while a cluster is disturbed, and comparing them with undisturbed ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.cluster import wait_for
from benchmarks.faults.cluster import PATIENCE_SECONDS, Cluster, Progress, Undisturbed
from benchmarks.faults.results import Result, add_faults

FORMATS = ("imagefolder", "webdataset", "parquet")


@dataclass(frozen=True)
class Extent:
    """How much is done.

    Attributes:
        kills: Processes and replicas that are killed, in each format.
        rounds: Faults, or times with faults, of each other scenario.
        strikes: Restarts of PostgreSQL in each phase, for each way to stop it.
        images: Images of a dataset.
        formats: The formats of scenarios that run in several.
    """

    kills: int = 50
    rounds: int = 10
    strikes: int = 5
    images: int = 1000
    formats: tuple[str, ...] = FORMATS

    def format_of(self, number: int) -> str:
        """The format of the scenario or part of a scenario with this number."""
        return self.formats[number % len(self.formats)]


Disturb = Callable[[], Mapping[str, int]]
Scenario = Callable[[Cluster, Undisturbed, Extent], Iterator[Result]]


def run_jobs(cluster: Cluster, undisturbed: Undisturbed, result: Result, disturb: Disturb, rounds: int) -> None:
    """Request datasets until the cluster was disturbed often enough at random moments, and compare each one.

    Args:
        cluster: The replicas.
        undisturbed: The files to compare with.
        result: The result, which is added to.
        disturb: Disturbs the cluster once, returns when it is over, and says how many faults of each kind were made.
        rounds: How often it has to make faults.
    """
    seed = made = 0

    def is_enough() -> bool:
        return made >= rounds and not result.missing()

    while not is_enough() and seed < 8 + 4 * rounds:
        seed += 1
        expected = undisturbed.files(result.file_format, seed)
        dataset = cluster.request(result.file_format, seed)
        result.datasets += 1
        pause = cluster.random.uniform(0.0, 4.0)
        started = time.monotonic()
        job = cluster.caller.job(dataset)
        while job["state"] in ("queued", "running") and time.monotonic() - started < PATIENCE_SECONDS:
            if not is_enough() and time.monotonic() - started >= pause:
                before = cluster.database.progress(dataset)
                began = time.monotonic()
                faults = disturb()
                add_faults(result, faults)
                cluster.restart_ended()
                if any(faults.values()):
                    made += 1
                    result.recovery_seconds.append(recovery(cluster, dataset, before, began))
                pause = time.monotonic() - started + cluster.random.uniform(0.2, 4.0)
            time.sleep(0.05)
            job = cluster.caller.job(dataset)
        compare(cluster, dataset, job, expected, result)


def recovery(cluster: Cluster, dataset: Mapping[str, Any], before: Progress, began: float) -> float:
    """Wait until a caller sees that a dataset goes on: it has more images, or the next state.

    Args:
        cluster: The replicas.
        dataset: The dataset.
        before: Its progress before it was disturbed.
        began: When it was disturbed, on the monotonic clock.

    Returns:
        The seconds since then.
    """

    def goes_on() -> bool:
        job = cluster.caller.job(dataset)
        cluster.restart_ended()
        return bool(job["state"] != before.state or job["progress"]["samples_done"] > before.samples_done)

    wait_for(goes_on, PATIENCE_SECONDS)
    return time.monotonic() - began


def end_of(cluster: Cluster, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Wait until a dataset has ended, and return it."""
    wait_for(lambda: cluster.caller.job(dataset)["state"] not in ("queued", "running"), PATIENCE_SECONDS)
    return cluster.caller.job(dataset)


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
