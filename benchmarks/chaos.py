"""Faults on real components, and what they cost: `python -m benchmarks.chaos [--only NAME ...] [--kills 50] [--json FILE]`.

A gateway and workers with a small bundle run on a real PostgreSQL and a real S3 server (SeaweedFS). Datasets of 1,000 images
with a gate are requested, parts of the system are killed or disturbed while they are made, and each finished dataset is
compared, byte by byte, with the one that the library makes without a service. A client that repeats failed requests must notice
nothing.

Needs PostgreSQL's server, the extras `cluster` and `cpu`, and for the full disk the right to mount a tmpfs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from benchmarks.cluster import stop_everything_on_sigterm
from benchmarks.components import MissingComponentError
from benchmarks.faults import database, processes, removals, storage
from benchmarks.faults.cluster import running_cluster
from benchmarks.faults.jobs import Extent, Scenario
from benchmarks.faults.results import Result, report

SCENARIOS: Mapping[str, Scenario] = {
    "kills": processes.kills,
    "lost": processes.lost_machines,
    "database": database.restarts,
    "connections": database.connections,
    "storage": storage.faults_of_s3,
    "paused": processes.paused_workers,
    "clock": processes.clock_jumps,
    "removals": removals.removals,
    "disk": storage.full_disk,
}


def run(names: list[str], extent: Extent, seed: int) -> Iterator[Result]:
    """Run scenarios and yield their results.

    Args:
        names: Keys of `SCENARIOS`.
        extent: How much is done.
        seed: Of the random moments and faults.

    Raises:
        MissingComponentError: PostgreSQL or the S3 server is not installed.
    """
    with running_cluster(seed, extent.images) as (cluster, undisturbed):
        for name in names:
            for result in SCENARIOS[name](cluster, undisturbed, extent):
                result.unclear += [f"{text} ({count} times)" for text, count in cluster.caller.unclear.items()]
                cluster.caller.unclear.clear()
                yield result


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(SCENARIOS), help="these scenarios; default: all")
    parser.add_argument("--kills", type=int, default=50, help="in each format")
    parser.add_argument("--rounds", type=int, default=10, help="faults of each other scenario, or times with faults")
    parser.add_argument(
        "--strikes", type=int, default=5, help="restarts of PostgreSQL in each phase, for each way to stop it"
    )
    parser.add_argument("--images", type=int, default=1000, help="of a dataset")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file to which the results are written after each scenario")
    parser.add_argument("--markdown", type=Path, help="file for the table, written after each scenario")
    options = parser.parse_args()
    stop_everything_on_sigterm()
    extent = Extent(options.kills, options.rounds, options.strikes, options.images)
    results: list[Result] = []
    try:
        for result in run(options.only or list(SCENARIOS), extent, options.seed):
            results.append(result)
            print(f"{result.scenario}, {result.file_format}: {result.not_run or result.kinds}", flush=True)
            if not result.not_run:
                print(
                    f"    {result.datasets} datasets: {result.lost} lost, {result.twice} twice, {result.different} different; "
                    f"recovery, median / most: {result.recovery}; {'met' if result.met else 'NOT MET'} {result.note}",
                    flush=True,
                )
                for line in result.failures():
                    print(f"    NOT MET: {line}", flush=True)
            if options.json:
                documents = [asdict(each) | {"failures": each.failures()} for each in results]
                options.json.write_text(json.dumps(documents, indent=1))
            if options.markdown:
                options.markdown.write_text(report(results))
    except MissingComponentError as error:
        raise SystemExit(str(error)) from None
    print(report(results))
    return 0 if all(result.met or result.not_run for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
