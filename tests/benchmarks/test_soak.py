"""The benchmark with mixed load: when its callers begin, and five minutes on a real service, without a time or a rate."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
