"""The benchmark of scale-out: its verdict, and the simulation with few workers."""

from __future__ import annotations

import pytest

from benchmarks.components import MissingComponentError
from benchmarks.scale import report, simulate, verdict


@pytest.mark.parametrize(
    "efficiency, cores_in_use, expected",
    [
        (0.9, 2.0, "met"),
        (0.89, 1.9, "all cores in use"),
        (0.89, 1.7, "NOT MET (bucket: 0.40 cores)"),
        (1.1, 0.5, "met"),
    ],
)
def test_requirement_of_scale_out_is_only_waived_where_all_cores_are_in_use(
    efficiency: float, cores_in_use: float, expected: str
) -> None:
    parts = {"workers": 0.9, "gateway": 0.3, "PostgreSQL": 0.1, "bucket": 0.4, "all": cores_in_use}
    assert verdict(efficiency, parts, cores=2) == expected


@pytest.mark.full
def test_simulated_workers_make_every_shard_on_a_real_postgresql() -> None:
    try:
        row = simulate(2, 10_000, seconds_per_shard=0.2, poll_seconds=0.5)
    except MissingComponentError as error:
        pytest.skip(str(error))
    assert (row["workers"], row["shards"], row["images"]) == (2, 20, 10_000)
    assert 0 < row["efficiency"] <= 1.05, "shards sleep, so no worker can be faster than its own time"
    assert row["small_jobs"] and row["small_job_seconds_max"] >= row["small_job_seconds_median"] > 0
    assert row["database_connections_most"] > 3
    assert "| 2 | 0.2 | 0.5 | 10,000 |" in report({"cpus": 2, "real": [], "simulated": [row]})
