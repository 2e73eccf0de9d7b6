"""Tests of a federation of real programs on loopback: TLS, keys, a client that is killed, a server that is restarted."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.federation import TINY, Loopback, loopback
from dermis.bundle import open_bundle
from tiny_skin import make_skin
from training.federated.server.record import read_rounds

OPTIONS = (
    "--resolution", "8", "--iterations", "2", "--federation", f"options={TINY}", "--federation", "evaluate_rounds=0",
    "--federation", "precision=fp32", "--federation", "round_timeout=300.0", "--federation", "min_clients=2",
)  # fmt: skip


def _wait(condition: Callable[[], bool], made: Loopback, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in made.folder.glob("*.log"))
            raise TimeoutError(logs)
        time.sleep(0.5)


@pytest.mark.full
def test_federation_survives_death_of_client_and_server(tmp_path: Path) -> None:
    data = [make_skin(tmp_path / f"hospital-{i}", count=20 * i, size=16) for i in (1, 2, 3)]
    with loopback(tmp_path, 3, *OPTIONS) as made:
        out = made.server / "runs" / "federation"

        # What a site sees before it joins.
        key = tmp_path / "client-1.key"
        site = ("check", str(made.invitation), "--data", str(data[0]), "--device", "cpu")
        good = made.call(*site, "--key", str(key))
        assert good.returncode == 0, good.stdout + good.stderr
        assert "is registered at the server" in " ".join(good.stdout.split())
        made.call("key", str(tmp_path / "stranger"))
        bad = made.call(*site, "--key", str(tmp_path / "stranger"))
        assert bad.returncode == 1
        assert "is not registered at the server" in " ".join(bad.stdout.split())

        # Clients reach what is theirs; the interface that starts runs is not reached from outside.
        trusted = ssl.create_default_context(cafile=str(made.server / "certificates" / "ca.pem"))
        with httpx.Client(base_url=f"https://127.0.0.1:{made.port}", verify=trusted) as client:
            assert client.post("/v1/control/list-runs").status_code == 404
            assert client.post("/v1/fleet/pull-messages").status_code in (400, 401, 403, 415)  # Flower answers
            assert client.get("/healthz").text == "ok"

        for number in (1, 2, 3):
            made.join(number, data[number - 1])
        made.start("run", "run", str(made.server), "--rounds", "4", *OPTIONS)
        _wait(lambda: len(read_rounds(out)) >= 1, made)
        made.kill("client-3")
        _wait(lambda: len(read_rounds(out)) >= 2, made)
        made.join(3, data[2])
        _wait(lambda: len(read_rounds(out)) >= 4, made)
        lines = read_rounds(out)
        assert sorted(lines[0]["members"]) == ["client-1", "client-2", "client-3"]
        assert "client-3" not in lines[1]["members"]
        assert lines[0]["bytes_up"] > 1000
        _wait(lambda: json.loads((out / "status.json").read_text())["phase"] == "finished", made)

        made.kill("run")
        made.kill("serve")
        made.serve()
        again = made.call("run", str(made.server), "--rounds", "5", *OPTIONS)
        assert again.returncode == 0, again.stdout + again.stderr
        assert [line["round"] for line in read_rounds(out)] == [1, 2, 3, 4, 5]
        bundle = open_bundle(out / "bundle")
        assert bundle.provenance["federation"]["rounds"] == 5
        said = bundle.model_card + json.dumps(bundle.provenance)
        assert not [word for word in ("hospital", "client-1", str(tmp_path)) if word in said.lower()]
