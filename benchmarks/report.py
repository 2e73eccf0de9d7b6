"""Cost of the report of a dataset: `python -m benchmarks.report [--json] [--bundle B] [--images N] [--gate]`.

Makes a dataset of N images (10,000) in a temporary folder with all processors of this machine, in one process: generation with
the classifier's scores, and the gate with --gate. Then it measures how long finishing takes and how much of that is the report:
measuring the sample, comparing, and writing. The share is that of the whole dataset.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from unittest import mock

from dermis.authenticity.attack import exposure
from dermis.authenticity.checker import Checker
from dermis.bundle import open_bundle
from dermis.classifier.onnx_session import Classifier
from dermis.cpus import available_cpus
from dermis.dataset import manifest
from dermis.dataset.plan import BATCH, plan_for
from dermis.dataset.privacy import examiner
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.synthesizer import Synthesizer

BUNDLE = Path("bundles/demo")
IMAGES = 10_000
T = TypeVar("T")


def measure(path: Path, images: int, gate: bool) -> dict[str, Any]:
    """Make a dataset and return the seconds of its parts."""
    bundle = open_bundle(path)
    names = bundle.class_names or ("image",)
    counts = {name: images // len(names) for name in names}
    request = DatasetRequest.model_validate(
        {"model": bundle.name, "classes": counts, **({"privacy": {"on_reject": "flag"}} if gate else {})}
    )
    plan = plan_for(request, bundle)
    seconds = {"report": 0.0}

    def timed(function: Callable[..., T]) -> Callable[..., T]:
        def call(*arguments: Any, **options: Any) -> T:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds["report"] += time.perf_counter() - start

        return call

    with (
        TemporaryDirectory() as folder,
        Synthesizer(bundle) as synthesizer,
        Classifier(bundle) as classifier,
        Checker(bundle) as checker,
    ):
        store, identity = Store(folder), dict(synthesizer.identity)
        synthesizer.images([0] * BATCH, range(BATCH), [0] * BATCH)  # warm-up, which is not measured
        checker.nearest(synthesizer.images([0] * BATCH, range(BATCH), [0] * BATCH))
        start = time.perf_counter()
        for shard in range(plan.shards):
            write_shard(
                plan,
                shard,
                lambda indices, labels: synthesizer.images([request.seed] * len(indices), indices, labels),
                store,
                score=lambda pictures: classifier.classify(pictures, features=False).calibrated,
                examine=examiner(plan, checker),
                identity=identity,
                batch_size=max(BATCH, synthesizer.preferred_batch),
            )
        seconds["images"] = time.perf_counter() - start
        start = time.perf_counter()
        parts = [
            mock.patch.object(manifest, name, timed(getattr(manifest, name)))
            for name in ("measure", "make_report", "report_page")
        ]
        with parts[0], parts[1], parts[2]:
            expose = partial(exposure, checker.index) if gate else None
            manifest.finalize(plan, store, bundle, identity, expose, examine=checker.nearest)
        seconds["finish"] = time.perf_counter() - start
        sample = json.loads(store.read(manifest.REPORT))["sample"]
    total = seconds["images"] + seconds["finish"]
    return {
        "images": plan.samples,
        "sample": sample,
        "gate": gate,
        "reference": bundle.reference is not None,
        "cpus": available_cpus(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "report_share": round(seconds["report"] / total, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--gate", action="store_true", help="Compare every image with the training images.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.bundle, arguments.images, arguments.gate)
    if arguments.json:
        print(json.dumps(result, indent=2))
        return
    seconds = result["seconds"]
    print(
        f"{result['images']:,} images in {seconds['images']} s, finishing {seconds['finish']} s, of which the report "
        f"{seconds['report']} s (sample of {result['sample']:,}): {result['report_share']:.1%} of the whole"
    )


if __name__ == "__main__":
    main()
