"""The benchmark with restarts of replicas under load, in a short form. It asserts no time."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from real_servers import skipped_if_missing

ALL = ["replica-1", "replica-2"]
SEPARATE = ["gateway-1", "gateway-2", "worker-1", "worker-2"]


# A supervisor that logs a text at SIGTERM, and then ends or does not end.
SUPERVISOR = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print(sys.argv[1], flush=True), sys.argv[2] == "ends" and sys.exit(0)))
print("ready", flush=True)
while True:
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("text", "end", "failures"),
    [
        ("stopped", "ends", []),
        ("{logged}", "ends", ["replica-1 has killed processes that did not end"]),
        ("stopped", "hangs", ["replica-1 did not end within 1 s"]),
    ],
)
def test_a_replica_whose_processes_were_killed_has_not_ended_in_order(
    text: str, end: str, failures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss", reason="FAISS is not installed")
    from benchmarks import rolling_restart
    from benchmarks.cluster import Replica, wait_for
    from services import supervisor

    logged = "killed because they did not end in time"
    assert logged in inspect.getsource(supervisor)
    monkeypatch.setattr(rolling_restart, "_END_SECONDS", 1.0)
    replica, log = Replica("replica-1", tmp_path, 1, {}, {}), tmp_path / "log"
    log.write_text(f"{logged}\n")  # at an earlier stop
    with log.open("ab") as out:
        command = [sys.executable, "-c", SUPERVISOR, text.format(logged=logged), end]
        replica.process = subprocess.Popen(command, stdout=out)
    try:
        assert wait_for(lambda: "ready" in log.read_text(), 60)
        status, killed = rolling_restart.stop(replica)
        assert replica.has_ended
    finally:
        replica.kill()
    restarted = rolling_restart.Restart("replica-1", 0.0, 1.0, 1.0, status, killed)
    assert restarted.failures() == failures
    call = rolling_restart.Call("image", 0.0, 1.0)
    result = rolling_restart.Result([call], [restarted], compared={"image": 1, "dataset": 1})
    assert result.failures() == failures


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
