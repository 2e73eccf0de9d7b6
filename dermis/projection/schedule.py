"""Schedules of a projection: steps, rates, noise, and the space that is searched.

OFFICIAL is that of StyleGAN2 (Karras et al., arXiv 1912.04958, appendix D). FAST reaches the same distance in a tenth of the
time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dermis.errors import RequestError

Space = Literal["w", "w+"]
Start = Literal["mean", "encoder"]
MAX_STEPS = 10_000


@dataclass(frozen=True)
class Schedule:
    """Options of a projection but the generator and the distance. Ramps are fractions of `steps`.

    Raises:
        RequestError: An option is out of range.
    """

    steps: int = 1000
    learning_rate: float = 0.1
    """Highest learning rate of Adam."""
    ramp_up: float = 0.05
    ramp_down: float = 0.25
    latent_noise: float = 0.05
    """Standard deviation of the noise on w at the start, in units of that of w."""
    noise_ramp: float = 0.75
    """Fraction of the steps after which the noise on w has decreased to 0, quadratically."""
    noise_maps: bool = True
    """Whether noise maps are optimised as well; otherwise those of the generator are used."""
    noise_regularisation: float = 1e5
    space: Space = "w"
    """w: one style vector for all layers. w+: one for each."""
    start: Start = "mean"
    prior: float = 0.0
    """Weight of the mean squared distance of w from the mean, in units of its standard deviation. It keeps w+ in a region
    where images can be edited."""
    pixels: float = 0.0
    """Weight of the mean squared error of pixels, in -1..1."""
    patience: int | None = None
    """Steps without a better image after which the ramp down begins early; None: never."""

    def __post_init__(self) -> None:
        for name, kind in (("space", Space), ("start", Start)):
            if getattr(self, name) not in get_args(kind):
                raise RequestError(name, f"{getattr(self, name)!r} is none of {', '.join(get_args(kind))}")
        if not 1 <= self.steps <= MAX_STEPS:
            raise RequestError("steps", f"must be from 1 to {MAX_STEPS:,}")
        if not 0 < self.learning_rate <= 10:
            raise RequestError("learning_rate", "must be above 0 and at most 10")
        if not (self.ramp_up >= 0 and self.ramp_down >= 0 and self.ramp_up + self.ramp_down <= 1):
            raise RequestError("ramp_up", "the two ramps must be at least 0 and together at most 1")
        if self.patience is not None and self.patience < 1:
            raise RequestError("patience", "must be at least 1")
        for name in ("latent_noise", "noise_ramp", "noise_regularisation", "prior", "pixels"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise RequestError(name, "must be at least 0")

    def rate_at(self, step: int) -> float:
        """Return the learning rate of step 0, 1, ...: it rises linearly and falls along a cosine."""
        t = step / self.steps
        up = min(1.0, t / self.ramp_up) if self.ramp_up else 1.0
        down = min(1.0, (1.0 - t) / self.ramp_down) if self.ramp_down else 1.0
        return self.learning_rate * up * (0.5 - 0.5 * math.cos(math.pi * down))

    def latent_noise_at(self, step: int) -> float:
        """Return the standard deviation of the noise on w at a step, in units of that of w."""
        if not self.noise_ramp:
            return 0.0
        return self.latent_noise * max(0.0, 1.0 - step / self.steps / self.noise_ramp) ** 2

    @property
    def last_ramp(self) -> int:
        """The step at which the ramp down begins."""
        return self.steps - math.floor(self.ramp_down * self.steps)


OFFICIAL = Schedule()
FAST = Schedule(steps=100, learning_rate=0.2, latent_noise=0.0, noise_maps=False, space="w+")
SCHEDULES = {"official": OFFICIAL, "fast": FAST}
