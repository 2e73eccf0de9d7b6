"""Perceptual distances to minimise: embeddings in which the squared Euclidean distance is that of LPIPS, or like it.

vgg16   LPIPS on VGG16 (Zhang et al., arXiv 1801.03924), as StyleGAN2's projector uses it; downloads its weights once
lite0   the same without learnt weights on the layers of EfficientNet-Lite0, whose weights come with a Python package

A distance is always told with the name of its space: numbers of two spaces cannot be compared.
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

MAX_SIZE = 256  # larger images are averaged down to it, as in StyleGAN2's appendix D
DEFAULT = "vgg16"


@dataclass(frozen=True)
class Perceptual:
    """float images [N, 3, H, W] in 0..255 -> embeddings float32 [N, D]; D depends on the image size.

    |embed(a) - embed(b)|^2 of a row is the distance of two images of one size. Gradients pass through.
    """

    name: str
    embed: Callable[[Tensor], Tensor]


def perceptual(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Perceptual:
    """A distance by its name, on a device. `dtype`: arithmetic of its convolutions, float32 if None.

    DermisError if there is none of this name or its weights cannot be had.
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
    """Features [N, C, H, W] as rows whose squared distance is LPIPS's term of a layer (equation 1): the features of each
    place at length 1, channels weighted by `weight` [C] (1 each if None), places averaged.
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
