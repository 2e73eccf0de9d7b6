"""Mixed load for a long time, then too much load: `python -m benchmarks.soak [--minutes 60] [--json FILE] [--markdown FILE]`.

One real service (all processes, access control, SQLite, or PostgreSQL with `--postgresql`) serves the demo bundle. The load is
that of `benchmarks.load`: single images, four images, classifications, comparisons of generated images, edits, lists, small
datasets that are followed, downloaded and deleted, and a few projections, of three tenants. After a warm-up, the capacity is
measured: the most completed operations/s of 8, 16, 32 and 64 callers that never pause. Then follow 80 % of it for the given
time, and 200 %.

Required: no error; no process that was restarted; no growth of memory after the first fifth of the time at 80 %, in any
process; every call that is refused is answered 429 or 503 with Retry-After, and accepted calls take at 200 % at most half as
long again as at 80 %. The load runs on the same machine, in a process of its own, so the capacity is that of the processors
that are left, and at 200 % the load itself takes more of them.

Needs Linux and locust (the extra `soak`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
from scipy import stats

from benchmarks import DEMO
from benchmarks.cluster import Replica, ServiceNotReadyError, stop_everything_on_sigterm
from benchmarks.components import MissingComponentError, free_port
from benchmarks.components.postgres import running_postgres

ROOT = Path(__file__).resolve().parents[1]
REFUSALS = (429, 503)
SOAK_SHARE, OVERLOAD_SHARE = 0.8, 2.0
CALLERS = (8, 16, 32, 64)
MAX_GROWTH = 0.02
"""Growth of memory in an hour, as a part of it, that counts as none; more counts if the interval excludes 0."""
MAX_SLOWER = 1.5
"""Time of accepted calls at 200 %, in times that at 80 %, for the median and for p95."""
_COMPARED_CALLS = 100  # of a route in each phase; fewer say little about p95
_TENANTS = ("radiology", "derma", "research")
_SAMPLES = 360  # of memory, at most one a second
_BLOCKS = 12
_DATASETS_AT_ONCE, _PROJECTIONS_AT_ONCE = "8", "4"


@dataclass
class Route:
    """The calls of one route in one phase. Times are those of accepted calls in milliseconds, None without one."""

    calls: int
    refused: int
    wrong: list[str]
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]]) -> Route:
        """From lines of `benchmarks.load`: time, route, status, milliseconds, error."""
        refused = [row for row in rows if row[2] in REFUSALS and not row[4]]
        times = [row[3] for row in rows if row[2] not in REFUSALS and not row[4]]
        p50, p95, p99 = (float(each) for each in np.percentile(times, [50, 95, 99])) if times else (None,) * 3
        wrong = [f"{row[2]}: {row[4]}" for row in rows if row[4]]
        return cls(len(rows), len(refused), wrong, p50, p95, p99)


@dataclass
class Phase:
    """What one run of the load gave: `completed` and `begun` are operations/s."""

    name: str
    seconds: float
    completed: float
    begun: float
    routes: dict[str, Route]
    statuses: dict[str, int]

    @property
    def wrong(self) -> list[str]:
        """All errors."""
        return [f"{name}: {text}" for name, route in self.routes.items() for text in route.wrong]

    @property
    def refused(self) -> int:
        """Number of refused calls."""
        return sum(route.refused for route in self.routes.values())

    @property
    def calls(self) -> int:
        """Number of calls."""
        return sum(route.calls for route in self.routes.values())


def phase_of(name: str, path: Path) -> Phase:
    """Read what `benchmarks.load` has written."""
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
            elif "began" in marks:
                rows[row[1]].append(row)
                statuses[str(row[2])] += 1
    seconds = marks["ended"] - marks["began"]
    completed = [row for row in operations if row[3] <= marks["ended"] and row[4]]
    begun = [row for row in operations if row[2] <= marks["ended"]]
    routes = {route: Route.of(rows[route]) for route in sorted(rows)}
    return Phase(name, seconds, len(completed) / seconds, len(begun) / seconds, routes, dict(statuses))


@dataclass
class Growth:
    """Memory of one process in MB: means, and the slope of `pss` in MB/h with a 95 % interval; None with few samples.

    `pss` counts a page that several processes share in parts, `rss` counts it in each of them.
    """

    name: str
    samples: int
    rss: float
    pss: float
    slope: float | None = None
    low: float | None = None
    high: float | None = None

    def grows(self, part: float = MAX_GROWTH) -> bool:
        """Whether there is growth: the interval is above 0, and the slope is more than a part of the memory in an hour."""
        return self.slope is not None and (self.low or 0.0) > 0 and self.slope > part * self.pss


@dataclass
class Process:
    """The memory of one process of the service over time."""

    name: str
    times: list[float] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)
    pss: list[float] = field(default_factory=list)

    def growth(self, begin: float, end: float) -> Growth | None:
        """Growth between two times; None if there is no sample."""
        times = np.array(self.times)
        chosen = (times >= begin) & (times <= end)
        if not chosen.any():
            return None
        rss, pss = np.array(self.rss)[chosen], np.array(self.pss)[chosen]
        growth = Growth(self.name, len(pss), float(rss.mean()), float(pss.mean()))
        if len(pss) >= 2 * _BLOCKS:
            # Neighbouring samples are alike, so the interval is that of the means of blocks.
            hours = [block.mean() / 3600 for block in np.array_split(times[chosen] - begin, _BLOCKS)]
            fit = stats.linregress(hours, [block.mean() for block in np.array_split(pss, _BLOCKS)])
            half = float(stats.t.ppf(0.975, _BLOCKS - 2) * fit.stderr)
            growth.slope, growth.low, growth.high = float(fit.slope), float(fit.slope) - half, float(fit.slope) + half
        return growth


class MemorySampler(threading.Thread):
    """Reads the memory of the processes of a replica at regular times."""

    def __init__(self, replica: Replica, pause: float) -> None:
        super().__init__(daemon=True)
        self._replica, self._pause = replica, pause
        self._ended = threading.Event()
        self._processes: dict[int, Process] = {}

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._ended.wait(self._pause):
            now = time.time()
            for process in self._replica.processes():
                with suppress(psutil.Error):
                    if process.pid not in self._processes:
                        self._processes[process.pid] = Process(name_of(process))
                    sizes, known = process.memory_full_info(), self._processes[process.pid]
                    known.rss.append(sizes.rss / 1e6)
                    known.pss.append(sizes.pss / 1e6)
                    known.times.append(now)

    def stop(self) -> list[Process]:
        """End, and return the processes."""
        self._ended.set()
        self.join()
        return sorted(self._processes.values(), key=lambda process: process.name)


def name_of(process: psutil.Process) -> str:
    """The name of a process of the service, such as "Generator"."""
    line = process.cmdline()
    if "--service-name" in line:
        return str(line[line.index("--service-name") + 1])
    if "services.serve" in line:
        return "supervisor"
    if "services.gateway.decoding" in line:
        return "upload decoder"
    if "--multiprocessing-fork" in line:
        return "image measuring"
    if any("multiprocessing.resource_tracker" in each for each in line):
        return "resource tracker"
    return " ".join(line[-2:])[-40:]


@dataclass
class Service:
    """The running service, and the file with the keys of its tenants."""

    replica: Replica
    keys: Path


@contextmanager
def running_service(bundle: Path, settings: Mapping[str, str], postgresql: bool) -> Iterator[Service]:
    """A real service with the bundle and a key for each tenant.

    Args:
        bundle: The bundle to serve.
        settings: Further settings, without the prefix `DERMIS_`.
        postgresql: Whether jobs are in a real PostgreSQL instead of SQLite.

    Raises:
        MissingComponentError: PostgreSQL or locust is not installed.
        ServiceNotReadyError: The service did not start.
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
        replica = Replica("soak", folder / "data", free_port(), values, {})
        stack.callback(replica.stop)
        replica.start()
        replica.wait_until_ready()
        keys = folder / "keys"
        url = values.get("DATABASE_URL") or f"sqlite:///{replica.folder}/jobs.sqlite"
        keys.write_text("\n".join(_new_keys(url)))
        yield Service(replica, keys)


