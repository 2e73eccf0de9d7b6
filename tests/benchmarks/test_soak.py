"""The benchmark with mixed load on a real service for five minutes. It asserts no time and no rate."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

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
