"""Perceptual distances to minimise: embeddings whose squared Euclidean distance is LPIPS or similar to it.

vgg16   LPIPS on VGG16 (Zhang et al., arXiv 1801.03924), as StyleGAN2's projector uses it; downloads its weights once
lite0   the same on the layers of EfficientNet-Lite0 without learnt weights; a Python package has the weights of its network

A distance is always reported with the name of its space, because numbers of two spaces cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dermis.errors import DermisError
from dermis.features import channels_last, hub_folder, lite0_network, published_weights
from dermis.torchvision_compat import import_vision

MAX_SIZE = 256  # larger images are reduced to this size by averaging, as in StyleGAN2's appendix D
DEFAULT = "vgg16"


@dataclass(frozen=True)
class Perceptual:
    """A perceptual distance.

    Attributes:
        name: Its name in `PERCEPTUALS`.
        embed: Float images [N, 3, H, W] in 0..255 -> embeddings float32 [N, D]. D depends on the image size. The distance
            of two images of one size is |embed(a) - embed(b)|^2. Gradients pass through.
    """

    name: str
    embed: Callable[[Tensor], Tensor]


def perceptual(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Perceptual:
    """Load a distance.

    Args:
        name: A name in `PERCEPTUALS`.
        device: Where it runs.
        dtype: Arithmetic of its convolutions; None for float32.

    Raises:
        DermisError: There is no such distance, or its weights are not available.
    """
    if name not in PERCEPTUALS:
        raise DermisError(f"distance: {name!r} is none of {', '.join(PERCEPTUALS)}")
    layers = PERCEPTUALS[name](torch.device(device))

    def embed(images: Tensor) -> Tensor:
        size = max(images.shape[2:])
        if size > MAX_SIZE:
            images = F.interpolate(images, size=(MAX_SIZE, MAX_SIZE), mode="area")
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            maps, weights = layers(images)
        return torch.cat([_rows(each, weight) for each, weight in zip(maps, weights, strict=True)], dim=1)

    return Perceptual(name, embed)


Layers = Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor | None]]]


def _rows(maps: Tensor, weight: Tensor | None) -> Tensor:
    """Turn features [N, C, H, W] into rows whose squared distance is the term of a layer in LPIPS (equation 1).

    The features of each position are scaled to length 1, channels are weighted by `weight` [C] (None: all 1), and positions
    are averaged.
    """
    unit = F.normalize(maps.float(), dim=1, eps=1e-10)
    if weight is not None:
        unit = unit * weight.sqrt()[:, None, None]
    rows: Tensor = unit.flatten(1) / (unit.shape[2] * unit.shape[3]) ** 0.5
    return rows


def _lite0(device: torch.device) -> Layers:
    network = channels_last(lite0_network(features_only=True).to(device))

    def layers(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        maps: list[Tensor] = network((images / 127.5 - 1).contiguous(memory_format=torch.channels_last))
        return maps, [None] * len(maps)

    return layers


def _vgg16(device: torch.device) -> Layers:
    files = "weights-vgg16-lpips.pth and vgg16-397923af.pth"
    with published_weights("the LPIPS weights", f"take the distance lite0, or put {files} into {hub_folder()}"):
        utils = import_vision("torch_fidelity.utils")
        module: Any = utils.create_sample_similarity(
            "lpips-vgg16", cuda=False, verbose=False, sample_similarity_resize=None
        )
    module = channels_last(module.to(device))
    weights = [lin.model[-1].weight.flatten() for lin in module.lins]

    def layers(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        return module.net(module.normalize(images).contiguous(memory_format=torch.channels_last)), weights

    return layers


PERCEPTUALS: dict[str, Callable[[torch.device], Layers]] = {"vgg16": _vgg16, "lite0": _lite0}
