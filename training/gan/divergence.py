"""Detection of runs that have diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from dermis.errors import TrainingError

LOSS_LIMIT = 1e4  # the losses of runs that have not diverged stay below 100
PATIENCE = 10  # consecutive steps with gradients that are not finite; single ones occur, and the values are replaced


class DivergenceCheck:
    """Check the statistics of every step. Weights are checked when they are saved (`training.checkpoint.flatten`)."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.non_finite_steps = 0  # consecutive

    def check(self, kimg: float, stats: Mapping[str, float]) -> None:
        """Raise TrainingError if a loss is not finite or too large, or gradients were not finite in PATIENCE steps."""
        losses = {name: value for name, value in stats.items() if not name.endswith("_gradient")}
        if not all(math.isfinite(value) for value in losses.values()):
            self._stop(kimg, f"a loss is no longer finite ({_show(losses)})")
        if max(abs(stats["G"]), abs(stats["D"])) > LOSS_LIMIT:
            self._stop(kimg, f"a loss is above {LOSS_LIMIT:g} ({_show(losses)})")
        finite = all(math.isfinite(value) for value in stats.values())
        self.non_finite_steps = 0 if finite else self.non_finite_steps + 1
        if self.non_finite_steps >= PATIENCE:
            self._stop(kimg, f"gradients were not finite in {PATIENCE} consecutive steps ({_show(stats)})")

    def _stop(self, kimg: float, reason: str) -> None:
        last = f"the last good state is in {self.checkpoint}: resume it" if self.checkpoint.exists() else "start again"
        raise TrainingError(
            f"diverged at {kimg:.1f} kimg: {reason}; {last} with --allow-changes and a smaller --learning-rate or a "
            "larger --r1-gamma"
        )


def _show(stats: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in stats.items())
