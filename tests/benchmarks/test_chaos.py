"""The benchmark with faults on real components: all scenarios in a short form, and its results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from benchmarks.faults.results import Result, add_faults, report
from real_servers import skipped_if_missing

if TYPE_CHECKING:
    from benchmarks.faults.cluster import Cluster, Undisturbed

IMAGES = 250
NAMES = ["kills", "lost", "database", "connections", "storage", "paused", "clock", "removals", "disk"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Cluster, Undisturbed]]:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    from benchmarks.faults.cluster import running_cluster

    with skipped_if_missing(), running_cluster(seed=7, images=IMAGES) as running:
        yield running


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_or_made_twice(name: str, cluster: tuple[Cluster, Undisturbed]) -> None:
    from benchmarks.chaos import SCENARIOS
    from benchmarks.faults.jobs import Extent

    assert list(SCENARIOS) == NAMES
    extent = Extent(kills=4, rounds=1, strikes=1, images=IMAGES, formats=("webdataset",))
    results = list(SCENARIOS[name](*cluster, extent))
    for result in results:
        assert result.not_run or result.failures() == [], result
    if all(result.not_run for result in results):
        pytest.skip(results[0].not_run)


def test_failures_name_what_was_lost_and_which_faults_were_not_made() -> None:
    result = Result("x", "parquet", ("cut", "stall"))
    not_made = [f"no fault of the kind '{kind}' was made" for kind in ("cut", "stall")]
    assert result.failures() == [*not_made, "no fault was made"]
    add_faults(result, {"cut": 2, "stall": 0})
    assert result.faults == {"cut": 2} and result.failures() == not_made[1:]
    add_faults(result, {"stall": 1})
    assert result.met
    result.lost, result.twice, result.different, result.datasets = 1, 2, 3, 4
    result.recovery_seconds += [1.0, 2.0, 6.0]
    assert result.failures() == ["1 lost", "2 there twice", "3 different"]
    row = report([result]).splitlines()[-1]
    assert row == "| x | parquet | cut 2, stall 1 | 4 | 1 | 2 | 3 | 2.0 / 6.0 s |"
