"""The benchmark with mixed load: when its callers begin, and five minutes on a real service, without a time or a rate."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil  # type: ignore[import-untyped]
import pytest

from benchmarks import soak
from benchmarks.soak import Phase, Result, Route

ROOT = Path(__file__).resolve().parents[2]

ROUTES = {
    "POST /v1/images#one",
    "POST /v1/images#four",
    "POST /v1/classifications",
    "POST /v1/authenticity",
    "POST /v1/edits",
    "GET /v1/models",
    "GET /v1/datasets",
    "POST /v1/datasets",
    "GET /v1/datasets/ID",
    "GET /v1/datasets/ID/events",
    "GET /v1/datasets/ID/files",
    "GET /v1/datasets/ID/files/NAME",
    "DELETE /v1/datasets/ID",
}
PROCESSES = {"supervisor", "gateway", "Generator", "Classifier", "Authenticity", "Explainer", "Projector"} | {
    "upload decoder",
    "image measuring",
}


# The benchmark looks for growth by 2 % in an hour. In the four minutes after the first fifth that is 0.1 %, which is less than
# what the calls of one moment need. Four minutes can show growth by 4 %; slower growth needs the hour of the benchmark.
MAX_GROWTH = 0.6


# In a process of its own: locust replaces parts of Python.
BEGINNINGS = """
import json
from types import SimpleNamespace
import benchmarks.load as load
from locust.env import Environment

load.inputs = load.Inputs("http://127.0.0.1:1", ["key"], seed=1)
now = 0.0

def sleep(seconds):
    global now
    now += seconds
    return False

load.clock, load.ended = lambda: now, SimpleNamespace(wait=sleep)
load.Caller.host = load.inputs.url
environment = Environment()
for operation in (5.0, 70.0):  # seconds
    beginnings = []
    for _ in range(8):
        now = 0.0
        caller = load.DatasetCaller(environment)
        caller.on_start()
        beginnings.append([])
        for _ in range(4):
            beginnings[-1].append(now)
            now += operation
            now += caller.wait_time()
    print(json.dumps(beginnings))
"""


def test_callers_begin_apart_and_keep_their_period() -> None:
    if find_spec("locust") is None:
        pytest.skip("locust (the extra `soak`) is not installed")
    command = [sys.executable, "-W", "ignore", "-c", BEGINNINGS]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    for line, period in zip(lines, (60.0, 70.0), strict=True):  # an operation that takes longer delays the next one
        callers = json.loads(line)
        assert all(times == pytest.approx([times[0] + n * period for n in range(4)]) for times in callers)
    callers = json.loads(lines[0])
    for number in range(4):
        times = sorted(each[number] for each in callers)
        assert all(late - early > 3 for early, late in itertools.pairwise(times)), "callers begin together"


ANSWERS = """
import json, sys
from types import SimpleNamespace
import benchmarks.load as load
from locust.env import Environment

load.inputs = load.Inputs("http://127.0.0.1:1", ["key"], seed=1)
load.Caller.host = load.inputs.url
caller = load.Caller(Environment())
caller.key = "key"
rows = []
load.recorder = SimpleNamespace(add=lambda *row: rows.append(row))
for status, kind, headers in json.loads(sys.argv[1]):
    content = json.dumps({"type": f"urn:dermis:problem:{kind}", "detail": "why"}).encode() if kind else b"busy"
    answer = SimpleNamespace(content=content, status_code=status, headers=headers)
    caller.client = SimpleNamespace(request=lambda *_, **__: answer)
    caller.ask("GET /v1/models")
