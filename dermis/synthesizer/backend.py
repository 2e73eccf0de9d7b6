"""What every backend offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Backend:
    """A generator made ready to run at one fixed batch of `micro_batch` rows (N below).

    Up to `workers` threads may call `mapping` and `images` at the same time. Each of them calls `start_worker` first,
    and should live on, since backends keep buffers for every thread.
    """

    name: str
    dtype: str
    micro_batch: int
    workers: int
    mapping: Callable[[Float, Float], Float]  # z [N, z_dim], c [N, c_dim] -> w [N, w_dim], not truncated
    images: Callable[[Float, Float], Bytes]  # ws [N, num_ws, w_dim], noise [N, sum of R^2] -> [N, H, W, channels]
    identity: Mapping[str, str]
    start_worker: Callable[[], None] = lambda: None


def cpu_identity() -> dict[str, str]:
    """What decides the last bits of a result on a CPU: the processor and the widest instructions it has."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wide = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2", "sve2", "sve", "neon")
    return {
        "device": "cpu",
        "processor": str(capabilities.get("cpu_name", "unknown")),
        "instructions": next((name for name in wide if capabilities.get(name)), "baseline"),
    }
