"""The augmentation strength of a run: the probability p of every transform, fixed or controlled by the discriminator."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass
class AdaptiveP:
    """Augmentation strength p, controlled so that the mean sign of the discriminator on real images becomes `target`.

    r_t = E[sign(D(real))] (paper, equation 1). Every `interval` steps p changes by batch * interval / (kimg * 1000),
    upwards if r_t is above the target. A fixed p has target None.
    """

    p: float = 0.0
    target: float | None = 0.6
    interval: int = 4
    kimg: float = 500.0
    sign_sum: float = 0.0
    sign_count: int = 0

    def observe(self, real_logits: Tensor) -> None:
        """Add logits of real images to r_t."""
        self.sign_sum += float(real_logits.detach().sign().sum())
        self.sign_count += real_logits.numel()

    def update(self, step: int, batch: int) -> float | None:
        """Adjust p at the end of every interval-th step. Returns r_t if it did, otherwise None."""
        if self.target is None or step % self.interval or not self.sign_count:
            return None
        r_t = self.sign_sum / self.sign_count
        direction = math.copysign(1.0, r_t - self.target) if r_t != self.target else 0.0
        self.p = min(max(self.p + direction * batch * self.interval / (self.kimg * 1000), 0.0), 1.0)
        self.sign_sum, self.sign_count = 0.0, 0
        return r_t
