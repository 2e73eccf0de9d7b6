"""The state of a federation on the server after a round, in one file that is replaced as a whole."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dermis.errors import TrainingError, escape
from training.checkpoint import read_header, write_tensors
from training.federated.config import FederationConfig
from training.federated.messages.serialization import Tensors

FORMAT = "dermis-federation-1"
FILE = "federation.safetensors"


@dataclass(frozen=True)
class FederatedClient:
    """A client as the server knows it: a number in place of a name, and its numbers of images.

    Attributes:
        rounds: Rounds in which its update was valid.
    """

    name: str
    images: int
    validation: int
    classes: dict[str, int]
    rounds: int = 0


@dataclass
class GlobalState:
    """The state after `round` rounds.

    Attributes:
        run: Identifies the federation.
        tensors: The global tensors.
        strategy: The state of the strategy (`strategies.strategy_state`).
        clients: By node.
        seconds: Duration of all rounds.
        privacy: The privacy spent so far (`privacy.privacy_spent`); None without differential privacy.
    """

    run: str
    round: int
    tensors: Tensors
    strategy: Tensors = field(default_factory=dict)
    clients: dict[str, FederatedClient] = field(default_factory=dict)
    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0
    privacy: dict[str, Any] | None = None

    @property
    def contributors(self) -> list[FederatedClient]:
        """Clients that have contributed, ordered by their numbers of images."""
        return sorted((m for m in self.clients.values() if m.rounds), key=lambda client: (client.images, client.name))

    @property
    def images(self) -> int:
        """Training images of all contributors."""
        return sum(client.images for client in self.contributors)

    def images_of(self, class_name: str) -> int:
        """Return the training images of one class of all contributors."""
        return sum(client.classes[class_name] for client in self.contributors)


def save_global(out: Path, state: GlobalState, federation: FederationConfig) -> None:
    """Replace the file of the global state.

    Raises:
        TrainingError: The file cannot be written. The file of the round before is kept.
    """
    flat = {f"global/{name}": value for name, value in state.tensors.items()}
    flat |= {f"strategy/{name}": value for name, value in state.strategy.items()}
    scalars = {
        "run": state.run,
        "round": state.round,
        "members": {node: asdict(client) for node, client in state.clients.items()},
        "seconds": state.seconds,
        "bytes_down": state.bytes_down,
        "bytes_up": state.bytes_up,
        "privacy": state.privacy,
        "config": federation.identity,
    }
    path = out / FILE
    try:
        out.mkdir(parents=True, exist_ok=True)
        contiguous = {name: value.contiguous().clone() for name, value in flat.items()}
        write_tensors(path, contiguous, {"format": FORMAT, "state": json.dumps(scalars)})
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TrainingError(f"{path}: cannot save the round ({reason}); the one before is kept") from error


def load_global(out: Path, federation: FederationConfig) -> GlobalState | None:
    """Read the saved state.

    Returns:
        The state; None if none was saved.

    Raises:
        TrainingError: The file cannot be read, or is of a federation with other options.
    """
    path = out / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: not a readable state of a federation ({escape(error)})") from error
    if metadata.get("format") != FORMAT:
        raise TrainingError(f"{path}: not a {FORMAT} file")
    scalars: dict[str, Any] = json.loads(metadata["state"])
    if changed := federation.changed_from(scalars.pop("config")):
        raise TrainingError(
            f"{out}: was started with other values of {', '.join(changed)}; use the same options, or another folder"
        )
    clients = {node: FederatedClient(**client) for node, client in scalars.pop("members").items()}
    return GlobalState(
        tensors=tensors_under(flat, "global/"), strategy=tensors_under(flat, "strategy/"), clients=clients, **scalars
    )


def as_begun(federation: FederationConfig, out: Path) -> FederationConfig:
    """Return the options with the `start` of the federation in `out`, if they name none.

    Clients need it in every round: it decides the frozen layers of a classifier, and options of a generator's training.

    Raises:
        TrainingError: The state in `out` cannot be read.
    """
    if federation.start or not (out / FILE).exists():
        return federation
    stored = json.loads(read_header(out / FILE, FORMAT, "state of a federation")["state"])["config"].get("start")
    return federation if stored in (None, federation.identity["start"]) else replace(federation, start=stored)


def tensors_under(tensors: Tensors, prefix: str) -> Tensors:
    """Return the tensors whose names begin with `prefix`, by the rest of the name."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
