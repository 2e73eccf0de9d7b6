"""Mixed load for a long time, then too much load: `python -m benchmarks.soak [--minutes 60] [--json FILE] [--markdown FILE]`.

One real service (all processes, access control, SQLite and a folder, or PostgreSQL with `--postgresql` and S3 with `--s3`)
serves the demo bundle. The load is that of `benchmarks.load`: single images, four images, classifications, comparisons of
generated images, edits, lists, small datasets that are followed, downloaded and deleted, and a few projections, of three
tenants. After a warm-up, the capacity is measured: the rate rises until the service no longer completes 95 % of each operation.
Then follow 80 % of the largest rate that it kept up with, for the given time, and 200 %.

Required: no error; no process that was restarted; no growth of memory after the first fifth of the time at 80 %, in any
process; every call that is refused is answered 429 or 503 with Retry-After because of the load and nothing else, and accepted
calls take at 200 % at most half as long again as at 80 %. That is not required of the jobs themselves: datasets and projections
yield to calls, so they wait. Those that are open at the end of a load may end; times of their calls then are left out. The
first half minute at 200 % is reported apart: the service needs some seconds to tell an overload from a burst, which waits in
its queue. The load runs on the same machine, in its own process. With `--separate-cores` it has the last core for itself and
the service has the others; otherwise at 200 % the load takes more of the processors from the service.

Needs Linux and locust (the extra `soak`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from benchmarks import DEMO
from benchmarks.cluster import Replica, ServiceNotReadyError, stop_everything_on_sigterm
from benchmarks.components import MissingComponentError, free_port
from benchmarks.components.postgres import running_postgres
from benchmarks.components.s3 import running_s3
from benchmarks.memory import MAX_GROWTH, Growth, MemorySampler, Process, name_of

ROOT = Path(__file__).resolve().parents[1]
REFUSALS = (429, 503)
SOAK_SHARE, OVERLOAD_SHARE = 0.8, 2.0
FIRST_RATE, RATE_STEP = 6.0, 1.2
"""Operations/s with which the measurement of the capacity begins, and the ratio of each rate to the one before."""
KEPT_UP = 0.95
"""The part of each operation that a service which keeps up completes."""
MAX_SLOWER = 1.5
"""Time of accepted calls at 200 %, in times that at 80 %, for the median and for p95."""
_MAX_STEPS = 20
ONSET_SECONDS = 30.0
"""Time at 200 % in which the service may take calls for a burst."""
_COMPARED_CALLS = 100  # of a route in each phase; fewer say little about p95
_JOB_ROUTES = ("GET /v1/datasets/ID/events",)
"""Answers that last as long as a job."""
_TENANTS = ("radiology", "derma", "research")
_SAMPLES = 360  # of memory, at most one a second
_DATASETS_AT_ONCE, _PROJECTIONS_AT_ONCE = "8", "4"
_REPLACED = "upload decoder"
"""Processes that the service ends itself, such as at a file that takes too long."""


@dataclass
class Route:
    """The calls of one route in one phase. Times are those of accepted calls in milliseconds, None without one.

    `refusals` counts the refused ones by the kind of their problem.
    """

    calls: int
    refused: int
    refusals: dict[str, int]
    wrong: list[str]
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]]) -> Route:
        """From lines of `benchmarks.load`: time, route, status, milliseconds, error, kind of a refusal."""
        refused = [row for row in rows if row[2] in REFUSALS and not row[4]]
        times = [row[3] for row in rows if row[2] not in REFUSALS and not row[4]]
        p50, p95, p99 = (float(each) for each in np.percentile(times, [50, 95, 99])) if times else (None,) * 3
        wrong = [f"{row[2]}: {row[4]}" for row in rows if row[4]]
        return cls(len(rows), len(refused), dict(Counter(row[5] for row in refused)), wrong, p50, p95, p99)


@dataclass
class Phase:
    """What one run of the load gave.

    `rate` is the rate in operations/s that was asked for, `begun` and `completed` are what became of it. `kept_up` is the least
    of all operations' completed part, in the second half.
    """

    name: str
    rate: float
    seconds: float
    completed: float
    begun: float
    kept_up: float
    routes: dict[str, Route]
    statuses: dict[str, int]

    @property
    def is_kept_up(self) -> bool:
        """Whether the service keeps up. One that is too slow keeps callers waiting, so that they begin fewer operations."""
        return self.kept_up >= KEPT_UP and self.begun >= KEPT_UP * self.rate

    @property
    def wrong(self) -> list[str]:
        """All errors."""
        return [f"{name}: {text}" for name, route in self.routes.items() for text in route.wrong]

    @property
    def refused(self) -> int:
        """Number of refused calls."""
        return sum(route.refused for route in self.routes.values())

    @property
    def refusals(self) -> dict[str, int]:
        """Number of refused calls by the kind of their problem."""
        total: Counter[str] = Counter()
        for route in self.routes.values():
            total.update(route.refusals)
        return dict(total)

    @property
    def calls(self) -> int:
        """Number of calls."""
        return sum(route.calls for route in self.routes.values())


def kept_up(operations: Sequence[Sequence[Any]], middle: float, end: float) -> float:
    """The least of all operations' completed part in a period: those that were completed, of those that began.

    One that was begun before the period may be completed in it: as many as are still running at its end, if the service keeps
    up. One more or less is chance, so one is added to those completed.

    Args:
        operations: Lines of `benchmarks.load`: "operation", name, begin, end, whether it was completed.
        middle: The beginning of the period.
        end: Its end.
    """
    begun = Counter(row[1] for row in operations if middle <= row[2] < end)
    completed = Counter(row[1] for row in operations if middle <= row[3] < end and row[4])
    return min(((completed[name] + 1) / count for name, count in begun.items()), default=0.0)


def phase_of(name: str, rate: float, path: Path, begin: float = 0.0, end: float = math.inf) -> Phase:
    """Read what `benchmarks.load` has written of the calls and operations that began in a part of the time.

    After the end of the load, operations go on that were begun before. Of their calls then, on a service without load, only
    errors are counted, in the part that lasts until this end.

    Args:
        name: Name of the phase.
        rate: The rate in operations/s that was asked for.
        path: The file.
        begin: Seconds from the begin of the load to that of the part.
        end: Seconds to the end of the part; default: to the end of the load.
    """
    calls: list[list[Any]] = []
    rows: dict[str, list[list[Any]]] = defaultdict(list)
    marks: dict[str, float] = {}
    operations: list[list[Any]] = []
    statuses: Counter[str] = Counter()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row[0] in ("began", "ended"):
                marks[row[0]] = row[1]
            elif row[0] == "operation":
                operations.append(row)
            else:
                calls.append(row)
    first, last = marks["began"] + begin, min(marks["ended"], marks["began"] + end)
    for row in calls:
        start = row[0] - row[3] / 1000
        if first <= start < last or (row[4] and last == marks["ended"] <= start):
            rows[row[1]].append(row)
            statuses[str(row[2])] += 1
    seconds = last - first
    completed = [row for row in operations if first <= row[3] <= last and row[4]]
    begun = [row for row in operations if first <= row[2] <= last]
    routes = {route: Route.of(rows[route]) for route in sorted(rows)}
    part = kept_up(operations, first + seconds / 2, last)
    return Phase(name, rate, seconds, len(completed) / seconds, len(begun) / seconds, part, routes, dict(statuses))


@dataclass
class Service:
    """The running service, the file with the keys of its tenants, and the program that pins the load to its core."""

    replica: Replica
    keys: Path
    pin_load: Sequence[str]


@contextmanager
def running_service(
    bundle: Path, settings: Mapping[str, str], *, postgresql: bool, s3: bool, separate_cores: bool
) -> Iterator[Service]:
    """A real service with the bundle and a key for each tenant.

    Args:
        bundle: The bundle to serve.
        settings: Further settings, without the prefix `DERMIS_`.
        postgresql: Whether jobs are in a real PostgreSQL instead of SQLite.
        s3: Whether files are in a real S3 server instead of a folder.
        separate_cores: Whether the load has the last core for itself and the service has the others. PostgreSQL and the S3
            server may use all.

    Raises:
        MissingComponentError: PostgreSQL, the S3 server or locust is not installed.
        ServiceNotReadyError: The service did not start.
        ValueError: There is only one core.
    """
    if find_spec("locust") is None:
        raise MissingComponentError("locust (the extra `soak`) is not installed")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dermis-soak-")))
        values = {
            "BUNDLES": str(bundle),
            "AUTH": "keys",
            "LOG_LEVEL": "WARNING",
            "MAX_ACTIVE_DATASETS": _DATASETS_AT_ONCE,
            "MAX_ACTIVE_PROJECTIONS": _PROJECTIONS_AT_ONCE,
            **settings,
        }
        if postgresql:
            values["DATABASE_URL"] = stack.enter_context(running_postgres()).url
        environment: Mapping[str, str] = {}
        if s3:
            bucket = stack.enter_context(running_s3())
            values["STORAGE_URL"], environment = bucket.url("datasets"), bucket.environment
        pin_service, pin_load = _separate_cores() if separate_cores else ((), ())
        replica = Replica("soak", folder / "data", free_port(), values, environment, prefix=pin_service)
        stack.callback(replica.stop)
        replica.start()
        replica.wait_until_ready()
        keys = folder / "keys"
        url = values.get("DATABASE_URL") or f"sqlite:///{replica.folder}/jobs.sqlite"
        keys.write_text("\n".join(_new_keys(url)))
        yield Service(replica, keys, pin_load)


def _separate_cores() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The programs that run the service on all cores but the last, and the load on that one."""
    *first, last = [str(core) for core in sorted(os.sched_getaffinity(0))]
    if not first:
        raise ValueError("--separate-cores needs two cores")
    return ("taskset", "-c", ",".join(first)), ("taskset", "-c", last)


