"""The network of a copy detector: descriptors of an image and of its halves that survive changes of the image.

The first stages of EfficientNet-Lite0 give a map of 80 features in every 16th part of the image. A 1 x 1 convolution and
generalised-mean pooling (Radenovic et al., arXiv 1711.02512, equation 3) over a region of the map, followed by a linear map
and scaling to length 1, give the descriptor of this region. The regions are the whole image and its upper, lower, left and
right half, so that one pass also describes the parts of an image that was stuck together from two.
"""

from __future__ import annotations

from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermis.errors import BundleError
from dermis.features import fold_batch_norms, lite0_network
from dermis.tensor_files import read_tensors
from dermis.torchvision_compat import import_vision

REGIONS = ("whole", "upper", "lower", "left", "right")
SIZE = 96
DIM = 64
_STAGES = 4
_FEATURES = 80
_WIDTH = 256
_POWER = 3.0
_STEPS = 127  # of the stored weights in 0..largest
_LEAST_SCALE = 1e-6  # a smaller scale is no float16
_SCALE = ".scale"
_LEAST = 1e-4  # features are at least this, because the gradient of their power is not finite at 0


class CopyNetwork(nn.Module):
    """Images float [N, 3, S, S] in [-1, 1] -> descriptors of length 1, [N, 5 * dim], in the order of `REGIONS`.

    Args:
        dim: Dimensions of a descriptor.
        pretrained: Whether the trunk has the weights of ImageNet, or random ones.
    """

    def __init__(self, dim: int = DIM, *, pretrained: bool = False) -> None:
        super().__init__()
        network: Any = lite0_network() if pretrained else _untrained()
        self.trunk = nn.Sequential(network.conv_stem, network.bn1, *list(network.blocks)[:_STAGES])
        self.mix = nn.Conv2d(_FEATURES, _WIDTH, 1)
        self.projection = nn.Linear(_WIDTH, dim)
        self.requires_grad_(True)

    def pooled(self, images: Tensor) -> Tensor:
        """Pool the features of every region, [N, 5, 256]."""
        features = F.relu6(self.mix(self.trunk(images))).float().clamp(min=_LEAST) ** _POWER
        height, width = features.shape[2:]
        top, left = height - height // 2, width - width // 2
        regions = (
            features,
            features[:, :, :top],
            features[:, :, height - top :],
            features[:, :, :, :left],
            features[:, :, :, width - left :],
        )
        return torch.stack([region.mean(dim=(2, 3)) for region in regions], dim=1) ** (1 / _POWER)

    def forward(self, images: Tensor) -> Tensor:
        descriptors: Tensor = F.normalize(self.projection(self.pooled(images)), dim=-1)
        return descriptors.flatten(1)


def to_bytes(network: CopyNetwork) -> bytes:
    """Return the bytes of a safetensors file with the weights of a network.

    A tensor W with several dimensions is stored as int8 Q and float16 s, one scale for each output channel, W = Q s. The others
    are stored as float16.
    """
    stored: dict[str, Tensor] = {}
    for name, weights in network.state_dict().items():
        value = weights.detach().cpu().float().contiguous()
        if value.ndim < 2:
            stored[name] = value.half()
            continue
        largest = value.abs().flatten(1).amax(dim=1)
        scale = (largest / _STEPS).clamp(min=_LEAST_SCALE).half()
        stored[name] = (value / _as_rows(scale, value)).round().clamp(-_STEPS, _STEPS).to(torch.int8)
        stored[f"{name}{_SCALE}"] = scale
    return safetensors.torch.save(stored)


def network_from(weights: bytes, dim: int, where: str) -> CopyNetwork:
    """Make a network of the bytes that `to_bytes` returned.

    Raises:
        BundleError: The file does not have exactly the tensors of the network. The message begins with `where`.
    """
    network = CopyNetwork(dim)
    own = network.state_dict()
    tensors = read_tensors(weights, where, types=("F16", "I8"))
    shapes = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    expected = {name: (value.shape, torch.int8 if value.ndim > 1 else torch.float16) for name, value in own.items()}
    expected |= {f"{name}{_SCALE}": (value.shape[:1], torch.float16) for name, value in own.items() if value.ndim > 1}
    if shapes != expected:
        raise BundleError(f"{where}: has other tensors than a copy detector of {dim} dimensions; train it again")
    state = {}
    for name in own:
        value = tensors[name].float()
        state[name] = value * _as_rows(tensors[f"{name}{_SCALE}"], value) if value.ndim > 1 else value
    if not all(torch.isfinite(value).all() for value in state.values()):
        raise BundleError(f"{where}: has weights that are not finite; train it again")
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _as_rows(scale: Tensor, value: Tensor) -> Tensor:
    """Return scales [N] in a shape that multiplies the first dimension of a tensor."""
    return scale.float().view(-1, *[1] * (value.ndim - 1))


def _untrained() -> nn.Module:
    network = import_vision("timm").create_model("tf_efficientnet_lite0", num_classes=0)
    return fold_batch_norms(network.eval())
