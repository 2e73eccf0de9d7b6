"""The check whether a site can join a federation, with advice where it cannot. Patients' images are only counted."""

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
from training.federated.config import FederationConfig
from training.federated.deployment.invitation import Invitation
from training.federated.messages.replies import versions
from training.federated.simulation.trial_round import TrialRound, trial_round
from training.federated.site import Site

_CONNECT_SECONDS = 10.0
_STATES = 3  # files of a client's state that are on the disk at the same time


@dataclass(frozen=True)
class CheckResult:
    """The result of one part of the check.

    Attributes:
        name: The part.
        passed: None if it could not be checked, because another part failed.
        message: The values, or what to do.
    """

    name: str
    passed: bool | None
    message: str


def check_site(invitation: Invitation, site: Site, key: Path) -> Iterator[CheckResult]:
    """Check all parts one after another. A part that fails does not stop the others."""
    yield _check("versions", lambda: _versions(invitation))
    server = _check("server", lambda: _server(invitation))
    yield server
    if server.passed:
        yield _check("key", lambda: _key(invitation, key))
    else:
        yield CheckResult("key", None, "not checked: the server cannot be reached")
    yield _check("images", lambda: _images(invitation, site))
    trials: list[TrialRound] = []

    def run_trial_round() -> str:
        trials.append(trial_round(invitation.config, site.device, site.threads))
        return _duration_and_traffic(trials[0], invitation.config)

    yield _check("trial round", run_trial_round)
    if trials:
        yield _check("memory", lambda: _memory(trials[0]))
        yield _check("disk", lambda: _disk(trials[0], site))
    else:
        yield CheckResult("memory", None, "not checked: the trial round failed")
        yield CheckResult("disk", None, "not checked: the trial round failed")


def _check(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, check())
    except DermisError as error:
        return CheckResult(name, False, str(error))


def _versions(invitation: Invitation) -> str:
    installed = versions()
    for package, server_version in invitation.versions.items():
        if installed.get(package) != server_version:
            raise TrainingError(
                f"{package}: {installed.get(package)} is installed, the server has {server_version}; install {server_version}"
            )
    return ", ".join(f"{package} {version}" for package, version in installed.items()) + ", as on the server"


def _server(invitation: Invitation) -> str:
    host, _, port = invitation.address.rpartition(":")
    context = ssl.create_default_context(cadata=invitation.certificate)
    try:
        with (
            socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            certificate = secure.getpeercert() or {}
            return f"{invitation.address} responds with {secure.version()}, certificate valid to {certificate.get('notAfter')}"
    except ssl.SSLCertVerificationError as error:
        raise TrainingError(
            f"{invitation.address}: its certificate was not issued by the authority in the invitation "
            f"({error.verify_message}); ask the server's operators for a new invitation, and whether the connection is "
            "intercepted"
        ) from None
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"{invitation.address}: cannot be reached ({error}); ask your network's operators to allow outgoing "
            f"connections from this machine to {host}, TCP port {port}"
        ) from None


def _key(invitation: Invitation, key: Path) -> str:
    """Connect with the key as the SuperNode does, and disconnect."""
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
        raise TrainingError(
            f"{key}: is not a readable private key ({error}); create one with dermis federate key"
        ) from None
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise TrainingError(f"{key}: is not a key on an elliptic curve; create one with dermis federate key")
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
                    f"{key}: is not registered at the server; send {key.name}.pub to the server's operators, who register "
                    "it with dermis federate register"
                ) from None
            except httpx.TransportError as error:
                raise TrainingError(f"{invitation.address}: the connection was lost ({error}); try again") from None
    return "is registered at the server"


def _images(invitation: Invitation, site: Site) -> str:
    federation = invitation.config
    source = read_source(
        site.data,
        metadata=site.metadata,
        class_column=site.class_column,
        binary=federation.binary or federation.task == "classifier",
    )
    other_classes = sorted(set(source.class_names) - set(federation.class_names))
    if other_classes:
        raise TrainingError(
            f"{site.data}: has the class {other_classes[0]}; the federation has {', '.join(federation.class_names)}"
        )
    missing = [record.id for record in source.records if record.image is None]
    if missing:
        raise TrainingError(f"{site.data}: {len(missing)} images of the table are missing, the first is {missing[0]}")
    unlabelled = [record.id for record in source.records if not record.class_name]
    if unlabelled:
        raise TrainingError(f"{site.data}: {len(unlabelled)} images have no class, the first is {unlabelled[0]}")
    count = len(source.records)
    if count < invitation.min_images:
        raise TrainingError(
            f"{site.data}: has {count:,} images; the federation requires at least {invitation.min_images:,}"
        )
    patients = len({record.patient_id for record in source.records if record.patient_id})
    classes = ", ".join(f"{len(source.of_class(name)):,} {name}" for name in source.class_names)
    return f"{classes}; {f'{patients:,} patients' if patients else 'patients are not known: each image counts as one'}"


def _duration_and_traffic(trial: TrialRound, federation: FederationConfig) -> str:
    minutes = trial.seconds_per_step * federation.iterations / 60
    return (
        f"{trial.seconds_per_step:.2f} s per step, about {minutes:.1f} min per round; {trial.bytes_down / 1e6:.0f} MB received "
        f"and {trial.bytes_up / 1e6:.0f} MB sent in each round"
    )


def _memory(trial: TrialRound) -> str:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = trial.memory_bytes + 2 * trial.bytes_down
    if total < needed:
        raise TrainingError(f"a round needs {needed / 1e9:.1f} GB, and this machine has {total / 1e9:.1f} GB")
    return f"a round needs {needed / 1e9:.1f} of {total / 1e9:.1f} GB"


def _disk(trial: TrialRound, site: Site) -> str:
    folder = next(folder for folder in (site.state, *site.state.resolve().parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    needed = _STATES * 3 * trial.bytes_down
    if free < needed:
        raise TrainingError(f"{folder}: {needed / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
    if not os.access(folder, os.W_OK):
        raise TrainingError(f"{folder}: cannot be written to; choose another --state")
    return f"{needed / 1e9:.2f} GB needed, {free / 1e9:.1f} GB free in {folder}"
