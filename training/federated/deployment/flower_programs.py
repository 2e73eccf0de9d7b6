"""Command lines of Flower's programs: TLS, keys of clients, no telemetry, and no installation of packages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tomli_w

from dermis.errors import TrainingError, install_command
from dermis.files import write_file
from training.federated.config import FederationConfig
from training.federated.deployment.invitation import Invitation
from training.federated.deployment.keys import CA, CERTIFICATE, KEY
from training.federated.deployment.server_folder import CONNECTION, LOOPBACK, ServerFolder
from training.federated.site import Site

APP = Path(__file__).parents[1] / "flower-app"
# How long a write to the database waits for another one: Flower stores arrays there, and SQLite's default of 5 s is too short.
_DATABASE_SECONDS = 300


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's programs: their home, no telemetry, no check for updates, their folder on the path."""
    programs = str(Path(sys.executable).parent)
    return dict(os.environ) | {
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
    }


@contextmanager
def on_sigterm(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` at SIGTERM inside the block. Otherwise SIGTERM ends this process and leaves Flower's program running."""
    before = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def superlink_command(server: ServerFolder) -> list[str]:
    """Return the command of Flower's server.

    It listens on loopback: a caller who can connect to it can start runs, which execute programs on the clients' machines.
    """
    return [
        program("flower-superlink"),
        "--ssl-ca-certfile", str(server.loopback_certificates / CA),
        "--ssl-certfile", str(server.loopback_certificates / CERTIFICATE),
        "--ssl-keyfile", str(server.loopback_certificates / KEY),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--database", f"sqlite:///{(server.folder / 'superlink.db').resolve()}?timeout={_DATABASE_SECONDS}",
        "--host", LOOPBACK,
        "--port", str(server.loopback_port),
    ]  # fmt: skip


def supernode_command(invitation: Invitation, certificate: Path, key: Path, site: Site, port: int) -> list[str]:
    """Return the command of Flower's SuperNode, which runs on a client's machine. It only makes outgoing connections.

    Args:
        invitation: Names the server.
        certificate: PEM file of the invitation's certificate.
        key: The client's private key.
        site: The client's options.
        port: For Flower's own processes, on loopback.
    """
    config = " ".join(f"{name}={json.dumps(value)}" for name, value in site.to_node_config().items())
    return [
        program("flower-supernode"),
        "--superlink", invitation.address,
        "--root-certificates", str(certificate),
        "--auth-supernode-private-key", str(key),
        "--host", LOOPBACK,
        "--port", str(port),
        "--node-config", config,
    ]  # fmt: skip


def run_command(
    server: ServerFolder, federation: FederationConfig, overrides: Path, loggers: Sequence[str] = ()
) -> list[str]:
    """Return the command `flwr run` with the options of a federation, which are written to the file `overrides`.

    Args:
        server: Its folder.
        federation: The options.
        overrides: File for the options.
        loggers: Names of loggers (`training.loggers`), which the server's process opens.
    """
    values = federation.to_run_config() | {"out": str(server.run_folder(federation.name)), "log": ",".join(loggers)}
    write_file(overrides, tomli_w.dumps(values).encode())
    return [program("flwr"), "run", str(APP), CONNECTION, "--run-config", str(overrides), "--stream"]


def register(server: ServerFolder, public_key: Path, name: str) -> str:
    """Register a client's public key at a running server.

    Args:
        server: Its folder.
        public_key: File with the key.
        name: The client's name for the operators; empty for none.

    Returns:
        The client's node.

    Raises:
        TrainingError: Flower refuses; the message has its output.
    """
    command = [program("flwr"), "supernode", "register", str(public_key), CONNECTION, "--format", "json"]
    done = subprocess.run(
        [*command, *(["--name", name] if name else [])],
        env=environment(server.flower_home),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        registered = json.loads(done.stdout[done.stdout.index("{") :])
        return str(registered["node-id"])
    except (ValueError, KeyError):
        output = (done.stdout + done.stderr).strip() or "nothing"
        raise TrainingError(f"{public_key}: is not registered; Flower's output: {output}") from None


def program(name: str) -> str:
    """Return the path of one of Flower's programs, next to the running Python.

    Raises:
        TrainingError: It is not installed.
    """
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise TrainingError(f"{name}: is not installed; {install_command('federated')}")
    return str(path)
