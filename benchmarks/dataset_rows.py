"""Memory to finish and verify a dataset by its number of images: `python -m benchmarks.dataset_rows [--json] [--rows N ...]`.

Shards of tiny images of one colour are written without a generator; with --gate each image has random embeddings and
probabilities, as if index and classifier of the bundle had measured it. The dataset is then finished and verified in new
processes. The peak of their memory is that of Linux (VmHWM), and `before` is the memory when all modules are imported and the
bundle is open.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dermis.authenticity.attack import exposure
from dermis.authenticity.index import Nearest, open_index
from dermis.bundle import open_bundle
from dermis.dataset.manifest import ARCHIVE, finalize
from dermis.dataset.plan import DatasetPlan, plan_for
from dermis.dataset.request import DatasetRequest
from dermis.dataset.shards import write_shard
from dermis.dataset.store import Store
from dermis.dataset.verify import verify
from dermis.imaging import Images

SIDE = 16
IDENTITY = {"device": "none"}
_STEPS = ("finish", "verify", "verify the zip")


def request_of(rows: int, file_format: str, gate: bool) -> DatasetRequest:
    """Return the request of a dataset of two classes."""
    values: dict[str, Any] = {"model": "demo", "format": file_format, "noise_mode": "const"}
    values["classes"] = {"benign": rows - rows // 2, "malignant": rows // 2}
    values |= {"privacy": {"gate": "authentic"}} if gate else {"classifier": {"score": False}}
    return DatasetRequest.model_validate(values)


def paint(indices: Sequence[int], labels: Sequence[int]) -> Images:
    """Images of one colour, which differ by index."""
    del labels
    colours = np.asarray(indices, np.uint32).astype("<u4").view(np.uint8).reshape(len(indices), 1, 1, 4)[..., :3]
    return np.broadcast_to(colours, (len(indices), SIDE, SIDE, 3))


def write_shards(plan: DatasetPlan, store: Store) -> None:
    """Write all shards."""
    random = np.random.default_rng(0)
    dim = plan.authenticity.dim if plan.authenticity is not None else 1

    def examine(images: Images) -> Nearest:
        count = len(images)
        embeddings = random.normal(size=(count, dim)).astype(np.float32)
        return Nearest(np.full(count, 30.0, np.float32), np.ones(count, np.float32), embeddings)

    for shard in range(plan.shards):
        write_shard(
            plan,
            shard,
            paint,
            store,
            score=lambda images: random.random(len(images)),
            examine=examine,
            identity=IDENTITY,
            batch_size=256,
        )


def memory(field: str) -> int:
    """Return a value of the memory of this process in bytes: VmRSS now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def run_step(step: str, options: argparse.Namespace) -> dict[str, float]:
    """Run a step in this process, and return its time and memory."""
    (rows,) = options.rows
    bundle = open_bundle(options.bundle)
    plan = plan_for(request_of(rows, options.format, options.gate), bundle)
    index = open_index(bundle, device="cpu", threads=1) if plan.gated else None
    expose = None if index is None else partial(exposure, index)
    actions: dict[str, Callable[[], object]] = {
        "finish": lambda: finalize(plan, Store(options.out), bundle, IDENTITY, expose),
        "verify": lambda: verify(options.out),
        "verify the zip": lambda: verify(options.out / ARCHIVE),
    }
    before, started = memory("VmRSS"), time.perf_counter()
    actions[step]()
    return {"before": before, "peak": memory("VmHWM"), "seconds": time.perf_counter() - started}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all steps for each number of rows, each step in a process of its own."""
    results: list[dict[str, Any]] = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            plan = plan_for(request_of(rows, options.format, options.gate), open_bundle(options.bundle))
            write_shards(plan, Store(folder))
            for step in _STEPS[: 3 if options.format == "imagefolder" else 2]:
                command = [sys.executable, "-m", "benchmarks.dataset_rows", "--step", step, "--rows", str(rows)]
                command += ["--format", options.format, "--bundle", options.bundle, "--out", folder]
                command += ["--gate"] if options.gate else []
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append({"rows": rows, "step": step, **json.loads(done.stdout)})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list instead of the table")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--format", default="parquet", choices=["imagefolder", "webdataset", "parquet"])
    parser.add_argument("--gate", action="store_true", help="with probabilities and a gate")
    parser.add_argument("--bundle", default="bundles/demo")
    parser.add_argument("--folder", type=Path, help="where the datasets are written; default: the temporary folder")
    parser.add_argument("--step", choices=_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        print(json.dumps(run_step(options.step, options)))
        return
    results = measure(options)
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'rows':>10}  {'step':<14}  {'before, MB':>10}  {'peak, MB':>10}  {'bytes/row':>10}  {'seconds':>8}")
    for row in results:
        grown = row["peak"] - row["before"]
        print(
            f"{row['rows']:>10,}  {row['step']:<14}  {row['before'] / 1e6:>10,.0f}  {row['peak'] / 1e6:>10,.0f}  "
            f"{grown / row['rows']:>10,.0f}  {row['seconds']:>8.1f}"
        )


if __name__ == "__main__":
    main()
