"""Can this site join? Every answer with what to do if not. Patients' images are counted, and not otherwise touched."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermis.errors import DermisError, TrainingError
from training.data.sources import read_source
from training.federated.client.app import versions
from training.federated.config import FederationConfig
from training.federated.deployment.flower_programs import Invitation
from training.federated.simulation.dry_round import DryRound, dry_round
from training.federated.site import Site

_SECONDS = 10.0
_STATES = 3  # checkpoints of a member that lie on the disk at one time


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` is None where it could not be, because something before it failed."""

    what: str
    ok: bool | None
    says: str


def check_site(invitation: Invitation, site: Site, key: Path) -> Iterator[Finding]:
    """Look at everything, one after another; a failure of one does not hide the next."""
    yield _looked_at("versions", lambda: _versions(invitation))
    reached = _looked_at("server", lambda: _server(invitation))
    yield reached
    if reached.ok:
        yield _looked_at("key", lambda: _key(invitation, key))
    else:
        yield Finding("key", None, "cannot be asked about without the server")
    yield _looked_at("images", lambda: _images(invitation, site))
    trial: list[DryRound] = []

    def dry() -> str:
        trial.append(dry_round(invitation.config, site.device, site.threads))
        return _told(trial[0], invitation.config)

    yield _looked_at("dry round", dry)
    if trial:
        yield _looked_at("memory", lambda: _memory(trial[0]))
        yield _looked_at("disk", lambda: _disk(trial[0], site))
    else:
        yield Finding("memory", None, "is not known without the dry round")
        yield Finding("disk", None, "is not known without the dry round")


def _looked_at(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, look())
    except DermisError as error:
        return Finding(what, False, str(error))


def _versions(invitation: Invitation) -> str:
    ours = versions()
    for package, version in invitation.versions.items():
        if ours.get(package) != version:
            raise TrainingError(f"{package} is {ours.get(package)} here and {version} at the server; install that one")
    return ", ".join(f"{package} {version}" for package, version in ours.items()) + ", as at the server"


def _server(invitation: Invitation) -> str:
    host, _, port = invitation.address.rpartition(":")
    context = ssl.create_default_context(cadata=invitation.certificate)
    try:
        with (
            socket.create_connection((host, int(port)), timeout=_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            certificate = secure.getpeercert() or {}
            return f"{invitation.address} answers by {secure.version()}, certificate valid to {certificate.get('notAfter')}"
    except ssl.SSLCertVerificationError as error:
        raise TrainingError(
            f"{invitation.address}: its certificate is not the invitation's ({error.verify_message}); ask the server's "
            "people for a new invitation, and whether anybody stands in between"
        ) from None
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{invitation.address}: cannot be reached ({error}); ask your network's people to let this machine call "
            f"out to {host}, TCP port {port}"
        ) from None


def _key(invitation: Invitation, key: Path) -> str:
    """Come online for a moment with the key, as the SuperNode does, and go offline again."""
    import tempfile

    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    try:
        private = load_ssh_private_key(key.read_bytes(), None)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{key}: no readable private key ({error}); dermis federate key makes one") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise TrainingError(f"{key}: is no key on an elliptic curve; dermis federate key makes one")
    public = private.public_key()
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(invitation.certificate)
        file.flush()
        interceptors: list[Any] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, public),
        ]
        with FleetHttpClient.from_server_address(
            invitation.address, False, file.name, interceptors=interceptors
        ) as client:
            request = ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)
            try:
                node = client.ActivateNode(request).node_id
                client.DeactivateNode(DeactivateNodeRequest(node_id=node))
            except httpx.HTTPStatusError as error:
                if "already" in error.response.text.lower():
                    return "is registered, and its SuperNode is running"
                raise TrainingError(
                    f"{key}: the server does not know it; send {key.name}.pub to the server's people, who let it in with "
                    "dermis federate register"
                ) from None
            except httpx.TransportError as error:
                raise TrainingError(f"{invitation.address}: broke off ({error}); try again") from None
    return "is registered at the server"


def _images(invitation: Invitation, site: Site) -> str:
    federation = invitation.config
    source = read_source(
        site.data,
        metadata=site.metadata,
        class_column=site.class_column,
        binary=federation.binary or federation.task == "classifier",
    )
    foreign = sorted(set(source.class_names) - set(federation.class_names))
    if foreign:
        raise TrainingError(f"{site.data}: has the class {foreign[0]}; wanted are {', '.join(federation.class_names)}")
    missing = [record.id for record in source.records if record.image is None]
    if missing:
        raise TrainingError(f"{site.data}: {len(missing)} images of the table are not there, the first is {missing[0]}")
    unlabelled = [record.id for record in source.records if not record.class_name]
    if unlabelled:
        raise TrainingError(f"{site.data}: {len(unlabelled)} images have no class, the first is {unlabelled[0]}")
    count = len(source.records)
    if count < invitation.min_images:
        raise TrainingError(f"{site.data}: has {count:,} images, and {invitation.min_images:,} are asked for")
    patients = len({record.patient_id for record in source.records if record.patient_id})
    classes = ", ".join(f"{len(source.of_class(name)):,} {name}" for name in source.class_names)
    return f"{classes}; {f'{patients:,} patients' if patients else 'patients are not known: each image counts as one'}"


def _told(trial: DryRound, federation: FederationConfig) -> str:
    minutes = trial.seconds_per_step * federation.iterations / 60
    return (
        f"{trial.seconds_per_step:.2f} s a step, about {minutes:.1f} min a round; {trial.bytes_down / 1e6:.0f} MB come and "
        f"{trial.bytes_up / 1e6:.0f} MB go in each"
    )


def _memory(trial: DryRound) -> str:
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    wanted = trial.memory_bytes + 2 * trial.bytes_down
    if free < wanted:
        raise TrainingError(f"a round takes {wanted / 1e9:.1f} GB, and this machine has {free / 1e9:.1f}")
    return f"a round takes {wanted / 1e9:.1f} of {free / 1e9:.1f} GB"


def _disk(trial: DryRound, site: Site) -> str:
    place = next(folder for folder in (site.state, *site.state.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    wanted = _STATES * 3 * trial.bytes_down
    if free < wanted:
        raise TrainingError(f"{place}: {wanted / 1e9:.1f} GB are wanted, and {free / 1e9:.1f} are free")
    if not os.access(place, os.W_OK):
        raise TrainingError(f"{place}: cannot be written to; give another --state")
    return f"{wanted / 1e9:.2f} GB wanted, {free / 1e9:.1f} GB free in {place}"
