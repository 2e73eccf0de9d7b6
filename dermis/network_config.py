"""Configurations of the networks. Imports no torch, which describing and serving a bundle does not need.

`dermis.networks` builds the networks and exports these names as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

NoiseMode = Literal["const", "random", "none"]
DEFAULT_NOISE_MODE: NoiseMode = "random"  # for datasets, and for images that are generated to train on and to measure


@dataclass(frozen=True)
class GeneratorConfig:
    """The options that determine shapes and arithmetic of a generator. Their names are those of the official arguments.

    The `num_fp16_res` highest resolutions run in float16 on CUDA (float32 elsewhere); `conv_clamp` limits their activations
    to +-conv_clamp. `c_dim` = 0 means unconditional.
    """

    img_resolution: int
    c_dim: int = 0
    z_dim: int = 512
    w_dim: int = 512
    img_channels: int = 3
    mapping_layers: int = 8
    mapping_lr_multiplier: float = 0.01
    embed_features: int | None = None
    layer_features: int | None = None
    w_avg_beta: float = 0.995
    channel_base: int = 32768
    channel_max: int = 512
    num_fp16_res: int = 0
    conv_clamp: float | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.z_dim <= 0 or self.w_dim <= 0:
            raise ValueError("z_dim and w_dim must be positive")

    @property
    def num_ws(self) -> int:
        """Number of style vectors: two for each resolution, that is 2 log2(resolution) - 2 (paper: 14 at 256 px)."""
        return 2 * int(math.log2(self.img_resolution)) - 2


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The options that determine shapes and arithmetic of a discriminator; see `GeneratorConfig`.

    `cmap_dim` None means the channels at 4 px if conditional, 0 otherwise (the official rule). `mbstd_group_size` None means
    one group of the whole batch. Without mapping layers (`mapping_layers` 0, as in the official conversion from TensorFlow)
    the normalised embedding of the label is the projection vector.
    """

    img_resolution: int
    c_dim: int = 0
    img_channels: int = 3
    channel_base: int = 32768
    channel_max: int = 512
    num_fp16_res: int = 0
    conv_clamp: float | None = None
    cmap_dim: int | None = None
    mapping_layers: int = 8
    mapping_lr_multiplier: float = 0.01
    embed_features: int | None = None
    layer_features: int | None = None
    mbstd_group_size: int | None = 4
    mbstd_num_channels: int = 1

    def __post_init__(self) -> None:
        _check_sizes(self, least_layers=0)
        width = channels_at(self, 4) if self.cmap_dim is None else self.cmap_dim
        if self.c_dim > 0 and width < 1:
            raise ValueError(f"cmap_dim must be at least 1 for a conditional discriminator; got {width}")
        if self.c_dim > 0 and self.mapping_layers == 0 and self.embed_features not in (None, width):
            raise ValueError(
                f"without mapping layers embed_features must be cmap_dim, {width}; got {self.embed_features}"
            )


def _check_sizes(config: GeneratorConfig | DiscriminatorConfig, least_layers: int = 1) -> None:
    resolution = config.img_resolution
    if resolution < 8 or resolution & (resolution - 1):
        raise ValueError(f"img_resolution must be a power of two, at least 8; got {resolution}")
    if config.channel_base < resolution or config.channel_max < 1 or config.img_channels < 1:
        raise ValueError("channel_base must be at least img_resolution, channel_max and img_channels at least 1")
    if config.c_dim < 0 or not least_layers <= config.mapping_layers <= 64:
        raise ValueError(f"c_dim must be at least 0, mapping_layers from {least_layers} to 64")


def channels_at(config: GeneratorConfig | DiscriminatorConfig, resolution: int) -> int:
    """Return the channels of the feature maps at a resolution."""
    return min(config.channel_base // resolution, config.channel_max)
