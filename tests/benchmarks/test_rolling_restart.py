"""The benchmark with restarts of replicas under load, in a short form. It asserts no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from real_servers import skipped_if_missing

ALL = ["replica-1", "replica-2"]
SEPARATE = ["gateway-1", "gateway-2", "worker-1", "worker-2"]


@pytest.mark.full
@pytest.mark.parametrize("names", [ALL, SEPARATE], ids=["all-roles", "separate-roles"])
def test_clients_with_retries_notice_no_restart(names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    from benchmarks.faults.cluster import small_bundle
    from benchmarks.rolling_restart import report, run

    with skipped_if_missing(), small_bundle() as bundle:
        result = run(bundle, tmp_path, rounds=1, clients=1, images=40, separate=names is SEPARATE)
    assert result.failures() == []
    assert [(each.replica, each.status) for each in result.restarts] == [(name, 0) for name in names]
    assert len(result.connections) == 2 and all(result.connections), "each gateway got connections"
    for kind in ("image", "dataset"):
        assert [call for call in result.calls if call.kind == kind and result.is_disturbed(call)]
        assert f"| {kind}, during a restart |" in report(result)
