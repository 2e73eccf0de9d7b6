"""Rate of a stream for PyTorch as a share of the generator's own: `python -m benchmarks.stream [--json] [--images N]`.

A real service is started on a free port, and `SyntheticIterable` reads from it as a training does, in batches of 64. Rounds
alternate between the generator alone in this process, with the backend of the service, and the stream. Nothing trains, so the
difference is the work of the service and of the client besides generating: transfer, HTTP and tensors. The best round of each
counts, so that short activity of other programs does not distort it.

During a stream torch uses one thread, as it does in workers of a DataLoader and with OMP_NUM_THREADS=1. Further threads would
join the images of a batch and wait actively for more work, on the cores of the generator: `--torch-threads` measures it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dermis_client import DermisClient
from dermis_client.torch import SyntheticIterable
from torch.utils.data import DataLoader

from benchmarks import DEMO
from benchmarks.dataset_job import generator_rate, launched
from dermis.bundle import Bundle, open_bundle
from dermis.cpus import cpu_identity
from dermis.dataset.request import classes_of
from dermis.synthesizer import Synthesizer

REQUIRED_FRACTION = 0.9


def stream_rate(
    url: str, bundle: Bundle, count: int, seed: int, options: dict[str, Any], workers: int = 0, threads: int = 1
) -> float:
    """Images/s of a stream, from its first request to its last image."""
    stream = SyntheticIterable(
        dict.fromkeys(classes_of(bundle), 1.0), samples=count, seed=seed, client=partial(DermisClient, url), **options
    )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        images = sum(len(labels) for _, labels in DataLoader(stream, batch_size=64, num_workers=workers))
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads_before)
    if images != count:
        raise SystemExit(f"the stream gave {images} of {count} images")
    return count / seconds


def measure(
    location: str, count: int, rounds: int, options: dict[str, Any], workers: int = 0, threads: int = 1
) -> dict[str, Any]:
    """Measure one bundle with streams of `count` images."""
    bundle = open_bundle(location)
    alone, streams = [], []
    with tempfile.TemporaryDirectory() as folder, launched(bundle, Path(folder)) as client:
        url = str(client.base_url)
        stream_rate(url, bundle, 128, 0, options, workers, threads)
        with Synthesizer(bundle) as synthesizer:
            generator_rate(synthesizer, 64)
            for seed in range(1, rounds + 1):
                alone.append(generator_rate(synthesizer, count))
                streams.append(stream_rate(url, bundle, count, seed, options, workers, threads))
    fraction = max(streams) / max(alone)
    return {
        "fraction_of_generator_rate": fraction,
        "met": fraction >= REQUIRED_FRACTION,
        "stream_images_per_second": streams,
        "generator_images_per_second": alone,
        "images": count,
        "bundle": bundle.name,
        "resolution": bundle.generator.img_resolution,
        "options": options,
        "workers": workers,
        "torch_threads": threads,
        "cpus": os.cpu_count(),
        "processor": cpu_identity(),
    }


def main() -> None:
    """Measure and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--images", type=int, default=640, help="in one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=32, help="images of one call")
    parser.add_argument("--prefetch", type=int, default=3, help="calls at the same time")
    parser.add_argument("--workers", type=int, default=0, help="processes of the DataLoader; 0 for this one")
    parser.add_argument("--torch-threads", type=int, default=1, help="threads of torch in this process during a stream")
    parser.add_argument("--image-format", help="png, jpeg or webp: image files instead of pixels")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args()
    options: dict[str, Any] = {"chunk": arguments.chunk, "prefetch": arguments.prefetch}
    if arguments.image_format:
        options["image_format"] = arguments.image_format
    result = measure(
        arguments.bundle, arguments.images, arguments.rounds, options, arguments.workers, arguments.torch_threads
    )
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    for name in ("generator", "stream"):
        rates = ", ".join(f"{rate:.1f}" for rate in result[f"{name}_images_per_second"])
        print(f"{name:10} {rates} images/s")
    share, met = result["fraction_of_generator_rate"], "yes" if result["met"] else "NO"
    print(f"share      {share:.1%} (required {REQUIRED_FRACTION:.0%}: {met})")


if __name__ == "__main__":
    main()
