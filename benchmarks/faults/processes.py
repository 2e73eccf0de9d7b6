"""Faults of processes: kill -9, a lost machine, a worker that is paused beyond its lease, and a clock that jumps."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from benchmarks.cluster import wait_for
from benchmarks.faults.cluster import LEASE_SECONDS, Cluster, Undisturbed
from benchmarks.faults.jobs import Extent, run_jobs
from benchmarks.faults.results import Result

_TAKEOVER_SECONDS = 60.0  # a paused worker can hold a lock, which PostgreSQL ends after 30 s
_CLOSED_SECONDS = 1.0  # within which the proxy sees that the connections of a killed process have ended
_CLOCK_SECONDS = 20.0  # libfaketime reads its file every two seconds; a lease is renewed every second
_JUMPS = {"+1 h": 3600, "-1 h": -3600}


def kills(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """Kill -9 of the gateway's process, a generator, the process that runs jobs, and a whole replica, in each format."""
    targets: dict[str, Callable[[], bool]] = {
        "gateway": lambda: cluster.gateway.kill("gateway"),
        "generator": lambda: cluster.random.choice(cluster.workers).kill("Generator"),
        "worker": lambda: cluster.random.choice(cluster.workers).kill("gateway"),
        "whole replica": lambda: cluster.random.choice(cluster.replicas).kill(),
    }

    for file_format in extent.formats:
        result = Result("kill -9", file_format, tuple(targets))

        def kill(result: Result = result) -> Mapping[str, int]:
            while True:
                # Each kind comes once before any comes twice: as many kills as there are kinds make all of them.
                name = cluster.random.choice(result.missing() or list(targets))
                if targets[name]():
                    return {name: 1}
                time.sleep(0.2)  # it is being restarted
                cluster.restart_ended()

        run_jobs(cluster, undisturbed, result, kill, extent.kills)
        yield result


def lost_machines(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """A worker is killed and PostgreSQL does not learn of it, as when a machine loses power: its transactions stay open."""
    result = Result("loss of a worker's machine: its connections stay open", extent.format_of(2))

    def lose() -> Mapping[str, int]:
        cluster.database_proxy.reports_end = False
        cluster.random.choice(cluster.workers).kill()
        time.sleep(_CLOSED_SECONDS)
        cluster.database_proxy.reports_end = True
        return {"machine": 1}

    run_jobs(cluster, undisturbed, result, lose, extent.rounds)
    yield result


def paused_workers(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """A busy worker stopped by SIGSTOP until another one has taken over its work: then both believe that it is theirs."""
    result = Result("SIGSTOP of a worker until another one has taken over its work", extent.format_of(0))
    taken_over = 0

    def pause() -> Mapping[str, int]:
        nonlocal taken_over
        busy = [worker for worker in cluster.workers if worker.name in cluster.database.busy_workers()]
        if not busy:
            return {}
        worker = cluster.random.choice(busy)
        before = cluster.takeovers(but=worker)
        worker.signal_all(signal.SIGSTOP)
        try:
            wait_for(lambda: cluster.takeovers(but=worker) > before, _TAKEOVER_SECONDS, pause=0.3)
            time.sleep(cluster.random.uniform(0, LEASE_SECONDS))
            number = cluster.takeovers(but=worker) - before
        finally:
            worker.signal_all(signal.SIGCONT)
        taken_over += number
        return {"pause with a takeover": 1} if number > 0 else {}

    run_jobs(cluster, undisturbed, result, pause, extent.rounds)
    result.note = f"{taken_over} workflows taken over (dermis_lease_takeovers_total of the others)"
    yield result


def clock_library() -> Path | None:
    """The library that changes the clock of a process (PyPI package libfaketime); None if it is not installed.

    Debian's libfaketime 0.9.10 cannot be used: with it, `time.sleep` of Python 3.11 fails if the monotonic clock is left alone.
    """
    found = find_spec("libfaketime")
    if found is None or found.origin is None:
        return None
    library = Path(found.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    return library if library.exists() else None


def clock_jumps(cluster: Cluster, undisturbed: Undisturbed, extent: Extent) -> Iterator[Result]:
    """The clock of all processes of a worker set an hour forward or back, and corrected again, while it works.

    All calls that read the time of day are changed, and the monotonic clock is not, as when the clock of a machine is set. A
    jump counts when the lease that the worker writes has shown it.
    """
    result = Result("clock of a worker wrong by an hour, then corrected", extent.format_of(1), tuple(_JUMPS))
    library = clock_library()
    if library is None:
        result.not_run = "libfaketime (PyPI, the extra `cluster`) is not installed"
        yield result
        return
    worker = cluster.workers[0]
    worker.stop()
    offset = worker.folder / "clock"
    offset.write_text("+0\n")
    usual = worker.environment
    worker.environment = {
        **usual,
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",  # the times of files that exist do not change when a clock is set
    }
    worker.start()
    worker.wait_until_ready()

    def shows(seconds: int) -> bool:
        difference = cluster.database.clock_difference(worker.name)
        return difference is not None and abs(difference - seconds) < 60

    def jump() -> Mapping[str, int]:
        name = cluster.random.choice(list(_JUMPS))
        offset.write_text(f"{_JUMPS[name]:+d}\n")
        seen = wait_for(lambda: shows(_JUMPS[name]), _CLOCK_SECONDS, pause=0.05)
        time.sleep(cluster.random.uniform(0, 4 * LEASE_SECONDS))
        offset.write_text("+0\n")
        seen = wait_for(lambda: shows(0), _CLOCK_SECONDS, pause=0.05) and seen
        return {name: 1} if seen else {}

    run_jobs(cluster, undisturbed, result, jump, extent.rounds)
    waits = (worker.folder / "log").read_text(errors="replace").count("the clock of this machine differs")
    result.note = f"S3 refused a call of the worker {waits} times because of its clock"
    worker.stop()
    worker.environment = usual
    worker.start()
    worker.wait_until_ready()
    yield result
