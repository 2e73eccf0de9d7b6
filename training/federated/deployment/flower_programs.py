"""Flower's programs with the options that hospitals want: TLS, keys of members, no telemetry, nothing installed on the way.

The server's folder: `server.toml`, `certificates/` (what members see), `superlink.db` (members' keys, messages in flight),
`flower/` (Flower's own home, and the certificates of its loopback) and `runs/NAME` (state, record and result of a
federation). A member gets an invitation, one TOML file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from dermis.errors import TrainingError, escape
from dermis.files import write_file
from training.federated.client.app import versions
from training.federated.config import FederationConfig
from training.federated.deployment.keys import CA, CERTIFICATE, KEY, write_certificates
from training.federated.site import Site

APP = Path(__file__).parents[1] / "flower-app"
SETTINGS, CONNECTION = "server.toml", "federation"
_LOOPBACK = "127.0.0.1"
# For which a write to the database waits for another: Flower keeps arrays there, and SQLite's own 5 are too few.
_DATABASE_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A server's folder. Members reach `port`, where only what they need is answered; Flower itself listens on loopback."""

    folder: Path
    hosts: tuple[str, ...]
    port: int

    @property
    def inner_port(self) -> int:
        return self.port + 1

    @property
    def certificates(self) -> Path:
        return self.folder / "certificates"

    @property
    def inner_certificates(self) -> Path:
        return self.folder / "flower" / "certificates"

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.folder / "flower")

    def run_folder(self, name: str) -> Path:
        return (self.folder / "runs" / name).resolve()


@dataclass(frozen=True)
class Invitation:
    """What a site must know to join; nothing of it is secret."""

    address: str
    certificate: str  # PEM of the authority
    versions: Mapping[str, str]
    federation: Mapping[str, Any]
    min_images: int

    @property
    def config(self) -> FederationConfig:
        return FederationConfig(**dict(self.federation))


def new_server(folder: Path, hosts: Sequence[str], port: int) -> Server:
    """Write the folder. Certificates that lie in its `certificates` already are used: an authority's own, say.

    TrainingError if it is a server's already.
    """
    if (folder / SETTINGS).exists():
        raise TrainingError(f"{folder}: is a server's folder already; start it with dermis federate serve {folder}")
    if not hosts:
        raise TrainingError("--host: give the name or address by which members reach the server")
    if not 1 <= port < 65535:
        raise TrainingError(f"--port: {port} is not from 1 to 65534")
    server = Server(folder, tuple(hosts), port)
    if not all((server.certificates / name).exists() for name in (CA, CERTIFICATE, KEY)):
        write_certificates(server.certificates, hosts)
    if not (server.inner_certificates / CA).exists():
        write_certificates(server.inner_certificates, [_LOOPBACK, "localhost"])
    connection = {
        "address": f"{_LOOPBACK}:{server.inner_port}",
        "root-certificates": str((server.inner_certificates / CA).resolve()),
    }
    home = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_file(folder / "flower" / "config.toml", tomli_w.dumps(home).encode())
    write_file(folder / SETTINGS, tomli_w.dumps({"hosts": list(hosts), "port": port}).encode())
    return server


def open_server(folder: Path) -> Server:
    """TrainingError if it is no server's folder."""
    try:
        content = tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return Server(folder, tuple(content["hosts"]), int(content["port"]))
    except (OSError, tomllib.TOMLDecodeError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{folder}: is no server's folder ({escape(error)}); dermis federate init makes one"
        ) from None


def environment(home: Path) -> dict[str, str]:
    """For Flower's programs: its home, no telemetry, no look for updates, and its helpers on the path."""
    programs = str(Path(sys.executable).parent)
    return dict(os.environ) | {
        "FLWR_HOME": str(home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", "")]),
    }


def superlink_command(server: Server) -> list[str]:
    """Flower's server, on loopback: whoever reaches it may start runs, and so run what they like at the members."""
    return [
        program("flower-superlink"),
        "--ssl-ca-certfile", str(server.inner_certificates / CA),
        "--ssl-certfile", str(server.inner_certificates / CERTIFICATE),
        "--ssl-keyfile", str(server.inner_certificates / KEY),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        "--database", f"sqlite:///{(server.folder / 'superlink.db').resolve()}?timeout={_DATABASE_SECONDS}",
        "--host", _LOOPBACK,
        "--port", str(server.inner_port),
    ]  # fmt: skip


def supernode_command(invitation: Invitation, certificate: Path, key: Path, site: Site, port: int) -> list[str]:
    """Flower's client at a hospital. It only calls out; `port` is for its own processes, on loopback."""
    config = " ".join(f"{name}={json.dumps(value)}" for name, value in site.to_node_config().items())
    return [
        program("flower-supernode"),
        "--superlink", invitation.address,
        "--root-certificates", str(certificate),
        "--auth-supernode-private-key", str(key),
        "--host", _LOOPBACK,
        "--port", str(port),
        "--node-config", config,
    ]  # fmt: skip


def register(server: Server, public_key: Path, name: str) -> str:
    """Let a member in by its public key; returns its node. TrainingError with what Flower says if it will not."""
    command = [program("flwr"), "supernode", "register", str(public_key), CONNECTION, "--format", "json"]
    done = subprocess.run(
        [*command, *(["--name", name] if name else [])],
        env=server.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
        return str(answer["node-id"])
    except (ValueError, KeyError):
        said = (done.stdout + done.stderr).strip() or "nothing"
        raise TrainingError(f"{public_key}: is not registered; Flower says: {said}") from None


def run_command(server: Server, federation: FederationConfig, overrides: Path) -> list[str]:
    """`flwr run` with these options, which are written to the file `overrides`."""
    values = federation.to_run_config() | {"out": str(server.run_folder(federation.name))}
    write_file(overrides, tomli_w.dumps(values).encode())
    return [program("flwr"), "run", str(APP), CONNECTION, "--run-config", str(overrides), "--stream"]


def write_invitation(path: Path, server: Server, federation: FederationConfig, min_images: int) -> None:
    """TrainingError if the file exists."""
    if path.exists():
        raise TrainingError(f"{path}: exists already; choose another name, or remove it")
    certificate = (server.certificates / CA).read_text(encoding="utf-8")
    address = f"{server.hosts[0]}:{server.port}"
    invitation = Invitation(address, certificate, versions(), asdict(federation), min_images)
    write_file(path, tomli_w.dumps(asdict(invitation)).encode())


def read_invitation(path: Path) -> Invitation:
    """TrainingError if it is none."""
    try:
        invitation = Invitation(**tomllib.loads(path.read_text(encoding="utf-8")))
        _ = invitation.config
        return invitation
    except (OSError, tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{path}: is no invitation ({escape(error)}); the server makes one with dermis federate invite"
        ) from None


def program(name: str) -> str:
    """A program of Flower's, beside the Python that runs. TrainingError if it is not installed."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise TrainingError(f"{name}: is not installed; pip install 'dermis[federated]'")
    return str(path)
