"""Delay of one tenant by the queue of another: `python -m benchmarks.fair_queue [--json] [--bundle DIR] [--rounds N]`.

A real service with API keys is started. A tenant requests datasets of 100 images: first alone, then while another tenant has
100,000 images queued, as one dataset and as 20. The time of a dataset runs from the request until its state is "succeeded".
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks import DEMO
from benchmarks.dataset_job import launched
from benchmarks.gateway import new_key
from dermis.bundle import Bundle, open_bundle
from dermis.dataset.request import classes_of

REQUIRED_DELAY = 2.0
_SMALL, _QUEUED = 100, 100_000
_MANY = 20


def create(client: httpx.Client, headers: dict[str, str], bundle: Bundle, images: int, seed: int) -> dict[str, Any]:
    """Request a dataset and return it."""
    classes = classes_of(bundle)
    counts = {name: images // len(classes) for name in classes}
    response = client.post("/v1/datasets", json={"classes": counts, "seed": seed}, headers=headers)
    response.raise_for_status()
    job: dict[str, Any] = response.json()
    return job


def seconds_of(client: httpx.Client, headers: dict[str, str], bundle: Bundle, seed: int) -> float:
    """Seconds from a request to the end of a small dataset, which is then deleted."""
    start = time.time()
    job = create(client, headers, bundle, _SMALL, seed)
    while job["state"] in ("queued", "running"):
        time.sleep(0.5)  # polling slows the job down; the time of its end is in the response
        job = client.get(job["links"]["self"], headers=headers).json()
    if job["state"] != "succeeded":
        raise SystemExit(f"the dataset ended as {job['state']}: {job['error']}")
    client.delete(job["links"]["self"], headers=headers)
    return datetime.datetime.fromisoformat(job["finished_at"]).timestamp() - start


def measure(bundle: Bundle, rounds: int) -> dict[str, Any]:
    """Measure the seconds of small datasets alone and beside the queue of another tenant."""
    seeds = iter(range(1, 1_000_000))
    with tempfile.TemporaryDirectory() as folder, launched(bundle, Path(folder), AUTH="keys") as client:
        small, large = ({"Authorization": f"Bearer {new_key(Path(folder), tenant)}"} for tenant in ("small", "large"))
        seconds_of(client, small, bundle, next(seeds))  # the first calls of a process are slow
        seconds: dict[str, list[float]] = {"alone": [], "beside_one_dataset": [], "beside_20_datasets": []}
        for name, count in zip(seconds, (0, 1, _MANY), strict=True):
            queued = [create(client, large, bundle, _QUEUED // count, next(seeds)) for _ in range(count)]
            while (
                queued and client.get(queued[0]["links"]["self"], headers=large).json()["progress"]["samples_done"] == 0
            ):
                time.sleep(0.2)
            seconds[name] = [seconds_of(client, small, bundle, next(seeds)) for _ in range(rounds)]
            for job in queued:
                client.delete(job["links"]["self"], headers=large)
            while queued and any(_is_active(client, large, job) for job in queued):
                time.sleep(0.2)
    alone = statistics.median(seconds["alone"])
    delays = {name: statistics.median(each) / alone - 1 for name, each in seconds.items() if name != "alone"}
    return {
        "delays_in_times_alone": delays,
        "met": max(delays.values()) <= REQUIRED_DELAY,
        "seconds": seconds,
        "bundle": bundle.name,
        "cpus": os.cpu_count(),
    }


def _is_active(client: httpx.Client, headers: dict[str, str], job: dict[str, Any]) -> bool:
    response = client.get(job["links"]["self"], headers=headers)
    return response.status_code == 200 and response.json()["state"] in ("queued", "running", "cancelling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result = measure(open_bundle(options.bundle), options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for name, each in result["seconds"].items():
        delay = result["delays_in_times_alone"].get(name)
        text = "" if delay is None else f", delayed by {delay:.2f} times the time alone (required {REQUIRED_DELAY:g})"
        print(f"{name:<20}  median {statistics.median(each):.1f} s (from {min(each):.1f} to {max(each):.1f}){text}")
    print(f"met                   {'yes' if result['met'] else 'NO'}")


if __name__ == "__main__":
    main()
