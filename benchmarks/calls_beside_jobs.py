"""Calls for one image while a dataset is generated: `python -m benchmarks.calls_beside_jobs [--json] [--seconds 60]`.

One real service. Single images are requested one after another, first on the idle service, then while a large dataset is
generated; and the rate of the dataset is measured with and without these calls.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import DEMO
from benchmarks.cluster import NO_TLS, Caller, Replica, stop_everything_on_sigterm, wait_for
from benchmarks.components import free_port
from dermis.bundle import open_bundle
from dermis.dataset.request import classes_of

_PAUSE_SECONDS = 0.2
_FIRST_IMAGES = 100


@dataclass
class Calls:
    """Times of calls for one image in milliseconds."""

    number: int
    p50: float
    p95: float
    most: float


def image_calls(url: str, label: str, seconds: float, seed: int) -> Calls:
    """Request single images for a time, with a short pause between them."""
    times: list[float] = []
    deadline = time.monotonic() + seconds
    with httpx.Client(base_url=url, timeout=120, trust_env=False, verify=NO_TLS) as client:
        while time.monotonic() < deadline:
            began = time.perf_counter()
            body = {"classes": {label: 1}, "seed": seed + len(times)}
            client.post("/v1/images", json=body, headers={"Accept": "image/png"}).raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
            time.sleep(_PAUSE_SECONDS)
    p50, p95 = np.percentile(times, [50, 95])
    return Calls(len(times), float(p50), float(p95), max(times))


def measure(bundle: Path, seconds: float) -> dict[str, Any]:
    """Run all phases.

    Raises:
        ServiceNotReadyError: The service did not start.
        RuntimeError: The dataset was not generated while the calls were made.
    """
    labels = classes_of(open_bundle(str(bundle)))
    with tempfile.TemporaryDirectory() as folder:
        values = {"BUNDLES": str(bundle), "LOG_LEVEL": "WARNING"}
        service = Replica("service", Path(folder) / "data", free_port(), values, {})
        service.start()
        try:
            service.wait_until_ready()
            caller = Caller(service.url)

            def rate_during(action: Any) -> float:
                begin, first = time.monotonic(), done()
                action()
                return float((done() - first) / (time.monotonic() - begin))

            def done() -> int:
                return int(caller.job(dataset)["progress"]["samples_done"])

            image_calls(service.url, labels[0], 10, 0)  # the first ones are slower
            alone = image_calls(service.url, labels[0], seconds, 1000)
            body = {"classes": {label: 100_000 // len(labels) for label in labels}, "seed": 1}
            dataset = caller.request("POST", "/v1/datasets", json=body).json()
            if not wait_for(lambda: done() >= _FIRST_IMAGES, 120):
                raise RuntimeError(f"{_FIRST_IMAGES} images were not generated in 120 s")
            dataset_alone = rate_during(lambda: time.sleep(seconds))
            beside: list[Calls] = []
            dataset_beside = rate_during(lambda: beside.append(image_calls(service.url, labels[0], seconds, 1_000_000)))
            if caller.job(dataset)["state"] != "running":
                raise RuntimeError("the dataset ended during the measurement; choose fewer --seconds")
            caller.request("DELETE", dataset["links"]["self"])
        finally:
            service.stop()
    return {
        "calls_alone": asdict(alone),
        "calls_beside": asdict(beside[0]),
        "dataset_images_per_second_alone": dataset_alone,
        "dataset_images_per_second_beside": dataset_beside,
    }


def report(result: Mapping[str, Any]) -> str:
    """The results as Markdown, for docs/benchmarks-service.md."""
    lines = ["| single images | calls | p50, ms | p95, ms | longest, ms |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, key in (("on an idle service", "calls_alone"), ("beside a dataset", "calls_beside")):
        calls = result[key]
        lines.append(f"| {name} | {calls['number']} | {calls['p50']:.0f} | {calls['p95']:.0f} | {calls['most']:.0f} |")
    alone, beside = (result[f"dataset_images_per_second_{name}"] for name in ("alone", "beside"))
    return "\n".join(lines) + f"\n\nDataset: {alone:.1f} images/s, beside the calls {beside:.1f}.\n"


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--bundle", type=Path, default=DEMO)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each of the three phases")
    options = parser.parse_args()
    stop_everything_on_sigterm()
    result = measure(options.bundle, options.seconds)
    print(json.dumps(result) if options.json else report(result))


if __name__ == "__main__":
    main()
