"""The invitation to a federation: one TOML file with what a site needs to check itself and to join. It has no secrets."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from dermis.errors import TrainingError, escape
from dermis.files import write_file
from training.federated.config import FederationConfig
from training.federated.deployment.keys import CA
from training.federated.deployment.server_folder import ServerFolder
from training.federated.messages.replies import versions


@dataclass(frozen=True)
class Invitation:
    """Keys of the file.

    Attributes:
        address: HOST:PORT of the server.
        certificate: The certificate authority that clients trust, in PEM.
        versions: By package, as on the server.
        federation: Options, as of `FederationConfig`.
        min_images: Minimum number of images of a client.
    """

    address: str
    certificate: str
    versions: Mapping[str, str]
    federation: Mapping[str, Any]
    min_images: int

    @property
    def config(self) -> FederationConfig:
        return FederationConfig(**dict(self.federation))


def write_invitation(path: Path, server: ServerFolder, federation: FederationConfig, min_images: int) -> None:
    """Write an invitation of a server.

    Raises:
        TrainingError: The file exists.
    """
    if path.exists():
        raise TrainingError(f"{path}: exists already; choose another name, or remove it")
    certificate = (server.certificates / CA).read_text(encoding="utf-8")
    address = f"{server.hosts[0]}:{server.port}"
    invitation = Invitation(address, certificate, versions(), asdict(federation), min_images)
    write_file(path, tomli_w.dumps(asdict(invitation)).encode())


def read_invitation(path: Path) -> Invitation:
    """Read an invitation.

    Raises:
        TrainingError: The file is not an invitation, or its options do not fit each other.
    """
    try:
        invitation = Invitation(**tomllib.loads(path.read_text(encoding="utf-8")))
        _ = invitation.config
        return invitation
    except (OSError, tomllib.TOMLDecodeError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{path}: is not an invitation ({escape(error)}); create one on the server with dermis federate invite"
        ) from None
