"""The options that determine, together with the images, what a classifier's training computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dermis.errors import TrainingError

Balance = Literal["none", "weights", "sampling"]
Monitor = Literal["auc", "loss"]
Precision = Literal["fp32", "bf16"]
WeightsDtype = Literal["fp16", "int8"]
# Options that can change when a run is resumed: its length, when it ends, and how its result is stored.
_CHANGEABLE = ("epochs", "patience", "weights_dtype")


@dataclass(frozen=True)
class ClassifierConfig:
    """Hyper-parameters of one run. The defaults are those of arXiv 2208.11702 as far as it states them."""

    architecture: str = "efficientnet_b2"
    size: int = 256
    seed: int = 0
    batch: int = 32
    epochs: int = 20
    learning_rate: float = 5e-4
    plateau_factor: float = 0.2
    plateau_patience: int = 1  # the rate is reduced after more than this many epochs without a better monitor
    patience: int = 3  # the run ends after this many epochs without a better monitor
    monitor: Monitor = "auc"
    balance: Balance = "weights"
    rotation: float = 180.0  # maximum angle in degrees, in both directions; 0: none
    flips: bool = True
    dropout: float = 0.2
    freeze_stages: int = 0  # the stem and this many stages keep their weights
    head_only: bool = False  # all layers but the last one keep their weights
    epoch_images: int | None = None  # number of images in an epoch; None: all of the training part
    precision: Precision = "fp32"
    weights_dtype: WeightsDtype = "fp16"  # type of the weights in the exported file; measurements include the rounding

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
        """Whether the features of every training image can be computed once, because only the last layer changes."""
        return self.head_only and not self.augmented

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """The options that must not change when a run is resumed."""
        return {name: value for name, value in self.to_dict().items() if name not in _CHANGEABLE}
