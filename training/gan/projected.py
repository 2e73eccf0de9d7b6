"""A discriminator on the features of a pretrained network: Projected GAN (Sauer et al., arXiv 2111.01007).

It uses features that already represent edges, textures and shapes, and therefore needs far fewer images than a
discriminator that has to learn them. Four or five stages of a frozen EfficientNet-Lite0 are mixed by fixed random
convolutions, across channels (CCM) and from coarse to fine across scales (CSM), so that the decision does not depend on a
small part of the features. A small trained network, a head, computes a logit from each mixed stage.

The generator is trained against this feature space, so its distances in this space or a similar one are too good. Evaluate
it in another space too.

A training step differs from StyleGAN2's in the loss (`training.gan.loss`) and, by default, in having no gradient penalty; the
networks are called in the same way. The fixed parts follow from the seed: they are not parameters and not in the state dict.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from dermis.features import channels_last, lite0_network
from dermis.networks import minibatch_std

INPUT_SIZE = 128  # default side to which smaller images are enlarged: a third of the cost of the backbone's own 224
LEARNING_RATE = 0.002  # learning rate of Adam for weights under spectral normalisation
_FEATURES = (16, 24, 40, 112, 320)  # channels of the backbone at 1/2, 1/4, 1/8, 1/16 and 1/32
_WIDTHS = (24, 48, 96, 192, 256)  # channels after mixing
STATISTICS = 2 * sum(_FEATURES[1:])  # mean and deviation of every channel at 1/4 to 1/32
_CMAP_DIM = 64


class ProjectedDiscriminator(nn.Module):
    """image [N, 3, H, W] and label c [N, c_dim] -> logits [N, levels], one for each level, fine to coarse.

    Unconditional if c_dim is 0. With labels, each level's output is projected on an embedding of the label (Miyato and
    Koyama, arXiv 1802.05637). The backbone takes images in [-1, 1]. Images smaller than input_size are enlarged; larger ones
    are not reduced, because their details would otherwise be lost to the discriminator.

    Args:
        c_dim: Number of classes.
        seed: Seed of the fixed random convolutions.
        device: Device of the network.
        resolution: Side of the images, a power of two.
        levels: Number of feature levels that are used, 4 or 5; 5 adds the one at half the resolution.
        mbstd_group_size: Size of the groups whose standard deviation each head sees (`minibatch_std`); 0 for none.
        input_size: Side to which smaller images are enlarged, a multiple of 32.
        max_width: Largest number of channels in the heads, a multiple of 8.
    """

    def __init__(
        self,
        c_dim: int,
        seed: int,
        device: torch.device | str = "cpu",
        resolution: int = INPUT_SIZE,
        levels: int = 4,
        mbstd_group_size: int = 0,
        input_size: int = INPUT_SIZE,
        max_width: int = 256,
    ) -> None:
        super().__init__()
        self.c_dim = c_dim
        self.size = max(resolution, input_size)
        # A module in a tuple is not a submodule: the fixed part must not be in parameters, optimizers and checkpoints.
        self._fixed = (channels_last(_Projection(seed, levels).to(device)),)
        out_channels = _CMAP_DIM if c_dim > 0 else 1
        sizes = [self.size // 2 ** (5 - k) for k in reversed(range(levels))]
        self.scales = nn.ModuleList(
            _Scale(width, size, out_channels, mbstd_group_size, max_width)
            for width, size in zip(_WIDTHS[-levels:], sizes, strict=True)
        )
        if c_dim > 0:
            self.embed = nn.Linear(c_dim, _CMAP_DIM, bias=False)
        channels_last(self.to(device))

    def forward(self, img: Tensor, c: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """Compute logits of images.

        `dtype` is the arithmetic of convolutions; of the fixed ones only on a GPU, because a CPU is not faster with it.
        """
        return self.heads(self.features(img, dtype)[1], c, dtype)

    def features(self, img: Tensor, dtype: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps of the pretrained backbone, fine to coarse, the last ones at 1/4, 1/8, 1/16 and 1/32 of the image.

        Returns:
            The maps of the backbone, and the maps after the fixed random mixing, which are the input of the heads.
        """
        x = F.interpolate(img.float(), size=(self.size, self.size), mode="bilinear", align_corners=False)
        fixed = self._fixed[0]
        with torch.autocast(img.device.type, dtype=dtype, enabled=dtype is not None and img.is_cuda):
            stages: list[Tensor] = fixed.backbone(x.contiguous(memory_format=torch.channels_last))
            mixed: list[Tensor] = fixed(stages)
        return stages, mixed

    def heads(self, mixed: list[Tensor], c: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """Logits [N, levels] of mixed features. This is the only trained part."""
        with torch.autocast(mixed[0].device.type, dtype=dtype, enabled=dtype is not None):
            outputs = [scale(y) for scale, y in zip(self.scales, mixed, strict=True)]
        logits = torch.stack(outputs, dim=1).float()  # [N, levels, 1 or _CMAP_DIM]
        if self.c_dim > 0:
            assert c is not None
            logits = logits * self.embed(c)[:, None] / math.sqrt(_CMAP_DIM)
        return logits.sum(dim=2)

    def logits_and_statistics(
        self, img: Tensor, c: Tensor | None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, levels], and the statistics [N, STATISTICS] of the features from which they are computed."""
        stages, mixed = self.features(img, dtype)
        return self.heads(mixed, c, dtype), statistics(stages)


def statistics(stages: list[Tensor]) -> Tensor:
    """Mean and standard deviation over the pixels of every channel of the last four stages: [N, STATISTICS]."""
    flat = [x.float().flatten(2) for x in stages[-4:]]
    return torch.cat([x.mean(dim=2) for x in flat] + [(x.var(dim=2, correction=0) + 1e-6).sqrt() for x in flat], dim=1)


class _Projection(nn.Module):
    """Stages of the backbone -> stages mixed across channels and from coarse to fine. Nothing here is trained."""

    def __init__(self, seed: int, levels: int) -> None:
        super().__init__()
        self.backbone = lite0_network(features_only=True, out_indices=tuple(range(5 - levels, 5)))
        generator = torch.Generator().manual_seed(seed)
        features, widths = _FEATURES[-levels:], _WIDTHS[-levels:]
        self.across_channels = nn.ModuleList(
            _random_conv(old, new, 1, generator) for old, new in zip(features, widths, strict=True)
        )
        self.across_scales = nn.ModuleList(
            _random_conv(coarse, fine, 3, generator) for fine, coarse in pairwise(widths)
        )
        self.eval().requires_grad_(False)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        mixed = [conv(y) for conv, y in zip(self.across_channels, stages, strict=True)]
        for k in reversed(range(len(mixed) - 1)):
            coarse = F.interpolate(mixed[k + 1], scale_factor=2.0, mode="bilinear", align_corners=False)
            mixed[k] = mixed[k] + self.across_scales[k](coarse)
        return mixed


class _Scale(nn.Module):
    """Head of one level: features [N, C, size, size] -> [N, out_channels], halved in size down to 4 to 7 px."""

    def __init__(self, channels: int, size: int, out_channels: int, mbstd_group_size: int, max_width: int) -> None:
        super().__init__()
        self.mbstd_group_size = mbstd_group_size
        layers: list[nn.Module] = []
        while size >= 8:
            wider = min(2 * channels, max_width)
            layers += _block(nn.Conv2d(channels, wider, 4, stride=2, padding=1))
            channels, size = wider, size // 2
        if not layers:
            wider = min(channels, max_width)
            layers += _block(nn.Conv2d(channels, wider, 3, padding=1))
            channels = wider
        channels += mbstd_group_size > 0
        layers.append(spectral_norm(nn.Conv2d(channels, out_channels, size)))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        *layers, last = self.layers
        for layer in layers:
            x = layer(x)
        if self.mbstd_group_size:
            x = minibatch_std(x, self.mbstd_group_size, 1)
        y: Tensor = last(x)
        return y.flatten(1)


def _block(conv: nn.Conv2d) -> list[nn.Module]:
    # A group norm instead of a batch norm, because a logit must not depend on how a batch is divided over processes.
    return [spectral_norm(conv), nn.GroupNorm(8, conv.out_channels), nn.LeakyReLU(0.2, inplace=True)]


def _random_conv(in_channels: int, out_channels: int, kernel_size: int, generator: torch.Generator) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    std = 1 / math.sqrt(in_channels * kernel_size**2)  # keeps the variance of the features
    with torch.no_grad():
        conv.weight.normal_(std=std, generator=generator)
    return conv