def _new_keys(url: str) -> list[str]:
    from services.gateway.auth.keys import KeyTable
    from services.gateway.auth.principal import DEFAULT_SCOPES

    with closing(KeyTable(url)) as table:
        return [
            table.create(tenant=each, name="soak", scopes=DEFAULT_SCOPES, created_by="soak")[1] for each in _TENANTS
        ]


def make_load(service: Service, name: str, seconds: float, rate: float) -> Phase:
    """Run `benchmarks.load` against a service, and return what it gave.

    Raises:
        RuntimeError: The load has ended with an error of its own.
    """
    return phase_of(name, rate, run_load(service, name, seconds, rate))


def run_load(service: Service, name: str, seconds: float, rate: float) -> Path:
    """Run `benchmarks.load` against a service, and return its file.

    Raises:
        RuntimeError: The load has ended with an error of its own.
    """
    out = service.keys.with_name(f"{name.replace(' ', '-')}.jsonl")
    options = ["--url", service.replica.url, "--keys", str(service.keys), "--seconds", str(seconds), "--out", str(out)]
    options += ["--rate", str(rate)]
    command = [*service.pin_load, sys.executable, "-m", "benchmarks.load", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks.load failed: {done.stderr[-3000:]}")
    return out


def measure_capacity(service: Service, first_rate: float, rate_step: float, seconds: float) -> list[Phase]:
    """Raise the rate step by step, until the service does not keep up.

    Raises:
        RuntimeError: It does not keep up with the first rate.
    """
    steps: list[Phase] = []
    while len(steps) < _MAX_STEPS and (not steps or steps[-1].is_kept_up):
        rate = first_rate * rate_step ** len(steps)
        steps.append(make_load(service, f"{rate:.1f} operations a second", seconds, rate))
        print(
            f"{steps[-1].name}: {steps[-1].begun:.1f} begun, {steps[-1].kept_up:.0%} of the slowest kind completed",
            file=sys.stderr,
            flush=True,
        )
    if not steps[0].is_kept_up:
        raise RuntimeError(f"the service does not keep up with {first_rate} operations/s; choose a lower --first-rate")
    return steps


@dataclass
class Result:
    """All phases, and what became of the processes."""

    warm_up: Phase
    steps: list[Phase]
    capacity: float
    soak: Phase
    onset: Phase
    overload: Phase
    overload_share: float
    growth: list[Growth]
    memory: list[Process]
    restarted: list[str]
    log: list[str]

    def failures(self, max_growth: float = MAX_GROWTH) -> list[str]:
        """What was required and is not met, apart from times.

        Args:
            max_growth: Growth of memory in an hour, as a part of it, that counts as none.
        """
        phases = (self.warm_up, *self.steps, self.soak, self.onset, self.overload)
        failures = [f"{phase.name}: {text}" for phase in phases for text in phase.wrong]
        failures += [
            f"{each.name} grows by {each.slope:.1f} MB/h (95 %: {each.low:.1f} to {each.high:.1f}) from {each.pss:.0f} MB"
            for each in self.growth
            if each.grows(max_growth)
        ]
        failures += [f"{name} was restarted" for name in self.restarted]
        return failures

    def not_compared(self) -> list[str]:
        """The routes of which no time is required: those that last as long as a job, and those with few accepted calls."""
        return [
            name
            for name, after in self.overload.routes.items()
            if name in _JOB_ROUTES
            or (before := self.soak.routes.get(name)) is None
            or min(route.calls - route.refused for route in (before, after)) < _COMPARED_CALLS
        ]

    def slower(self) -> list[str]:
        """The routes whose accepted calls take too long in the overload."""
        texts = []
        for name in self.overload.routes.keys() - set(self.not_compared()):
            before, after = self.soak.routes[name], self.overload.routes[name]
            for label, slow, usual in (("p50", after.p50, before.p50), ("p95", after.p95, before.p95)):
                if slow is not None and usual is not None and slow > MAX_SLOWER * usual:
                    texts.append(f"{name}: {label} of {slow:.0f} ms in the overload, {usual:.0f} ms at 80 %")
        return sorted(texts)

    def document(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self) | {
            "cpus": os.cpu_count(),
            "failures": [*self.failures(), *self.slower()],
            "not_compared": self.not_compared(),
        }


def lasting_processes(replica: Replica) -> dict[int, str]:
    """The names of the processes that have to run until the service ends, by their numbers."""
    names: dict[int, str] = {}
    for process in replica.processes():
        with suppress(psutil.Error):  # it has just ended
            names[process.pid] = name_of(process)
    return {number: name for number, name in names.items() if name != _REPLACED}


def run(
    bundle: Path,
    *,
    minutes: float,
    step_seconds: float,
    overload_seconds: float,
    first_rate: float = FIRST_RATE,
    rate_step: float = RATE_STEP,
    capacity: float | None = None,
    overload_share: float = OVERLOAD_SHARE,
    settings: Mapping[str, str] | None = None,
    postgresql: bool = False,
    s3: bool = False,
    separate_cores: bool = False,
) -> Result:
    """Run all phases.

    Args:
        bundle: The bundle to serve, which needs a classifier, an index, an encoder and directions.
        minutes: Time at 80 % of the capacity.
        step_seconds: Time of each rate with which the capacity is measured.
        overload_seconds: Time of too much load.
        first_rate: The lowest rate in operations/s, also that of the warm-up.
        rate_step: The ratio of each rate to the one before.
        capacity: Operations/s that the service can do, if they need not be measured.
        overload_share: Load of the last phase, in times the capacity.
        settings: Further settings of the service, without the prefix `DERMIS_`.
        postgresql: Whether jobs are in a real PostgreSQL instead of SQLite.
        s3: Whether files are in a real S3 server instead of a folder.
        separate_cores: Whether the load has the last core for itself and the service has the others.

    Raises:
        MissingComponentError: PostgreSQL, the S3 server or locust is not installed.
        ServiceNotReadyError: The service did not start.
        ValueError: There is only one core, and `separate_cores` needs two.
        RuntimeError: The load has ended with an error of its own, or the service does not keep up with the first rate.
    """
    with running_service(
        bundle, settings or {}, postgresql=postgresql, s3=s3, separate_cores=separate_cores
    ) as service:
        replica = service.replica
        before = lasting_processes(replica)
        sampler = MemorySampler(replica, max(1.0, 60 * minutes / _SAMPLES))
        sampler.start()
        warm_up = make_load(service, "warm-up", step_seconds, first_rate)
        before |= lasting_processes(replica)  # those that start at the first report
        steps = [] if capacity else measure_capacity(service, first_rate, rate_step, step_seconds)
        capacity = capacity or max(step.rate for step in steps if step.is_kept_up)
        began = time.time()
        soak = make_load(service, "80 %", 60 * minutes, SOAK_SHARE * capacity)
        ended = began + 60 * minutes
        name, rate = f"{100 * overload_share:.0f} %", overload_share * capacity
        path = run_load(service, name, overload_seconds, rate)
        begin = min(ONSET_SECONDS, overload_seconds / 2)
        onset = phase_of(f"The first {begin:.0f} s of {name}", rate, path, end=begin)
        overload = phase_of(name, rate, path, begin)
        processes = sampler.stop()
        present = lasting_processes(replica)
        log = [line for line in (replica.folder / "log").read_text(errors="replace").splitlines() if line.strip()]
    warm = began + 0.2 * 60 * minutes
    growth = [each for process in processes if (each := process.growth(warm, ended)) is not None]
    restarted = [name for pid, name in before.items() if pid not in present]
    return Result(warm_up, steps, capacity, soak, onset, overload, overload_share, growth, processes, restarted, log)


def report(result: Result) -> str:
    """The results as Markdown, for docs/benchmarks-service.md."""
    steps = ", ".join(f"{step.rate:.1f} ({step.kept_up:.0%})" for step in result.steps)
    measured = (
        f"Operations/s, and the completed part of the operation that fell behind most: {steps}. " if steps else ""
    )
    lines = [f"{measured}Capacity: {result.capacity:.1f} operations/s.", ""]
    for phase in (result.soak, result.onset, result.overload):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(phase.refusals.items()))
        lines += [
            f"{phase.name} of the capacity, {phase.seconds / 60:.1f} min: {phase.begun:.1f} operations/s begun, "
            f"{phase.completed:.1f} completed; {phase.calls:,} calls, {phase.refused:,} refused with Retry-After"
            f"{f' ({kinds})' if kinds else ''}, {len(phase.wrong):,} errors.",
            "",
            "| route | calls | refused | errors | p50, ms | p95, ms | p99, ms |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, route in phase.routes.items():
            times = " | ".join("-" if value is None else f"{value:.0f}" for value in (route.p50, route.p95, route.p99))
            lines.append(f"| {_label(name)} | {route.calls:,} | {route.refused:,} | {len(route.wrong)} | {times} |")
        lines.append("")
    routes = ", ".join(_label(name) for name in result.not_compared())
    lines += [
        f"Times at {100 * result.overload_share:.0f} % that are not compared: {routes or 'none'}.",
        "",
        "| process | samples | RSS, MB | PSS, MB | slope of PSS, MB/h | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in result.growth:
        slope = "-" if each.slope is None else f"{each.slope:+.1f}"
        interval = "-" if each.slope is None else f"{each.low:+.1f} to {each.high:+.1f}"
        lines.append(f"| {each.name} | {each.samples} | {each.rss:.0f} | {each.pss:.0f} | {slope} | {interval} |")
    return "\n".join(lines) + "\n"


def _label(name: str) -> str:
    route, _, kind = name.partition("#")
    return f"`{route}`" + (f" ({kind})" if kind else "")


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="at 80 %% of the capacity")
    parser.add_argument("--step-seconds", type=float, default=90.0, help="of each rate to measure the capacity")
    parser.add_argument("--first-rate", type=float, default=FIRST_RATE, help="operations/s of the first step")
    parser.add_argument("--capacity", type=float, help="operations/s from an earlier run, which are then not measured")
    parser.add_argument("--overload-seconds", type=float, default=300.0)
    parser.add_argument("--bundle", type=Path, default=DEMO)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the service, such as max_waiting_image_calls=8",
    )
    parser.add_argument("--postgresql", action="store_true", help="a real PostgreSQL instead of SQLite")
    parser.add_argument("--s3", action="store_true", help="a real S3 server instead of a folder")
    parser.add_argument(
        "--separate-cores", action="store_true", help="the last core for the load, the others for the service"
    )
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    options = parser.parse_args()
    stop_everything_on_sigterm()
    pairs = [each.partition("=") for each in options.set]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        parser.error(f"--set {wrong[0]}: write NAME=VALUE")
    try:
        result = run(
            options.bundle,
            minutes=options.minutes,
            step_seconds=options.step_seconds,
            overload_seconds=options.overload_seconds,
            first_rate=options.first_rate,
            capacity=options.capacity,
            settings={name.upper(): value for name, _, value in pairs},
            postgresql=options.postgresql,
            s3=options.s3,
            separate_cores=options.separate_cores,
        )
    except (MissingComponentError, ServiceNotReadyError, ValueError) as error:
        raise SystemExit(str(error)) from None
    document: Mapping[str, Any] = result.document()
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))
    if options.markdown:
        options.markdown.write_text(report(result))
    print(report(result))
    failures = Counter([*result.failures(), *result.slower()])
    for text, count in failures.most_common(20):
        print(f"NOT MET ({count}): {text}")
    if not failures:
        print(
            "met: no error, no restart, no growth, each refusal has Retry-After, and calls at 200 % take about as long"
        )
    if result.log:
        print(f"the service logged {len(result.log)} lines at WARNING or above; the last: {result.log[-1][:200]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
