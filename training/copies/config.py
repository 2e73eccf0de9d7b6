"""The options that determine, together with the images, what a copy detector's training computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dermis.authenticity.copy_network import DIM, SIZE
from dermis.errors import TrainingError


@dataclass(frozen=True)
class CopiesConfig:
    """Hyper-parameters of one run."""

    size: int = SIZE
    dim: int = DIM
    steps: int = 2000
    batch: int = 64
    learning_rate: float = 5e-4  # of the network; that of the proxies is ten times as high
    warm_up: int = 60  # steps in which the learning rate rises
    scale: float = 20.0  # of the cosine similarities in the softmax
    pretrained: bool = True  # whether the trunk starts from the weights of ImageNet
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"size": (32, 512), "dim": (8, 4096), "steps": (1, None), "batch": (4, None), "warm_up": (1, None),
                  "seed": (0, 2**31 - 1)}  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= (value if high is None else high):
                raise TrainingError(f"{name}: {value} is not {f'from {low} to {high}' if high else f'at least {low}'}")
        if self.dim % 4:
            raise TrainingError(f"dim: {self.dim} is not a multiple of 4")
        if not (self.learning_rate > 0 and self.scale > 0):
            raise TrainingError("learning_rate and scale must be above 0")

    @property
    def identity(self) -> dict[str, Any]:
        """The options that must not change when a run is resumed. `steps` may: a finished run can be made longer."""
        return {name: value for name, value in asdict(self).items() if name != "steps"}
