"""The interface of backends, which run a generator on one kind of device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Backend:
    """A generator that runs at one fixed batch size of `micro_batch` rows (N below).

    Up to `workers` threads can call `mapping` and `images` at the same time. Each of them calls `start_worker` first. They
    should be long-lived, because backends keep buffers for every thread.
    """

    name: str
    dtype: str
    micro_batch: int
    workers: int
    mapping: Callable[[Float, Float], Float]  # z [N, z_dim], c [N, c_dim] -> w [N, w_dim], not truncated
    images: Callable[[Float, Float], Bytes]  # ws [N, num_ws, w_dim], noise [N, sum of R^2] -> [N, H, W, channels]
    identity: Mapping[str, str]
    start_worker: Callable[[], None] = lambda: None