print(json.dumps(rows))
"""


def test_only_refusals_of_surplus_load_are_no_errors() -> None:
    if find_spec("locust") is None:
        pytest.skip("locust (the extra `soak`) is not installed")
    later = {"Retry-After": "1"}
    answers = [
        (503, "overloaded", later, ""),
        (429, "too-many-requests", later, ""),
        (503, "overloaded", {}, "overloaded without Retry-After"),
        (503, "not-ready", later, "not-ready: why"),
        (503, "model-unavailable", later, "model-unavailable: why"),
        (503, "", later, "no problem document: busy"),
        (500, "internal", {}, '{"type": "urn:dermis:problem:internal", "detail": "why"}'),
    ]
    command = [sys.executable, "-W", "ignore", "-c", ANSWERS, json.dumps([answer[:3] for answer in answers])]
    rows = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert [row[4] for row in rows] == [answer[3] for answer in answers]
    route = Route.of([row for row in rows if row[2] != 500])
    assert (route.calls, route.refused, len(route.wrong)) == (6, 2, 4)
    assert route.refusals == {"overloaded": 1, "too-many-requests": 1}


def test_calls_that_are_slower_in_an_overload_are_reported_and_those_that_are_not_compared_as_well() -> None:
    def phase(p50: float, calls: int) -> Phase:
        route = Route(calls, 0, {}, [], p50, 2 * p50, 3 * p50)
        few = Route(99, 0, {}, [], 10 * p50, p50, p50)
        routes = {"GET /v1/models": route, "GET /v1/usage": few, "GET /v1/datasets/ID/events": route}
        return Phase("80 %", 1.0, 60.0, 1.0, 1.0, 1.0, routes, {"200": calls})

    def result(p50: float) -> Result:
        soak, overload = phase(100.0, 100), phase(p50, 100)
        return Result(soak, [], 1.0, soak, overload, overload, 2.0, [], [], [], [])

    assert result(149.0).slower() == []
    assert [text.partition(" of ")[0] for text in result(151.0).slower()] == [
        "GET /v1/models: p50",
        "GET /v1/models: p95",
    ]
    assert result(149.0).not_compared() == ["GET /v1/usage", "GET /v1/datasets/ID/events"]


def write_rows(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_times_and_counts_are_those_of_calls_that_began_before_the_end_of_the_load(tmp_path: Path) -> None:
    route = "GET /v1/datasets/ID/files/NAME"
    # Time of the end, route, status, milliseconds, error, kind: those after 200 belong to operations that go on.
    rows = [
        [99.0, route, 200, 500.0, "before", ""],
        ["began", 100.0],
        [110.0, route, 200, 1000.0, "", ""],
        [139.5, route, 200, 500.0, "", ""],
        [150.0, route, 503, 100.0, "", "overloaded"],
        [210.0, route, 200, 20_000.0, "", ""],
        ["ended", 200.0],
        *([[230.0, route, 200, 1.0, "", ""]] * 100),
        [231.0, route, 503, 1.0, "", "overloaded"],
        [240.0, route, 500, 1.0, "why", ""],
        [300.0, route, 0, 180_000.0, "no end", ""],
        ["operation", "dataset", 120.0, 190.0, True],
        ["operation", "dataset", 120.0, 300.0, False],
    ]
    path = write_rows(tmp_path / "rows", rows)
    overload, onset = soak.phase_of("200 %", 1.0, path, 30.0), soak.phase_of("onset", 1.0, path, end=30.0)
    after, before = overload.routes[route], onset.routes[route]
    assert (after.calls, after.refused, after.wrong) == (4, 1, ["500: why"])
    assert after.p50 == pytest.approx(10_250.0) and after.p99 == pytest.approx(20_000.0, rel=0.02)
    assert overload.statuses == {"200": 2, "503": 1, "500": 1} and overload.seconds == 70.0
    assert (before.calls, before.wrong, before.p50) == (2, ["0: no end"], 1000.0)
    whole = soak.phase_of("whole", 1.0, path)
    assert whole.routes[route].calls == 6 and whole.wrong == [f"{route}: 500: why", f"{route}: 0: no end"]


def test_a_process_that_starts_in_the_warm_up_and_is_replaced_later_was_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        1: ["services.serve"],
        2: ["--service-name", "gateway"],
        3: ["--multiprocessing-fork"],
        4: ["services.gateway.decoding"],
        6: ["--service-name", "Generator"],
    }
    present = [1, 2, 5, 6]  # 5 has just ended

    def process(number: int) -> SimpleNamespace:
        def cmdline() -> list[str]:
            if number not in lines:
                raise psutil.NoSuchProcess(number)
            return lines[number]

        return SimpleNamespace(pid=number, cmdline=cmdline)

    def run_load(_service: soak.Service, name: str, *_: float) -> Path:
        present[:] = [1, 2, 3, 4] if name == "warm-up" else [1, 2]
        return write_rows(tmp_path / "rows", [["began", 100.0], ["ended", 110.0]])

    replica = SimpleNamespace(processes=lambda: [process(number) for number in present], folder=tmp_path)
    service = nullcontext(SimpleNamespace(replica=replica))
    (tmp_path / "log").touch()
    monkeypatch.setattr(soak, "running_service", lambda *_, **__: service)
    monkeypatch.setattr(soak, "run_load", run_load)
    result = soak.run(tmp_path, minutes=1.0, step_seconds=1.0, overload_seconds=8.0, capacity=1.0)
    assert sorted(result.restarted) == ["Generator", "image measuring"]
    assert "image measuring was restarted" in result.failures()


@pytest.mark.full
def test_mixed_load_has_no_errors_and_too_much_load_is_refused_with_a_time() -> None:
    if find_spec("locust") is None:
        pytest.skip("locust (the extra `soak`) is not installed")
    pytest.importorskip("faiss", reason="FAISS is not installed")
    from benchmarks import DEMO
    from benchmarks.soak import report, run

    # Few calls may wait and the load is far too large, so that there are refusals on a machine of any speed.
    result = run(
        DEMO,
        minutes=5,
        step_seconds=15.0,
        overload_seconds=15.0,
        first_rate=1.0,
        rate_step=2.0,
        overload_share=8.0,
        settings={"MAX_WAITING_IMAGE_CALLS": "4", "MAX_ACTIVE_DATASETS": "2", "MAX_ACTIVE_PROJECTIONS": "1"},
    )
    # An error, a wrong content, a refusal without Retry-After, a process that was restarted, or growth.
    assert result.failures(MAX_GROWTH) == []
    for phase in (result.warm_up, *result.steps, result.soak, result.overload):
        assert phase.calls > phase.refused > -1
    assert all(step.is_kept_up for step in result.steps[:-1])
    assert result.overload.refused
    assert {int(status) for status in result.overload.statuses} <= {200, 202, 204, 429, 503}
    assert set(result.soak.routes) >= ROUTES
    assert {each.name for each in result.growth} >= PROCESSES
    lasting = [each for each in result.growth if each.name in PROCESSES]
    assert all(each.samples > 100 and each.slope is not None and each.rss >= each.pss > 1 for each in lasting)
    assert {each.name for each in result.memory if len(each.times) == len(each.rss) == len(each.pss) > 1} >= PROCESSES
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert document["capacity"] == max(step.rate for step in result.steps if step.is_kept_up)
    text = report(result)
    for route in ROUTES:
        assert f"| `{route.partition('#')[0]}`" in text
    for name in PROCESSES:
        assert f"| {name} |" in text
