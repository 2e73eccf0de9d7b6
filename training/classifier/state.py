"""The state of a classifier's training, and its checkpoint."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dermis.classifier.torch_network import TorchClassifier
from dermis.errors import TrainingError
from training.checkpoint import load_checkpoint, read_state_of_kind, save_checkpoint
from training.classifier.config import ClassifierConfig

KIND = "classifier"  # value of the field `kind` in checkpoints


@dataclass
class ClassifierProgress:
    """Progress of a run. A checkpoint stores it with the tensors."""

    epoch: int = 0  # the current one, or the next one between two epochs
    step: int = 0  # finished steps of this epoch
    loss_sum: float = 0.0  # sum of the losses of these steps
    seconds: float = 0.0
    images: int = 0  # training images shown so far
    best_epoch: int = -1
    best_value: float = 0.0  # best value of the monitored metric
    stopped: bool = False  # whether the user stopped the run before its end
    history: list[dict[str, float]] = field(default_factory=list)  # one row for each finished epoch


@dataclass
class ClassifierState:
    """Everything that a checkpoint holds. `best` is the network of the best epoch so far."""

    network: TorchClassifier
    best: TorchClassifier
    optimizer: torch.optim.Adam
    scheduler: ReduceLROnPlateau
    progress: ClassifierProgress

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "best": self.best}


def new_state(network: TorchClassifier, config: ClassifierConfig) -> ClassifierState:
    """The state of a new run with this network. Its weights that require no gradient are not trained."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate)
    scheduler = ReduceLROnPlateau(
        optimizer,
        "max" if config.monitor == "auc" else "min",
        factor=config.plateau_factor,
        patience=config.plateau_patience,
        threshold=0.0,
    )
    return ClassifierState(network, copy.deepcopy(network), optimizer, scheduler, ClassifierProgress())


def save_state(checkpoint: Path, state: ClassifierState, config: ClassifierConfig, data: str) -> None:
    """Replace the checkpoint.

    Args:
        checkpoint: The file.
        state: The state.
        config: The options of the run.
        data: Digest of the images.

    Raises:
        TrainingError: A value is not finite or the file cannot be written. The old checkpoint is kept.
    """
    scalars = {
        "kind": KIND,
        "config": config.identity,
        "data": data,
        "progress": vars(state.progress),
        "scheduler": state.scheduler.state_dict(),
        "learning_rate": state.optimizer.param_groups[0]["lr"],
    }
    save_checkpoint(checkpoint, state.modules, {"optimizer": state.optimizer}, {}, scalars)


def load_state(checkpoint: Path, state: ClassifierState, config: ClassifierConfig, data: str) -> None:
    """Fill a new state in place with a checkpoint. Raises TrainingError if it is of other images or options."""
    scalars = read_state_of_kind(checkpoint, KIND, config.identity)
    if scalars["data"] != data:
        raise TrainingError(
            f"{checkpoint}: was trained on other images or another split; use the same ones, or choose another --out"
        )
    load_checkpoint(checkpoint, state.modules, {"optimizer": state.optimizer}, {})
    state.scheduler.load_state_dict(scalars["scheduler"])
    state.optimizer.param_groups[0]["lr"] = scalars["learning_rate"]
    state.progress = ClassifierProgress(**scalars["progress"])
    state.progress.stopped = False
