"""What the official networks compute from given weights: `../shared/parity`, or the folder DERMIS_PARITY."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PARITY = Path(os.environ.get("DERMIS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
TOLERANCE = 1e-4


def case(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(state_dict, tensors of the case)."""
    with np.load(PARITY / name) as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file}
    return (
        {key.removeprefix("state/"): value for key, value in arrays.items() if key.startswith("state/")},
        {key.removeprefix("case/"): value for key, value in arrays.items() if key.startswith("case/")},
    )
