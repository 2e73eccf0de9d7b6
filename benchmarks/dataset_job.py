"""Overhead of a dataset job over generation: `python -m benchmarks.dataset_job [--json] [--bundle DIR] [--images N]`.

A real service is started on a free port. Rounds alternate between the generator alone (in this process, with the backend and
batch size of the jobs) and a job requested over HTTP: shards are encoded, hashed and written, files assembled, and
downloaded. The job's time runs from the request until its state is "succeeded"; the download is timed separately. The best
round of each counts, so that short activity of other programs does not distort the fraction.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks import DEMO
from benchmarks.cluster import Replica, ServiceNotReadyError
from benchmarks.components import free_port
from benchmarks.generation import automatic_config, random_bundle
from dermis.bundle import Bundle, open_bundle
from dermis.dataset.plan import BATCH
from dermis.dataset.request import classes_of
from dermis.synthesizer import Synthesizer

REQUIRED_FRACTION = 0.85


@contextmanager
def launched(bundle: Bundle, folder: Path, **more: str) -> Iterator[httpx.Client]:
    """Start the service with `bundle`, its data in `folder` and `more` settings, and yield a client once it is ready."""
    settings = {"BUNDLES": bundle.location, "LOG_LEVEL": "WARNING", **more}
    of_caller = {name: value for name, value in os.environ.items() if name.startswith("DERMIS_")}
    replica = Replica("benchmark", folder, free_port(), settings, of_caller)
    try:
        replica.start()
        replica.wait_until_ready()
        with httpx.Client(base_url=replica.url, timeout=60, trust_env=False) as client:
            yield client
    except ServiceNotReadyError as error:
        raise SystemExit(str(error)) from None
    finally:
        replica.stop()


def generator_rate(synthesizer: Synthesizer, count: int) -> float:
    """Images/s of the generator alone, in batches of the size that shards use."""
    labels = [i % max(1, len(synthesizer.bundle.class_names)) for i in range(BATCH)]
    start = time.perf_counter()
    for first in range(0, count, BATCH):
        synthesizer.images([1] * BATCH, range(first, first + BATCH), labels)
    return -(-count // BATCH) * BATCH / (time.perf_counter() - start)


def job_rate(client: httpx.Client, bundle: Bundle, count: int, seed: int) -> tuple[float, float]:
    """Images/s from the request to the finished dataset, and MB/s of downloading and hashing it."""
    classes = classes_of(bundle)
    counts = {name: count // len(classes) + (i < count % len(classes)) for i, name in enumerate(classes)}
    # Scoring is measured in benchmarks/classification.py.
    no_scores = {"classifier": {"score": False}} if bundle.classifier else {}
    start = time.time()
    response = client.post("/v1/datasets", json={"classes": counts, "seed": seed, **no_scores})
    response.raise_for_status()
    job = response.json()
    while job["state"] in ("queued", "running"):
        time.sleep(0.5)  # polling slows the job down; the time of its end is in the response
        job = client.get(job["links"]["self"]).json()
    if job["state"] != "succeeded":
        raise SystemExit(f"the job ended as {job['state']}: {job['error']}")
    seconds = datetime.datetime.fromisoformat(job["finished_at"]).timestamp() - start
    start, size = time.perf_counter(), 0
    for file in client.get(job["links"]["files"]).json()["data"]:
        digest = hashlib.sha256()
        with client.stream("GET", file["url"]) as stream:
            for piece in stream.iter_bytes():
                digest.update(piece)
        if digest.hexdigest() != file["sha256"]:
            raise SystemExit(f"{file['name']}: its SHA-256 differs from the one that the service states")
        size += file["bytes"]
    rate = size / 1e6 / (time.perf_counter() - start)
    client.delete(job["links"]["self"])
    return count / seconds, rate


def measure(bundle: Bundle, images: int | None, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure one bundle, with jobs of `images`, or of as many images as the generator makes in `seconds`."""
    with Synthesizer(bundle) as synthesizer, tempfile.TemporaryDirectory() as folder:
        identity = dict(synthesizer.identity)
        generator_rate(synthesizer, BATCH)
        count = images or max(200, round(generator_rate(synthesizer, 4 * BATCH) * seconds / 100) * 100)
        with launched(bundle, Path(folder)) as client:
            job_rate(client, bundle, 12 * BATCH, 0)  # the first calls of a process are slow
            alone, jobs = [], []
            for seed in range(1, rounds + 1):
                alone.append(generator_rate(synthesizer, count // 2))
                jobs.append(job_rate(client, bundle, count, seed))
    fraction = max(rate for rate, _ in jobs) / max(alone)
    return {
        "fraction_of_generator_rate": fraction,
        "met": fraction >= REQUIRED_FRACTION,
        "job_images_per_second": max(rate for rate, _ in jobs),
        "generator_images_per_second": max(alone),
        "all_job_rates": [rate for rate, _ in jobs],
        "all_generator_rates": alone,
        "download_megabytes_per_second": max(rate for _, rate in jobs),
        "images": count,
        "batch": BATCH,
        "resolution": bundle.generator.img_resolution,
        "bundle": bundle.name,
        "device": identity.pop("device"),
        "cpus": os.cpu_count(),
        "versions": identity,
    }


def show(result: dict[str, Any]) -> None:
    rows = {
        "generator": f"{result['bundle']}, {result['resolution']} px, on {result['device']} ({result['cpus']} CPUs)",
        "generator alone, images/s": f"{result['generator_images_per_second']:.1f} (batch {result['batch']})",
        "job, images/s": f"{result['job_images_per_second']:.1f} ({result['images']} images)",
        "fraction": f"{result['fraction_of_generator_rate']:.1%} (required {REQUIRED_FRACTION:.0%})",
        "download, MB/s": f"{result['download_megabytes_per_second']:.0f}",
        "met": "yes" if result["met"] else "NO",
    }
    print("\n".join(f"{name:<26}  {value}" for name, value in rows.items()), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--resolution", type=int, default=256, help="of the network with random weights")
    parser.add_argument(
        "--bundle", help=f"a trained bundle, which is also measured and reported as `trained` ({DEMO} if it exists)"
    )
    parser.add_argument("--images", type=int, help="in one job; default: what the generator makes in --seconds")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(Path(folder) / "random", automatic_config(options.resolution))
        result = measure(bundle, options.images, options.seconds, options.rounds)
    trained = options.bundle or (str(DEMO) if DEMO.exists() else None)
    if trained is not None:
        result["trained"] = measure(open_bundle(trained), options.images, options.seconds, options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    for row in [result, *([result["trained"]] if "trained" in result else [])]:
        show(row)


if __name__ == "__main__":
    main()
