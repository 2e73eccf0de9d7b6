"""The options that determine, together with the generator and the images, what an encoder's training computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dermis.errors import TrainingError

_CHANGEABLE = ("steps",)  # options that can change when a run is resumed


@dataclass(frozen=True)
class EncoderConfig:
    """Hyper-parameters of one run."""

    backbone: str = "small"
    size: int = 64
    components: int = 64
    steps: int = 3000
    batch: int = 16
    learning_rate: float = 1e-3
    warm_up: int = 600  # number of first steps, which only regress the latents of generated images
    distance: str = "vgg16"
    real_share: float = 0.75  # share of real images in a batch after the warm-up, if there are real images
    pixels: float = 5.0  # weight of the mean squared error of pixels (in -1..1); the perceptual distance has weight 1
    prior: float = 0.05  # weight of the mean square of the coordinates of real images
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {"size": (16, 1024), "components": (1, 4096), "steps": (1, None), "batch": (2, None),
                  "warm_up": (0, None), "seed": (0, 2**31 - 1)}  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= (value if high is None else high):
                raise TrainingError(f"{name}: {value} is not {f'from {low} to {high}' if high else f'at least {low}'}")
        if not (self.learning_rate > 0 and 0 <= self.real_share <= 1 and self.pixels >= 0 and self.prior >= 0):
            raise TrainingError("learning_rate must be above 0, real_share from 0 to 1, pixels and prior at least 0")

    @property
    def identity(self) -> dict[str, Any]:
        """The options that must not change when a run is resumed."""
        return {name: value for name, value in asdict(self).items() if name not in _CHANGEABLE}
