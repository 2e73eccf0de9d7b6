"""The folder of a federation's server.

server.toml       hosts and port
certificates/     the certificate authority and the server's certificate, which clients verify
superlink.db      keys of clients, messages that are being sent
flower/           home of Flower's programs, and the certificates for loopback
runs/NAME         state, record and result of a federation
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from dermis.errors import TrainingError, escape
from dermis.files import write_file
from training.federated.deployment.keys import CA, CERTIFICATE, KEY, write_certificates

SETTINGS, CONNECTION = "server.toml", "federation"
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerFolder:
    """A server's folder.

    Attributes:
        folder: Its path.
        hosts: Names and addresses by which clients reach the server.
        port: Port of the proxy for clients. Flower itself listens on the next port, on loopback.
    """

    folder: Path
    hosts: tuple[str, ...]
    port: int

    @property
    def loopback_port(self) -> int:
        return self.port + 1

    @property
    def certificates(self) -> Path:
        return self.folder / "certificates"

    @property
    def loopback_certificates(self) -> Path:
        return self.flower_home / "certificates"

    @property
    def flower_home(self) -> Path:
        return self.folder / "flower"

    def run_folder(self, name: str) -> Path:
        """Return the folder of a federation."""
        return (self.folder / "runs" / name).resolve()


def new_server(folder: Path, hosts: Sequence[str], port: int) -> ServerFolder:
    """Write a server's folder. Existing files in its `certificates`, such as those of your own authority, are used.

    Args:
        folder: Its path.
        hosts: Names and addresses by which clients reach the server.
        port: Port for clients.

    Raises:
        TrainingError: The folder is a server's already, or an argument is wrong.
    """
    if (folder / SETTINGS).exists():
        raise TrainingError(f"{folder}: is a server's folder already; start it with dermis federate serve {folder}")
    if not hosts:
        raise TrainingError("--host: give the name or address by which clients reach the server")
    if not 1 <= port < 65535:
        raise TrainingError(f"--port: {port} is not from 1 to 65534")
    server = ServerFolder(folder, tuple(hosts), port)
    if not all((server.certificates / name).exists() for name in (CA, CERTIFICATE, KEY)):
        write_certificates(server.certificates, hosts)
    if not (server.loopback_certificates / CA).exists():
        write_certificates(server.loopback_certificates, [LOOPBACK, "localhost"])
    connection = {
        "address": f"{LOOPBACK}:{server.loopback_port}",
        "root-certificates": str((server.loopback_certificates / CA).resolve()),
    }
    home = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    write_file(server.flower_home / "config.toml", tomli_w.dumps(home).encode())
    write_file(folder / SETTINGS, tomli_w.dumps({"hosts": list(hosts), "port": port}).encode())
    return server


def open_server(folder: Path) -> ServerFolder:
    """Read a server's folder.

    Raises:
        TrainingError: It is not a server's folder.
    """
    try:
        content = tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        return ServerFolder(folder, tuple(content["hosts"]), int(content["port"]))
    except (OSError, tomllib.TOMLDecodeError, KeyError, ValueError, TypeError) as error:
        raise TrainingError(
            f"{folder}: is not a server's folder ({escape(error)}); create one with dermis federate init"
        ) from None