def _new_keys(url: str) -> list[str]:
    from services.gateway.auth.keys import KeyTable
    from services.gateway.auth.principal import DEFAULT_SCOPES

    with closing(KeyTable(url)) as table:
        return [
            table.create(tenant=each, name="soak", scopes=DEFAULT_SCOPES, created_by="soak")[1] for each in _TENANTS
        ]


def make_load(service: Service, name: str, seconds: float, *, rate: float = 0.0, callers: int = 0) -> Phase:
    """Run `benchmarks.load` against a service: at a rate, or with callers that never pause.

    Raises:
        RuntimeError: The load has ended with an error of its own.
    """
    out = service.keys.with_name(f"{name.replace(' ', '-')}.jsonl")
    options = ["--url", service.replica.url, "--keys", str(service.keys), "--seconds", str(seconds), "--out", str(out)]
    options += ["--callers", str(callers)] if callers else ["--rate", str(rate)]
    command = [sys.executable, "-m", "benchmarks.load", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benchmarks.load failed: {done.stderr[-3000:]}")
    return phase_of(name, out)


@dataclass
class Result:
    """All phases, and what became of the processes."""

    warm_up: Phase
    steps: list[Phase]
    soak: Phase
    overload: Phase
    overload_share: float
    growth: list[Growth]
    memory: list[Process]
    restarted: list[str]
    log: list[str]

    @property
    def capacity(self) -> Phase:
        """The step with the most completed operations/s."""
        return max(self.steps, key=lambda step: step.completed)

    def failures(self, max_growth: float = MAX_GROWTH) -> list[str]:
        """What was required and is not met, apart from times.

        Args:
            max_growth: Growth of memory in an hour, as a part of it, that counts as none.
        """
        phases = (self.warm_up, *self.steps, self.soak, self.overload)
        failures = [f"{phase.name}: {text}" for phase in phases for text in phase.wrong]
        failures += [
            f"{each.name} grows by {each.slope:.1f} MB/h (95 %: {each.low:.1f} to {each.high:.1f}) from {each.pss:.0f} MB"
            for each in self.growth
            if each.grows(max_growth)
        ]
        failures += [f"{name} was restarted" for name in self.restarted]
        return failures

    def slower(self) -> list[str]:
        """The routes whose accepted calls take too long in the overload."""
        texts = []
        for name, after in self.overload.routes.items():
            before = self.soak.routes.get(name)
            if before is None or min(route.calls - route.refused for route in (before, after)) < _COMPARED_CALLS:
                continue
            for label, slow, usual in (("p50", after.p50, before.p50), ("p95", after.p95, before.p95)):
                if slow is not None and usual is not None and slow > MAX_SLOWER * usual:
                    texts.append(f"{name}: {label} of {slow:.0f} ms in the overload, {usual:.0f} ms at 80 %")
        return texts

    def document(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self) | {
            "capacity_operations_per_second": self.capacity.completed,
            "cpus": os.cpu_count(),
            "failures": [*self.failures(), *self.slower()],
        }


def run(
    bundle: Path,
    *,
    minutes: float,
    step_seconds: float,
    overload_seconds: float,
    callers: Sequence[int] = CALLERS,
    overload_share: float = OVERLOAD_SHARE,
    settings: Mapping[str, str] | None = None,
    postgresql: bool = False,
) -> Result:
    """Run all phases.

    Args:
        bundle: The bundle to serve, which needs a classifier, an index, an encoder and directions.
        minutes: Time at 80 % of the capacity.
        step_seconds: Time of each number of callers with which the capacity is measured.
        overload_seconds: Time of too much load.
        callers: Numbers of callers.
        overload_share: Load of the last phase, in times the capacity.
        settings: Further settings of the service, without the prefix `DERMIS_`.
        postgresql: Whether jobs are in a real PostgreSQL instead of SQLite.

    Raises:
        MissingComponentError: PostgreSQL or locust is not installed.
        ServiceNotReadyError: The service did not start.
        RuntimeError: The load has ended with an error of its own.
    """
    with running_service(bundle, settings or {}, postgresql) as service:
        replica = service.replica
        before = {process.pid: name_of(process) for process in replica.processes()}
        sampler = MemorySampler(replica, max(1.0, 60 * minutes / _SAMPLES))
        sampler.start()
        warm_up = make_load(service, "warm-up", step_seconds, callers=min(callers))
        steps = [make_load(service, f"{count} callers", step_seconds, callers=count) for count in callers]
        capacity = max(step.completed for step in steps)
        began = time.time()
        soak = make_load(service, "80 %", 60 * minutes, rate=SOAK_SHARE * capacity)
        ended = began + 60 * minutes
        overload = make_load(service, f"{100 * overload_share:.0f} %", overload_seconds, rate=overload_share * capacity)
        processes = sampler.stop()
        present = {process.pid for process in replica.processes()}
        log = [line for line in (replica.folder / "log").read_text(errors="replace").splitlines() if line.strip()]
    warm = began + 0.2 * 60 * minutes
    growth = [each for process in processes if (each := process.growth(warm, ended)) is not None]
    restarted = [name for pid, name in before.items() if pid not in present]
    return Result(warm_up, steps, soak, overload, overload_share, growth, processes, restarted, log)


def report(result: Result) -> str:
    """The results as Markdown, for docs/benchmarks-service.md."""
    steps = ", ".join(f"{step.completed:.1f} with {step.name}" for step in result.steps)
    lines = [f"Completed operations/s without pauses: {steps}.", ""]
    for phase in (result.soak, result.overload):
        lines += [
            f"{phase.name} of the capacity, {phase.seconds / 60:.0f} min: {phase.begun:.1f} operations/s begun, "
            f"{phase.completed:.1f} completed; {phase.calls:,} calls, {phase.refused:,} refused with Retry-After, "
            f"{len(phase.wrong):,} errors.",
            "",
            "| route | calls | refused | errors | p50, ms | p95, ms | p99, ms |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, route in phase.routes.items():
            times = " | ".join("-" if value is None else f"{value:.0f}" for value in (route.p50, route.p95, route.p99))
            label = f"`{name.partition('#')[0]}`" + (f", {name.partition('#')[2]}" if "#" in name else "")
            lines.append(f"| {label} | {route.calls:,} | {route.refused:,} | {len(route.wrong)} | {times} |")
        lines.append("")
    lines += [
        "| process | samples | RSS, MB | PSS, MB | slope of PSS, MB/h | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in result.growth:
        slope = "-" if each.slope is None else f"{each.slope:+.1f}"
        interval = "-" if each.slope is None else f"{each.low:+.1f} to {each.high:+.1f}"
        lines.append(f"| {each.name} | {each.samples} | {each.rss:.0f} | {each.pss:.0f} | {slope} | {interval} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="at 80 %% of the capacity")
    parser.add_argument("--step-seconds", type=float, default=60.0, help="of each number of callers")
    parser.add_argument("--callers", type=int, nargs="+", default=list(CALLERS), help="to measure the capacity")
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
            callers=options.callers,
            settings={name.upper(): value for name, _, value in pairs},
            postgresql=options.postgresql,
        )
    except (MissingComponentError, ServiceNotReadyError) as error:
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
        print("met: no error, no restart, no growth, every refusal has Retry-After, and the rest is as fast at 200 %")
    if result.log:
        print(f"the service logged {len(result.log)} lines at WARNING or above; the last: {result.log[-1][:200]}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
