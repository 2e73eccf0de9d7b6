"""A discriminator on the features of a pretrained network: Projected GAN (Sauer et al., arXiv 2111.01007).

Judging features that already see edges, textures and shapes, it needs far fewer images than one that has to learn them.
Four stages of a frozen EfficientNet-Lite0 are mixed by fixed random convolutions, across channels (CCM) and from coarse to
fine across scales (CSM), so that no small part of the features decides; a small trained network judges each scale.

Its weakness: the generator learns to please this feature space, so distances in this space or near it flatter it.
Evaluate in another one too.

A training step differs from StyleGAN2's in the loss (`training.gan.loss.HINGE`) and in having no R1 penalty; the networks
are called in the same way. Fixed parts are a function of the seed, no parameters, and in no state dict.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dermis.features import channels_last, lite0_network

INPUT_SIZE = 128  # pixels to which smaller images are enlarged for the backbone; a third of the cost of its own 224
LEARNING_RATE = 0.002  # of Adam, for weights under spectral normalisation
_FEATURES = (24, 40, 112, 320)  # channels of the backbone at 1/4, 1/8, 1/16 and 1/32
_WIDTHS = (48, 96, 192, 256)  # channels after mixing
_MAX_WIDTH = 256
_CMAP_DIM = 64


class ProjectedDiscriminator(nn.Module):
    """image [N, 3, H, W] and label c [N, c_dim] -> logits [N, 4], one a scale, fine to coarse.

    Unconditional if c_dim is 0. With labels, each scale's output is projected on an embedding of the label (Miyato and
    Koyama, arXiv 1802.05637). The backbone takes images in [-1, 1] as they are, those of less than INPUT_SIZE enlarged:
    larger ones must not be reduced, or nobody would judge their detail. `resolution` is theirs, a power of two.
    """

    def __init__(self, c_dim: int, seed: int, device: torch.device | str = "cpu", resolution: int = INPUT_SIZE) -> None:
        super().__init__()
        self.c_dim = c_dim
        self.size = max(resolution, INPUT_SIZE)
        # In a tuple, and so no submodule: what never changes has no place among parameters, optimizers and checkpoints.
        self._fixed = (channels_last(_Projection(seed).to(device)),)
        out_channels = _CMAP_DIM if c_dim > 0 else 1
        sizes = [self.size // 2 ** (k + 2) for k in range(4)]
        self.scales = nn.ModuleList(_Scale(w, size, out_channels) for w, size in zip(_WIDTHS, sizes, strict=True))
        if c_dim > 0:
            self.embed = nn.Linear(c_dim, _CMAP_DIM, bias=False)
        channels_last(self.to(device))

    def forward(self, img: Tensor, c: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """`dtype` is the arithmetic of the scales' convolutions; the fixed part is float32."""
        x = F.interpolate(img.float(), size=(self.size, self.size), mode="bilinear", align_corners=False)
        features = self._fixed[0](x.contiguous(memory_format=torch.channels_last))
        with torch.autocast(img.device.type, dtype=dtype, enabled=dtype is not None):
            outputs = [scale(y) for scale, y in zip(self.scales, features, strict=True)]
        logits = torch.stack(outputs, dim=1).float()  # [N, 4, 1 or _CMAP_DIM]
        if self.c_dim > 0:
            assert c is not None
            logits = logits * self.embed(c)[:, None] / math.sqrt(_CMAP_DIM)
        return logits.sum(dim=2)


class _Projection(nn.Module):
    """Image [N, 3, S, S] -> mixed features at S/4, S/8, S/16 and S/32. Nothing here is ever trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.backbone = lite0_network(features_only=True, out_indices=(1, 2, 3, 4))
        generator = torch.Generator().manual_seed(seed)
        self.across_channels = nn.ModuleList(
            _random_conv(old, new, 1, generator) for old, new in zip(_FEATURES, _WIDTHS, strict=True)
        )
        self.across_scales = nn.ModuleList(
            _random_conv(coarse, fine, 3, generator) for fine, coarse in pairwise(_WIDTHS)
        )
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        mixed = [conv(y) for conv, y in zip(self.across_channels, self.backbone(x), strict=True)]
        for k in (2, 1, 0):
            coarse = F.interpolate(mixed[k + 1], scale_factor=2.0, mode="bilinear", align_corners=False)
            mixed[k] = mixed[k] + self.across_scales[k](coarse)
        return mixed


class _Scale(nn.Module):
    """Judge of one scale: features [N, C, size, size] -> [N, out_channels], by halving down to 4 px."""

    def __init__(self, channels: int, size: int, out_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while size > 4:
            wider = min(2 * channels, _MAX_WIDTH)
            layers += _block(nn.Conv2d(channels, wider, 4, stride=2, padding=1))
            channels, size = wider, size // 2
        if not layers:
            layers += _block(nn.Conv2d(channels, channels, 3, padding=1))
        layers.append(spectral_norm(nn.Conv2d(channels, out_channels, 4)))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y.flatten(1)


def _block(conv: nn.Conv2d) -> list[nn.Module]:
    # Groups instead of a batch norm: an image's logit must not depend on how a batch is split over processes.
    return [spectral_norm(conv), nn.GroupNorm(8, conv.out_channels), nn.LeakyReLU(0.2, inplace=True)]


def _random_conv(in_channels: int, out_channels: int, kernel_size: int, generator: torch.Generator) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    std = 1 / math.sqrt(in_channels * kernel_size**2)  # keeps the variance of the features
    with torch.no_grad():
        conv.weight.normal_(std=std, generator=generator)
    return conv
