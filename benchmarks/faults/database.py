"""Faults of PostgreSQL: restarts in each phase of a job, and connections that are cut or stall."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from benchmarks.faults.cluster import PHASES, Cluster, Phase, Progress, Undisturbed
from benchmarks.faults.jobs import Extent, compare, end_of, recovery, run_jobs
from benchmarks.faults.results import Result, add_faults

Stop = Literal["fast", "immediate", "kill -9"]
STOPS: tuple[Stop, ...] = ("fast", "immediate", "kill -9")
_STRUCK: tuple[Phase, ...] = ("queueing", "running", "finishing")
RECOVERY = "recovery"


def restarts(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """PostgreSQL stopped in the modes fast and immediate, and killed, and started again after up to 5 seconds.

    Each dataset is struck while it is queued, while its shards are made, and while its files are collected; its phase is read
    from the jobs database right before. After each of these restarts PostgreSQL is stopped again as soon as it is back. This
    counts as a fault during recovery, and is done only if the job has not gone on by then.
    """
    for number, stop in enumerate(STOPS):
        result = Result(f"PostgreSQL restarted: {stop}", extent.format_of(number), (*_STRUCK, RECOVERY))
        seed = 0
        while (
            min(result.faults.get(kind, 0) for kind in result.required) < extent.strikes
            and seed < 8 + 4 * extent.strikes
        ):
            seed += 1
            _strike_each_phase(cluster, undisturbed, result, stop, seed)
        yield result


def _strike_each_phase(cluster: Cluster, undisturbed: Undisturbed, result: Result, stop: Stop, seed: int) -> None:
    expected = undisturbed.files(result.file_format, seed)
    dataset = cluster.request(result.file_format, seed)
    result.datasets += 1
    for phase in _STRUCK:
        before = _moment_in(cluster, dataset, phase)
        if before is None:
            continue
        began = time.monotonic()
        _restart(cluster, stop)
        add_faults(result, {phase: 1})
        time.sleep(cluster.random.uniform(0, 0.5))
        if cluster.database.progress(dataset) == before:
            _restart(cluster, stop)
            add_faults(result, {RECOVERY: 1})
        result.recovery_seconds.append(recovery(cluster, dataset, before, began))
    compare(cluster, dataset, end_of(cluster, dataset), expected, result)


def _moment_in(cluster: Cluster, dataset: Mapping[str, Any], phase: Phase) -> Progress | None:
    """Wait for a random moment in a phase of a job. None if the phase is over before it."""
    now = cluster.database.progress(dataset)
    shards = cluster.random.randint(now.shards_done, max(now.shards_done, now.shards_total - 2))
    pause = cluster.random.uniform(0, 0.5)
    seen: float | None = None
    while PHASES.index(now.phase) <= PHASES.index(phase):
        if now.phase == phase:
            seen = time.monotonic() if seen is None else seen
            if now.shards_done >= shards if phase == "running" else time.monotonic() - seen >= pause:
                return now
        time.sleep(0.01)
        now = cluster.database.progress(dataset)
    return None


def _restart(cluster: Cluster, stop: Stop) -> None:
    if stop == "kill -9":
        cluster.postgres.kill()
    else:
        cluster.postgres.stop(stop)
    time.sleep(cluster.random.uniform(0, 5))
    cluster.postgres.start()


def connections(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """Connections to PostgreSQL cut, and stalled, for up to 6 seconds."""
    modes: tuple[Literal["cut", "stall"], ...] = ("cut", "stall")
    for mode in modes:

        def disturb(mode: Literal["cut", "stall"] = mode) -> Mapping[str, int]:
            cluster.database_proxy.set_mode(mode)
            time.sleep(cluster.random.uniform(0.1, 6))
            cluster.database_proxy.set_mode("pass")
            return {mode: 1}

        result = Result(f"all connections to PostgreSQL: {mode}", extent.format_of(2))
        run_jobs(cluster, undisturbed, result, disturb, extent.rounds)
        yield result
