"""Features on a CPU with OpenVINO: within a few millionths of torch's, in a quarter of the time.

Each image is computed on one core (`dermis.openvino_images`). Sums are float32, unless bfloat16 is asked for.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dermis.cpus import available_cpus
from dermis.openvino_images import EachImage, Precision, convert_and_compile

Extract = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
Matrix = Callable[[int, int], NDArray[np.float32]]
"""(from, to) -> [to, from]: the matrix that resizes along one side."""

PRECISION: Precision = "f32"
"""Default precision. "bf16" is faster on some processors, but changes most features too much (docs/evaluation.md)."""


class _Features(nn.Module):
    """uint8 [G, H, W, 3], and matrices rows [h, H] and columns [W, w] that resize it -> features [G, dim]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean.clone())  # tracing refuses a tensor with two names
        self.register_buffer("std", std.clone())

    def forward(self, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        x = rows @ (image.permute(0, 3, 1, 2).float() @ columns)
        features: Tensor = self.network((x.clamp(0, 255) - self.mean) / self.std)
        return features


class _Unresized(nn.Module):
    """`_Features` of images that have the network's size already, which saves a sixth of the time of a small network."""

    def __init__(self, features: _Features) -> None:
        super().__init__()
        self.features = features

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float()
        features: Tensor = self.features.network((x - self.features.mean) / self.features.std)
        return features


class OpenvinoFeatures:
    """Function from uint8 images [N, H, W, 3] to features float32 [N, dim]. Safe to call from several threads.

    The network is compiled at the first call, in about a second: once for images of its size, once for all others.

    Args:
        network: Normalised float32 [N, 3, h, w] -> [N, dim].
        size: (h, w).
        matrix: Gives the matrices that resize to `size`.
        mean: Mean of the channels, [3, 1, 1], of values in 0..255.
        std: Standard deviation of the channels, [3, 1, 1], of values in 0..255.
        fallback: Computes features if OpenVINO cannot compile the network.
        threads: Images that are computed at the same time; None for the number of cores that this process can use.
        precision: Precision of the arithmetic; None for `PRECISION`.
        group: Images that one core computes together. More than one is a little faster for small networks and many images.
    """

    def __init__(
        self,
        network: nn.Module,
        size: tuple[int, int],
        matrix: Matrix,
        mean: Tensor,
        std: Tensor,
        fallback: Extract,
        *,
        threads: int | None = None,
        precision: Precision | None = None,
        group: int = 1,
    ) -> None:
        self._module = _Features(network, mean, std).eval()
        self._size = size
        self._matrix = lru_cache(maxsize=8)(matrix)
        self._fallback = fallback
        self._threads = threads or available_cpus()
        self._precision = precision or PRECISION
        self._group = group
        self._compiled: dict[bool, EachImage | None] = {}  # key: whether it resizes
        self._failed = False
        self._lock = threading.Lock()

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute features of uint8 images [N, H, W, 3], with N at least 1."""
        resize = images.shape[1:3] != self._size
        with self._lock:
            if resize not in self._compiled and not self._failed:
                self._compiled[resize] = self._compile(resize)
                self._failed = self._compiled[resize] is None
        compiled = self._compiled.get(resize)
        if compiled is None:
            return self._fallback(images)
        if not resize:
            return compiled(images)
        height, width = self._size
        rows, columns = self._matrix(images.shape[1], height), self._matrix(images.shape[2], width)
        return compiled(images, {1: rows, 2: np.ascontiguousarray(columns.T)})

    def _compile(self, resize: bool) -> EachImage | None:
        from dermis.synthesizer.openvino_cpu import import_openvino, own_logging

        ov = import_openvino()
        height, width = self._size
        module: nn.Module = _Unresized(self._module)
        example: tuple[Tensor, ...] = (torch.zeros(self._group, height, width, 3, dtype=torch.uint8),)
        shapes: list[Any] = [([self._group, height, width, 3], ov.Type.u8)]
        if resize:
            module = self._module
            images = torch.zeros(self._group, 32, 32, 3, dtype=torch.uint8)
            example = images, torch.zeros(height, 32), torch.zeros(32, width)
            shapes = [([self._group, -1, -1, 3], ov.Type.u8), [height, -1], [-1, width]]

        def convert() -> Any:
            with torch.no_grad(), own_logging(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing warns that shapes are constants, which is correct here
                return ov.convert_model(module.eval(), example_input=example, input=shapes)

        return convert_and_compile(convert, "this feature space", precision=self._precision, threads=self._threads)
