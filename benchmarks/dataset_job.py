"""Overhead of a dataset job over generation: `python -m benchmarks.dataset_job [--json] [--bundle DIR] [--images N]`.

A real service is started on a free port. Rounds alternate between the generator alone (in this process, with the backend and
batch size of the jobs) and a job requested over HTTP: shards are encoded, hashed and written, files assembled, and
downloaded. The job's time runs from the request until its state is "succeeded". It is also divided: the time until all images
are generated, which grows with their number, and the end, which measures a sample for the report whatever their number. The
download is timed separately. The best round of each counts, so that short activity of other programs does not distort the
fraction.
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
from dataclasses import dataclass
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


@dataclass(frozen=True)
class JobTimes:
    """Times of one job.

    Attributes:
        seconds: From the request to the finished dataset.
        end_seconds: The last part of them, after all images were generated; known to half a second.
        download_rate: MB/s of downloading and hashing its files.
    """

    seconds: float
    end_seconds: float
    download_rate: float


def run_job(client: httpx.Client, bundle: Bundle, count: int, seed: int) -> JobTimes:
    """Request a dataset of `count` images, wait for it, download it and delete it."""
    classes = classes_of(bundle)
    counts = {name: count // len(classes) + (i < count % len(classes)) for i, name in enumerate(classes)}
    # Scoring is measured in benchmarks/classification.py.
    no_scores = {"classifier": {"score": False}} if bundle.classifier else {}
    start = generated = time.time()
    response = client.post("/v1/datasets", json={"classes": counts, "seed": seed, **no_scores})
    response.raise_for_status()
    job = response.json()
    while job["state"] in ("queued", "running"):
        time.sleep(0.5)  # polling slows the job down; the time of its end is in the response
        job = client.get(job["links"]["self"]).json()
        if job["progress"]["samples_done"] < count:
            generated = time.time()
    if job["state"] != "succeeded":
        raise SystemExit(f"the job ended as {job['state']}: {job['error']}")
    finished = datetime.datetime.fromisoformat(job["finished_at"]).timestamp()
    begun, size = time.perf_counter(), 0
    for file in client.get(job["links"]["files"]).json()["data"]:
        digest = hashlib.sha256()
        with client.stream("GET", file["url"]) as stream:
            for piece in stream.iter_bytes():
                digest.update(piece)
        if digest.hexdigest() != file["sha256"]:
            raise SystemExit(f"{file['name']}: its SHA-256 differs from the one that the service states")
        size += file["bytes"]
    download_rate = size / 1e6 / (time.perf_counter() - begun)
    client.delete(job["links"]["self"])
    return JobTimes(finished - start, max(0.0, finished - generated), download_rate)


def measure(bundle: Bundle, images: int | None, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure one bundle, with jobs of `images`, or of as many images as the generator makes in `seconds`."""
    with Synthesizer(bundle) as synthesizer, tempfile.TemporaryDirectory() as folder:
        identity = dict(synthesizer.identity)
        generator_rate(synthesizer, BATCH)
        count = images or max(200, round(generator_rate(synthesizer, 4 * BATCH) * seconds / 100) * 100)
        with launched(bundle, Path(folder)) as client:
            run_job(client, bundle, 12 * BATCH, 0)  # the first calls of a process are slow
            alone, jobs = [], []
            for seed in range(1, rounds + 1):
                alone.append(generator_rate(synthesizer, count // 2))
                jobs.append(run_job(client, bundle, count, seed))
    best = min(jobs, key=lambda job: job.seconds)
    fraction = count / best.seconds / max(alone)
    return {
        "fraction_of_generator_rate": fraction,
        "met": fraction >= REQUIRED_FRACTION,
        "fraction_until_generated": count / (best.seconds - best.end_seconds) / max(alone),
        "job_images_per_second": count / best.seconds,
        "job_end_seconds": best.end_seconds,
        "generator_images_per_second": max(alone),
        "all_job_rates": [count / job.seconds for job in jobs],
        "all_generator_rates": alone,
        "download_megabytes_per_second": max(job.download_rate for job in jobs),
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
        "until all are generated": f"{result['fraction_until_generated']:.1%}; the end takes {result['job_end_seconds']:.1f} s",
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
