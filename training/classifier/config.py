"""Everything that decides what a classifier's training computes, beside the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dermis.errors import TrainingError

Balance = Literal["none", "weights", "sampling"]
Monitor = Literal["auc", "loss"]
Precision = Literal["fp32", "bf16"]
WeightsDtype = Literal["fp16", "int8"]
# What a resumed run may have otherwise: its length, when it ends, and how its result is stored.
_FREE = ("epochs", "patience", "weights_dtype")


@dataclass(frozen=True)
class ClassifierConfig:
    """Hyper-parameters of one run; the defaults are those of arXiv 2208.11702 as far as it tells them."""

    architecture: str = "efficientnet_b2"
    size: int = 256
    seed: int = 0
    batch: int = 32
    epochs: int = 20
    learning_rate: float = 5e-4
    plateau_factor: float = 0.2
    plateau_patience: int = 1  # epochs without a better monitor before the rate is reduced, beyond the first
    patience: int = 3  # epochs without a better monitor before the run ends
    monitor: Monitor = "auc"
    balance: Balance = "weights"
    rotation: float = 180.0  # degrees at most, either way; 0: none
    flips: bool = True
    dropout: float = 0.2
    freeze_stages: int = 0  # the stem and so many stages keep their weights
    head_only: bool = False  # all but the last layer keeps its weights
    epoch_images: int | None = None  # images an epoch; None: all of the training part
    precision: Precision = "fp32"
    weights_dtype: WeightsDtype = "fp16"  # of the exported file; what is measured has the rounding in it

    def __post_init__(self) -> None:
        limits = {
            "size": (16, 4096),
            "seed": (0, 2**31 - 1),
            "batch": (1, None),
            "epochs": (1, None),
            "plateau_patience": (0, None),
            "patience": (1, None),
            "rotation": (0, 180),
            "freeze_stages": (0, None),
            "epoch_images": (1, None),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not (low <= value <= (high or value)):
                raise TrainingError(f"{name}: {value} is not {f'from {low} to {high}' if high else f'at least {low}'}")
        if not self.learning_rate > 0 or not 0 < self.plateau_factor < 1 or not 0 <= self.dropout < 1:
            raise TrainingError(
                "learning_rate must be above 0, plateau_factor between 0 and 1, dropout from 0 to below 1"
            )
        kinds = {"balance": Balance, "monitor": Monitor, "precision": Precision, "weights_dtype": WeightsDtype}
        for name, kind in kinds.items():
            if getattr(self, name) not in get_args(kind):
                raise TrainingError(f"{name}: {getattr(self, name)!r} is none of {', '.join(get_args(kind))}")

    @property
    def augmented(self) -> bool:
        """Whether a training image looks different each time."""
        return self.flips or self.rotation > 0

    @property
    def cached_features(self) -> bool:
        """Whether the features of every training image can be computed once: nothing below the head ever changes."""
        return self.head_only and not self.augmented

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed."""
        return {name: value for name, value in self.to_dict().items() if name not in _FREE}

    def changed_from(self, stored: Mapping[str, Any]) -> list[str]:
        """Names of the options that differ from `stored`, the identity of a checkpoint."""
        now = self.identity
        return sorted(name for name in now.keys() | stored.keys() if now.get(name) != stored.get(name))
