"""The precision of convolutions on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def float32_convolutions() -> Iterator[None]:
    """Compute convolutions of float32 tensors in float32 inside the block.

    Otherwise cuDNN rounds their inputs to the ten bits of TF32, on GPUs that have it. Convolutions of 16-bit tensors are the
    same.
    """
    cudnn = torch.backends.cudnn
    with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False):
        yield
