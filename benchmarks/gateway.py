"""Overhead of access control and quotas: `python -m benchmarks.gateway [--json] [--bundle DIR] [--calls N] [--rounds N]`.

Three real services with the same bundle are started: without access control, with API keys, and with API keys and quotas.
Rounds of calls alternate between them, on one connection each: a single image of /v1/images, and /v1/models, in which a small
difference shows better. The median of each round is taken, and the difference of the smallest medians is the overhead.
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

from benchmarks import DEMO
from benchmarks.dataset_job import launched
from dermis.bundle import Bundle, open_bundle
from dermis.dataset.request import classes_of

REQUIRED_MILLISECONDS = 2.0
_QUOTAS = {"*": {"images_per_day": 10_000_000, "upload_megapixels_per_minute": 10_000, "active_jobs": 100}}
_SERVICES = {
    "none": {"AUTH": "none"},
    "keys": {"AUTH": "keys"},
    "quotas": {"AUTH": "keys", "QUOTAS": json.dumps(_QUOTAS)},
}


def median_milliseconds(call: Callable[[], httpx.Response], calls: int) -> float:
    """Median time of a call in ms."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call().raise_for_status()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure(bundle: Bundle, calls: int, rounds: int) -> dict[str, Any]:
    """Measure the medians of the services in ms, and their differences from the one without access control."""
    body = {"classes": {classes_of(bundle)[0]: 1}}
    image = {"Accept": "image/png"}
    requests: dict[str, Callable[[httpx.Client], httpx.Response]] = {
        "image": lambda client: client.post("/v1/images", json=body, headers=image),
        "models": lambda client: client.get("/v1/models"),
    }
    with ExitStack() as stack:
        clients = {}
        for service, settings in _SERVICES.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            clients[service] = stack.enter_context(launched(bundle, folder, **settings))
            if settings["AUTH"] == "keys":
                clients[service].headers["Authorization"] = f"Bearer {new_key(folder, 'default')}"
        medians: dict[str, dict[str, list[float]]] = {name: {each: [] for each in clients} for name in requests}
        for client in clients.values():
            median_milliseconds(lambda client=client: requests["image"](client), 20)  # type: ignore[misc]
        for _ in range(rounds):
            for name, send in requests.items():
                for service, client in clients.items():
                    medians[name][service].append(
                        median_milliseconds(lambda send=send, client=client: send(client), calls)  # type: ignore[misc]
                    )
    overhead = {
        name: {service: min(each[service]) - min(each["none"]) for service in ("keys", "quotas")}
        for name, each in medians.items()
    }
    return {
        "overhead_milliseconds": overhead,
        "met": overhead["image"]["quotas"] < REQUIRED_MILLISECONDS,
        "medians_milliseconds": medians,
        "calls": calls,
        "bundle": bundle.name,
        "cpus": os.cpu_count(),
    }


def new_key(folder: Path, tenant: str) -> str:
    """Create a key of the service whose data is in `folder`."""
    command = "from commands.main import main; main()"
    arguments = ["keys", "create", "--tenant", tenant, "--data-dir", str(folder)]
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
    print(f"{'median of a call, ms':<24}{'none':>8}{'keys':>16}{'keys and quotas':>20}")
    for name, each in result["medians_milliseconds"].items():
        print(f"{name:<24}{min(each['none']):>8.2f}", end="")
        for service, width in (("keys", 7), ("quotas", 11)):
            print(f"{min(each[service]):>{width}.2f} ({result['overhead_milliseconds'][name][service]:+.3f})", end="")
        print()
    print(f"met (below {REQUIRED_MILLISECONDS:g} ms on an image): {'yes' if result['met'] else 'NO'}")


if __name__ == "__main__":
    main()
