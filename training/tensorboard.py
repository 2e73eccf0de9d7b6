"""TensorBoard's event files in a run folder. The package is optional."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dermis.errors import TrainingError


def require_tensorboard() -> None:
    """Raise TrainingError if the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise TrainingError("--tensorboard: needs the package tensorboard: pip install tensorboard")


def open_writer(out: Path, purge_step: int | None = None) -> Any:
    """Open a SummaryWriter for the run folder `out`. Earlier points from `purge_step` on are hidden."""
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=purge_step)
