"""The benchmark with faults on real components, in a short form."""

from __future__ import annotations

import pytest

from real_servers import skipped_if_missing


@pytest.mark.full
@pytest.mark.parametrize("scenario", ["kills", "database", "storage", "paused"])
def test_nothing_is_lost_or_made_twice(scenario: str) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    from benchmarks.chaos import run

    with skipped_if_missing():
        results = list(run([scenario], count=3, seed=7))
    for result in results:
        assert result.met, result
