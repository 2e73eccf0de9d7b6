"""What a classifier's run changes as it trains, and its checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from training.classifier.config import ClassifierConfig
from training.gan.checkpoint import load_checkpoint, read_state, save_checkpoint

CHECKPOINT = "checkpoint.safetensors"


@dataclass
class Progress:
    """Where a run stands; what a checkpoint stores besides tensors."""

    epoch: int = 0  # the one that is running, or would be next
    step: int = 0  # done of it
    loss_sum: float = 0.0  # over these steps
    seconds: float = 0.0
    images: int = 0  # shown so far
    best_epoch: int = -1
    best_value: float = 0.0  # of the monitor
    stopped: bool = False  # by the user, before the end
    history: list[dict[str, float]] = field(default_factory=list)  # one row a finished epoch


@dataclass
class State:
    """Everything that a checkpoint holds. `best` is the network of the best epoch so far."""

    network: TorchClassifier
    best: TorchClassifier
    optimizer: torch.optim.Adam
    scheduler: ReduceLROnPlateau
    progress: Progress

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "best": self.best}


def new_state(network: TorchClassifier, config: ClassifierConfig) -> State:
    """The state of a run that begins with this network, whose frozen weights need no gradient."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    scheduler = ReduceLROnPlateau(
        optimizer,
        "max" if config.monitor == "auc" else "min",
        factor=config.plateau_factor,
        patience=config.plateau_patience,
        threshold=0.0,
    )
    return State(network, copy.deepcopy(network), optimizer, scheduler, Progress())


def save_state(out: Path, state: State, config: ClassifierConfig, data: str) -> None:
    """Replace the checkpoint. `data` identifies the images. TrainingError, and the old one stays, if it cannot be."""
    scalars = {
        "kind": "classifier",
        "config": config.identity,
        "data": data,
        "progress": vars(state.progress),
        "scheduler": state.scheduler.state_dict(),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
    }
    save_checkpoint(out / CHECKPOINT, state.modules, {"optimizer": state.optimizer}, {}, scalars)


def load_state(out: Path, state: State, config: ClassifierConfig, data: str) -> None:
    """Fill the state in place. TrainingError if the checkpoint is of other images or options."""
    checkpoint = out / CHECKPOINT
    scalars: dict[str, Any] = read_state(checkpoint)
    if scalars.get("kind") != "classifier":
        raise TrainingError(f"{checkpoint}: is the checkpoint of a generator; choose another --out")
    changed = config.changed_from(scalars["config"])
    if changed:
        raise TrainingError(
            f"{checkpoint}: was trained with another {', '.join(changed)}; use the same options or another --out"
        )
    if scalars["data"] != data:
        raise TrainingError(
            f"{checkpoint}: was trained on other images or another split; use the same or another --out"
        )
    load_checkpoint(checkpoint, state.modules, {"optimizer": state.optimizer}, {})
    state.scheduler.load_state_dict(scalars["scheduler"])
    state.optimizer.param_groups[0]["lr"] = scalars["learning_rate"]
    state.progress = Progress(**scalars["progress"])
    state.progress.stopped = False
