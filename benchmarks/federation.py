"""Time of a round in a real federation on one machine: Flower's server and clients as programs, TLS, keys, loopback.

    python -m benchmarks.federation --rounds 2                      # tiny networks: the overhead of Flower
    python -m benchmarks.federation --large --wire-dtype fp16       # two networks of 30 and 31 million weights

Clients train on synthetic images, with one step per round, so that the exchange is measured.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TINY = "batch=4 z_dim=8 w_dim=8 channel_base=64 channel_max=8"
# 30.3 million weights in the generator, 31.2 in the discriminator; no options that make only training slower.
LARGE = "batch=1 channel_base=32768 channel_max=512 pl_weight=0 r1_gamma=0 augment=none mapping_layers=8"


@dataclass
class Loopback:
    """A server and its clients, each a program of its own, with their logs in `folder`."""

    folder: Path
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    logs: list[IO[bytes]] = field(default_factory=list)

    @property
    def server(self) -> Path:
        return self.folder / "server"

    @property
    def invitation(self) -> Path:
        return self.folder / "invitation.toml"

    def call(self, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run a `dermis federate` command and wait for its end."""
        return subprocess.run(
            self._command(arguments), capture_output=True, text=True, timeout=timeout, check=False, cwd=self.folder
        )

    def start(self, name: str, *arguments: str) -> None:
        """Start a `dermis federate` command in the background, in a session of its own."""
        log = (self.folder / f"{name}.log").open("ab")
        self.logs.append(log)
        self.running[name] = subprocess.Popen(
            self._command(arguments), stdout=log, stderr=log, cwd=self.folder, start_new_session=True
        )

    def kill(self, name: str) -> None:
        """Kill a program and all that it started, as if its machine had lost power."""
        process = self.running.pop(name)
        # Flower's child processes end when their parent has ended, but only after some time.
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
        process.wait()

    def serve(self) -> None:
        """Start the server and wait until it accepts connections."""
        self.start("serve", "serve", str(self.server), "--host", "127.0.0.1")
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for port in (self.port, self.port + 1):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)):
                        break
            else:
                return
            time.sleep(0.5)
        raise TimeoutError((self.folder / "serve.log").read_text())

    def join(self, number: int, data: Path, *options: str) -> None:
        """Start client `number` (from 1) with this data."""
        key, state = self.folder / f"client-{number}.key", self.folder / f"state-{number}"
        self.start(
            f"client-{number}", "join", str(self.invitation), "--data", str(data), "--key", str(key), "--state", str(state),
            "--threads", "1", "--port", str(self.port + 10 + number), *options,
        )  # fmt: skip

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "commands.main", "federate", *arguments]


@contextmanager
def loopback(folder: Path, clients: int, *invite: str) -> Iterator[Loopback]:
    """Start a server in `folder` and register the keys of `clients` clients. All programs are ended at the end."""
    port = free_ports()
    network = Loopback(folder, port)
    _succeed(network.call("init", str(network.server), "--host", "127.0.0.1", "--port", str(port)))
    try:
        network.serve()
        for number in range(1, clients + 1):
            key = folder / f"client-{number}.key"
            _succeed(network.call("key", str(key)))
            _succeed(network.call("register", str(network.server), f"{key}.pub", "--name", f"hospital {number}"))
        _succeed(
            network.call("invite", str(network.server), "--out", str(network.invitation), "--min-images", "10", *invite)
        )
        yield network
    finally:
        for name in list(network.running):
            network.kill(name)
        for log in network.logs:
            log.close()


def free_ports() -> int:
    """A port that is free. The next twenty are used too, and are only assumed to be free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return min(int(probe.getsockname()[1]), 60000)


def _succeed(completed: subprocess.CompletedProcess[str]) -> None:
    if completed.returncode:
        raise RuntimeError(completed.stdout + completed.stderr)


def main() -> None:
    """Run the measurements and print them."""
    from training.federated.server.record import read_rounds
    from training.federated.simulation.trial_round import write_images

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", dest="clients", type=int, default=3, help="number of clients")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="two networks of 30 and 31 million weights, 256 px")
    parser.add_argument("--wire-dtype", default="fp32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    size = 256 if options.large else 8
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder / "data", 24, size, ("benign", "malignant"))
        with loopback(folder, options.clients) as federation:
            for number in range(1, options.clients + 1):
                federation.join(number, folder / "data", "--validation", "0")
            start = time.monotonic()
            completed = federation.call(
                "run", str(federation.server), "--rounds", str(options.rounds), "--iterations", "1", "--resolution", str(size),
                "--federation", f"options={LARGE if options.large else TINY}", "--federation", "evaluate_rounds=0",
                "--federation", f"wire_dtype={options.wire_dtype}", "--federation", f"clients={options.clients}",
                "--federation", f"min_clients={options.clients}", "--federation", "precision=fp32", timeout=3600,
            )  # fmt: skip
            _succeed(completed)
            lines = read_rounds(federation.server / "runs" / "federation")
            result: dict[str, Any] = {
                "members": options.clients,
                "wire_dtype": options.wire_dtype,
                "megabytes_down": round(lines[-1]["bytes_down"] / 1e6, 1),
                "megabytes_up": round(lines[-1]["bytes_up"] / 1e6, 1),
                "seconds_a_round": [line["seconds"] for line in lines],
                "training_seconds": [max(m["seconds"] for m in line["members"].values()) for line in lines],
                "seconds_in_all": round(time.monotonic() - start, 1),
            }
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name.replace('_', ' '):20} {value}")


if __name__ == "__main__":
    main()
