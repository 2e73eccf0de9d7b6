"""The benchmark with faults on real components: all scenarios in a short form, and its results."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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


class RemovingCluster:
    """Stands for a cluster whose datasets end in a state at once, or have images and never end."""

    def __init__(self, state: str, samples: int, was_active: bool) -> None:
        from benchmarks.faults.cluster import Progress

        self.random = Random(1)
        self._first_state = self._state = state
        self._samples, self._was_active = samples, was_active
        self.gateway = SimpleNamespace(kill=lambda _: True)
        self.workers = [SimpleNamespace(kill=lambda: True)]
        progress = Progress(state, samples, 0, 1)
        self.database = SimpleNamespace(progress=lambda _: progress, rows_of=lambda _: 0)
        self.caller = SimpleNamespace(request=self._delete, job=lambda _: self._job())

    def request(self, _format: str, number: int) -> dict[str, Any]:
        self._state = self._first_state
        return {"id": f"dataset-{number}", "links": {"self": ""}}

    def stored(self, _dataset: object) -> list[str]:
        return []

    def restart_ended(self) -> None:
        """Nothing has ended."""

    def _delete(self, *_: str) -> SimpleNamespace:
        if self._was_active:
            self._state = "cancelled"
        return SimpleNamespace(status_code=202 if self._was_active else 204)

    def _job(self) -> dict[str, Any]:
        return {"state": self._state, "error": None, "progress": {"samples_done": self._samples}}


@pytest.mark.parametrize(
    ("cluster", "lost", "faults"),
    [
        (("failed", 5, False), ["dataset-0 is failed: null", "dataset-1 is failed: null"], {"deleting": 1}),
        (("running", 5, True), ["dataset-1 is running: null"], {"cancelling": 1}),  # the second one has to end before
        (("running", 0, True), ["dataset-0 is running: null", "dataset-1 is running: null"], {"cancelling": 1}),
        (("succeeded", 5, False), [], {"deleting": 1}),  # the first ended before it could be cancelled
    ],
)
def test_a_dataset_that_fails_or_never_ends_before_its_removal_is_lost(
    cluster: tuple[str, int, bool], lost: list[str], faults: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    from benchmarks.faults import jobs, removals
    from benchmarks.faults.jobs import Extent

    for module in (jobs, removals):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.1)
    (result,) = removals.removals(RemovingCluster(*cluster), None, Extent(rounds=1))  # type: ignore[arg-type]
    assert result.unclear == lost and result.lost == len(lost)
    assert result.faults == faults
