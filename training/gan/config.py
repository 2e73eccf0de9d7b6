"""Everything that decides what a GAN training run computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from dermis.errors import TrainingError
from dermis.networks import DiscriminatorConfig, GeneratorConfig
from training.gan.augment import AUGMENTATIONS

Precision = Literal["fp32", "bf16", "fp16"]
# What a run can never change on its way: the shape of the networks, and the seed of everything random.
STRUCTURE = frozenset({
    "resolution", "c_dim", "seed", "z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max", "conv_clamp",
    "projected",
})  # fmt: skip


@dataclass(frozen=True)
class GanConfig:
    """Hyper-parameters of one run. None follows the official automatic rule for the resolution (`auto_config`)."""

    resolution: int
    c_dim: int
    seed: int = 0
    batch: int = 32
    total_kimg: float = 1000.0
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 2
    channel_base: int = 16384
    channel_max: int = 512
    conv_clamp: float | None = 256.0
    mbstd_group_size: int = 4
    learning_rate: float = 0.0025
    r1_gamma: float = 0.01
    r1_interval: int = 16
    pl_weight: float = 2.0
    pl_interval: int = 4
    pl_batch_shrink: int = 2
    pl_decay: float = 0.01
    style_mixing_prob: float = 0.9
    ema_kimg: float = 10.0
    ema_rampup: float | None = 0.05
    mirror: bool = True
    augment: str = "bg"
    augment_target: float | None = 0.6  # None fixes p at augment_p
    augment_p: float = 0.0
    augment_kimg: float = 500.0
    precision: Precision = "fp32"
    projected: bool = False  # training.gan.projected's discriminator instead of StyleGAN2's

    def __post_init__(self) -> None:
        if self.augment not in AUGMENTATIONS:
            raise TrainingError(f"augment: {self.augment!r} is none of {', '.join(AUGMENTATIONS)}")
        group = min(self.mbstd_group_size, self.batch)
        if self.batch < 1 or self.batch % group:
            raise TrainingError(f"batch: {self.batch} must be a multiple of mbstd_group_size {self.mbstd_group_size}")
        if not 0 <= self.seed < 2**31:
            raise TrainingError(f"seed: {self.seed} is not in [0, 2**31)")
        if not 0 <= self.augment_p <= 1:
            raise TrainingError(f"augment_p: {self.augment_p} is not in [0, 1]")
        if self.total_kimg <= 0:
            raise TrainingError(f"kimg: {self.total_kimg} must be positive")

    @property
    def generator(self) -> GeneratorConfig:
        return GeneratorConfig(
            img_resolution=self.resolution,
            c_dim=self.c_dim,
            z_dim=self.z_dim,
            w_dim=self.w_dim,
            mapping_layers=self.mapping_layers,
            channel_base=self.channel_base,
            channel_max=self.channel_max,
            conv_clamp=self.conv_clamp,
        )

    @property
    def discriminator(self) -> DiscriminatorConfig:
        return DiscriminatorConfig(
            img_resolution=self.resolution,
            c_dim=self.c_dim,
            channel_base=self.channel_base,
            channel_max=self.channel_max,
            conv_clamp=self.conv_clamp,
            mbstd_group_size=self.mbstd_group_size,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when a run is resumed: all but its length. Runs from before an option have its default."""
        later = {"projected": False}
        fields = {name: value for name, value in self.to_dict().items() if name != "total_kimg"}
        return {name: value for name, value in fields.items() if name not in later or value != later[name]}


def auto_config(resolution: int, c_dim: int, **overrides: Any) -> GanConfig:
    """The official 'auto' rule for one GPU (arXiv 2006.06676, appendix C): batch, learning rate, gamma and EMA
    follow the resolution. `overrides` are GanConfig fields; those that are None are left to the rule.

    With `projected`, as in arXiv 2111.01007: no R1, no path length, no style mixing, and augmentation of a fixed strength.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.get("projected"):
        given |= {"r1_gamma": 0.0, "pl_weight": 0.0, "style_mixing_prob": 0.0, "augment_target": None}
        given = {"augment": "blit", "augment_p": 0.5} | given
    batch = int(given.setdefault("batch", max(min(4096 // resolution, 32), 1)))
    given.setdefault("mbstd_group_size", min(batch, 4))
    given.setdefault("learning_rate", 0.002 if resolution >= 1024 else 0.0025)
    given.setdefault("r1_gamma", 0.0002 * resolution**2 / batch)
    given.setdefault("ema_kimg", batch * 10 / 32)
    given.setdefault("channel_base", 32768 if resolution >= 512 else 16384)
    return GanConfig(resolution=resolution, c_dim=c_dim, **given)
