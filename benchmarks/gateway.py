"""Overhead of access control on a call: `python -m benchmarks.gateway [--json] [--bundle DIR] [--calls N] [--rounds N]`.

Two real services with the same bundle are started, one without access control and one with API keys. Rounds of calls alternate
between them, on one connection each: a single image of /v1/images, and /v1/models, in which a small difference shows better.
The median of each round is taken, and the difference of the smallest medians is the overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from benchmarks.dataset_job import launched
from benchmarks.generation import DEMO
from dermis.bundle import Bundle, open_bundle
from dermis.dataset.request import classes_of

REQUIRED_MILLISECONDS = 2.0


def median_milliseconds(call: Callable[[], httpx.Response], calls: int) -> float:
    """Median time of a call in ms."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call().raise_for_status()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure(bundle: Bundle, calls: int, rounds: int) -> dict[str, Any]:
    """Measure the medians of both services in ms, and their difference."""
    body = {"classes": {classes_of(bundle)[0]: 1}}
    image = {"Accept": "image/png"}
    requests: dict[str, Callable[[httpx.Client], httpx.Response]] = {
        "image": lambda client: client.post("/v1/images", json=body, headers=image),
        "models": lambda client: client.get("/v1/models"),
    }
    with ExitStack() as stack:
        clients = {}
        for auth in ("none", "keys"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            clients[auth] = stack.enter_context(launched(bundle, folder, AUTH=auth))
            if auth == "keys":
                clients[auth].headers["Authorization"] = f"Bearer {_new_key(folder)}"
        medians: dict[str, dict[str, list[float]]] = {name: {auth: [] for auth in clients} for name in requests}
        for client in clients.values():
            median_milliseconds(lambda client=client: requests["image"](client), 20)  # type: ignore[misc]
        for _ in range(rounds):
            for name, send in requests.items():
                for auth, client in clients.items():
                    medians[name][auth].append(
                        median_milliseconds(lambda send=send, client=client: send(client), calls)  # type: ignore[misc]
                    )
    overhead = {name: min(each["keys"]) - min(each["none"]) for name, each in medians.items()}
    return {
        "overhead_milliseconds": overhead,
        "met": overhead["image"] < REQUIRED_MILLISECONDS,
        "medians_milliseconds": medians,
        "calls": calls,
        "bundle": bundle.name,
        "cpus": os.cpu_count(),
    }


def _new_key(folder: Path) -> str:
    """A key of the service whose data is in `folder`."""
    command = "from commands.main import main; main()"
    arguments = ["keys", "create", "--data-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
        text=True,
    )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--bundle", default=str(DEMO))
    parser.add_argument("--calls", type=int, default=200, help="in a round, of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result = measure(open_bundle(options.bundle), options.calls, options.rounds)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'median of a call, ms':<24}{'none':>8}{'keys':>8}{'overhead':>10}")
    for name, each in result["medians_milliseconds"].items():
        row = (min(each["none"]), min(each["keys"]), result["overhead_milliseconds"][name])
        print(f"{name:<24}{row[0]:>8.2f}{row[1]:>8.2f}{row[2]:>10.3f}")
    print(f"met (below {REQUIRED_MILLISECONDS:g} ms on an image): {'yes' if result['met'] else 'NO'}")


if __name__ == "__main__":
    main()
