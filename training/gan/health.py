"""When a run has diverged and must stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dermis.errors import TrainingError

LOSS_LIMIT = 1e4  # logits that far from zero say nothing; sound runs stay below 100
PATIENCE = 10  # steps in a row whose gradients were not finite: a few can happen, and are cleaned


class Health:
    """Looks at the numbers of every step, which are at hand anyway. Weights are looked at when they are saved."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.sick = 0  # steps in a row

    def check(self, kimg: float, stats: Mapping[str, float]) -> None:
        """TrainingError, with what to do, if losses are not finite or beyond all measure, or gradients stay so."""
        losses = {name: value for name, value in stats.items() if not name.endswith("_gradient")}
        if not all(math.isfinite(value) for value in losses.values()):
            self._stop(kimg, f"a loss is no longer finite ({_show(losses)})")
        if max(abs(stats["G"]), abs(stats["D"])) > LOSS_LIMIT:
            self._stop(kimg, f"a loss explodes ({_show(losses)})")
        finite = all(math.isfinite(value) for value in stats.values())
        self.sick = 0 if finite else self.sick + 1
        if self.sick >= PATIENCE:
            self._stop(kimg, f"gradients are no longer finite since {PATIENCE} steps ({_show(stats)})")

    def _stop(self, kimg: float, what: str) -> None:
        last = f"the last good state is in {self.checkpoint}: resume it" if self.checkpoint.exists() else "start again"
        raise TrainingError(
            f"diverged at {kimg:.1f} kimg: {what}; {last} with --allow-changes and a smaller --learning-rate or a "
            "larger --r1-gamma"
        )


def _show(stats: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in stats.items())
