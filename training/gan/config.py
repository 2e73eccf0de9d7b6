"""The options that determine what a GAN training run computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch

from dermis.devices import fast_dtype
from dermis.errors import TrainingError
from dermis.networks import DiscriminatorConfig, GeneratorConfig
from training.gan.augment import AUGMENTATIONS

Precision = Literal["fp32", "bf16", "fp16"]
LEVELS = (4, 5)  # possible numbers of feature levels of the projected discriminator
# Options that a resumed run can never change: the shape of the networks, and the seed of everything random.
STRUCTURE = frozenset({
    "resolution", "c_dim", "seed", "z_dim", "w_dim", "mapping_layers", "channel_base", "channel_max", "conv_clamp",
    "projected", "discriminator_mapping_layers", "projected_levels", "projected_mbstd", "projected_input",
    "projected_width", "dp",
})  # fmt: skip


@dataclass(frozen=True)
class GanConfig:
    """Hyper-parameters of one run. `auto_config` chooses them by the official rule for the resolution."""

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
    # Options from here on did not exist when the first checkpoints were written: see `identity`. Add new ones below, with
    # a default that keeps the previous behaviour.
    projected: bool = False  # the discriminator of training.gan.projected instead of StyleGAN2's
    discriminator_mapping_layers: int = 8  # 0 in discriminators that were converted from TensorFlow
    class_balance: float = 0.0  # a class of n images is shown in proportion to n ** (1 - class_balance); 1: all equally
    relativistic: bool = False  # training.gan.loss.RELATIVISTIC, with gradient penalties on real and generated images
    projected_levels: int = 4  # feature levels that the projected discriminator uses
    projected_mbstd: bool = False  # whether its heads see the standard deviation of groups of mbstd_group_size
    projected_input: int = 128  # side to which it enlarges smaller images
    moments_weight: float = 0.0  # weight of training.gan.moments; needs the projected discriminator
    # Learning rate at learning_rate_kimg; it starts from learning_rate. None keeps the rate constant.
    final_learning_rate: float | None = None
    learning_rate_kimg: float = 0.0
    # Weight of the distance along the directions that separate the classes; needs moments_weight.
    class_moments_weight: float = 0.0
    projected_width: int = 256  # largest number of channels in the heads of the projected discriminator
    # Differential privacy (training.gan.private). batch is then the expected number of patients in a step.
    dp: bool = False
    dp_noise: float | None = None  # standard deviation of the noise divided by dp_clip
    dp_clip: float = 1.0  # largest norm of the gradient of one patient
    dp_epsilon: float | None = None  # training stops before it is exceeded
    dp_delta: float | None = None  # None: 1 / (10 * number of patients)
    dp_images_per_patient: int = 4  # maximum number of images of a patient in a step
    dp_seed: int | None = None  # for tests: noise that can be repeated, and protects nobody
    dp_public_start: bool = False  # the user states that the first weights were trained on public images only

    def __post_init__(self) -> None:
        self._check_privacy()
        self._check_numbers()
        if self.augment not in AUGMENTATIONS:
            raise TrainingError(f"augment: {self.augment!r} is none of {', '.join(AUGMENTATIONS)}")
        group = min(self.mbstd_group_size, self.batch)
        if self.batch < 1 or self.batch % group:
            raise TrainingError(f"batch: {self.batch} must be a multiple of mbstd_group_size {self.mbstd_group_size}")
        if not 0 <= self.seed < 2**31:
            raise TrainingError(f"seed: {self.seed} is not in [0, 2**31)")
        if self.precision not in get_args(Precision):
            raise TrainingError(f"precision: {self.precision!r} is none of {', '.join(get_args(Precision))}")
        if self.projected_levels not in LEVELS:
            raise TrainingError(f"projected_levels: {self.projected_levels} is none of {LEVELS}")
        if self.projected_input < 128 or self.projected_input % 32:
            raise TrainingError(f"projected_input: {self.projected_input} must be a multiple of 32, and at least 128")
        if self.relativistic and self.r1_gamma == 0:
            raise TrainingError("r1_gamma: the relativistic loss needs gradient penalties; give a value above 0")
        if self.class_moments_weight and not (self.moments_weight and self.c_dim > 1):
            raise TrainingError("class_moments_weight: needs moments_weight above 0 and at least two classes")
        defaults = _later_defaults()
        for name in ("moments_weight", "projected_mbstd", "projected_levels", "projected_input", "projected_width"):
            if not self.projected and getattr(self, name) != defaults[name]:
                raise TrainingError(f"{name}: needs the projected discriminator (--projected)")
        if self.projected_width < 8 or self.projected_width % 8:
            raise TrainingError(f"projected_width: {self.projected_width} must be a multiple of 8, and at least 8")

    def _check_numbers(self) -> None:
        """Raise TrainingError with the first number that is out of its range. Options of what is turned off can be anything."""
        at_least_one = ["mbstd_group_size"]
        at_least_one += ["r1_interval"] if self.r1_gamma else []
        at_least_one += ["pl_interval", "pl_batch_shrink"] if self.pl_weight else []
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise TrainingError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("r1_gamma", "pl_weight", "ema_kimg", "ema_rampup", "moments_weight", "class_moments_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise TrainingError(f"{name}: {value} must be a finite number and must not be negative")
        for name in ("pl_decay", "style_mixing_prob", "augment_p", "class_balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        above_zero = ["learning_rate", "final_learning_rate", "conv_clamp", "total_kimg"]
        if self.augment_target is not None and self.augment != "none":
            above_zero.append("augment_kimg")
            if not -1 <= self.augment_target <= 1:
                raise TrainingError(
                    f"augment_target: {self.augment_target} is not in [-1, 1], the range of E[sign(D(real))]"
                )
        for name in above_zero:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise TrainingError(f"{name.removeprefix('total_')}: {value} must be a finite number above 0")
        if not 0 <= self.learning_rate_kimg < math.inf or (self.final_learning_rate is None) != (
            self.learning_rate_kimg == 0
        ):
            raise TrainingError(
                "learning_rate_kimg: give both it (above 0) and final_learning_rate, or neither of them"
            )

    def _check_privacy(self) -> None:
        defaults = _later_defaults()
        if not self.dp:
            for name in (name for name in defaults if name.startswith("dp_") and getattr(self, name) != defaults[name]):
                raise TrainingError(f"{name}: needs --dp")
            return
        couples = "a patient's gradient must not depend on other patients' images"
        measures = "it would reveal real images without noise"
        for name, accepted, reason in (
            ("relativistic", False, f"it shows real images to the generator's loss, and {measures}"),
            ("r1_gamma", 0, "the penalty uses real images outside of the clipped gradient"),
            ("augment_target", None, f"the strength would follow the discriminator on real images, and {measures}"),
            ("moments_weight", 0, f"it compares means of real images, and {measures}"),
            ("class_balance", 0, "every patient must take part with the same probability"),
            ("projected_mbstd", False, couples),
            ("mbstd_group_size", 1, couples),
        ):
            if getattr(self, name) != accepted:
                raise TrainingError(f"{name}: must be {accepted} with --dp: {reason}")
        for name, low in (("dp_clip", 0.0), ("dp_epsilon", 0.0), ("dp_delta", 0.0), ("dp_images_per_patient", 0)):
            value = getattr(self, name)
            if value is not None and not low < value < math.inf:
                raise TrainingError(f"{name}: {value} must be a finite number above 0")
        if self.dp_noise is not None and not 0 <= self.dp_noise <= _MAX_NOISE:
            raise TrainingError(f"dp_noise: {self.dp_noise} must be from 0 to {_MAX_NOISE:,.0f}")
        if self.dp_delta is not None and self.dp_delta >= 1:
            raise TrainingError(f"dp_delta: {self.dp_delta} must be below 1")
        if self.dp_seed is not None and self.dp_seed < 0:
            raise TrainingError(f"dp_seed: {self.dp_seed} must not be negative")

    def check_processes(self, count: int) -> None:
        """Raise TrainingError if `count` processes cannot divide the batch and compute what one process would."""
        group = min(self.group_size, self.batch)
        shrink = self.pl_batch_shrink if self.pl_weight else 1
        unit = count * math.lcm(group, shrink)
        if self.dp and count > 1:
            raise TrainingError("--dp: works in one process only; start without torchrun")
        if count > 1 and self.batch % unit:
            raise TrainingError(
                f"batch: {self.batch} must be a multiple of {unit} for {count} processes: each takes whole "
                f"groups of {group} (mbstd_group_size), divisible by {shrink} (pl_batch_shrink)"
            )

    def learning_rate_at(self, nimg: int) -> float:
        """Learning rate after `nimg` images: its logarithm changes linearly until learning_rate_kimg, then not at all."""
        if self.final_learning_rate is None:
            return self.learning_rate
        share = min(nimg / (1000 * self.learning_rate_kimg), 1.0)
        return float(self.learning_rate ** (1 - share) * self.final_learning_rate**share)

    @property
    def group_size(self) -> int:
        """Number of images whose standard deviation the discriminator sees; 1 if it scores each image alone."""
        return self.mbstd_group_size if self.projected_mbstd or not self.projected else 1

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
            mapping_layers=self.discriminator_mapping_layers,
            mbstd_group_size=self.mbstd_group_size,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> dict[str, Any]:
        """The options that must not change when a run is resumed: all but its length, in images or in epsilon.

        Options that the first checkpoints did not have are left out if they have their defaults, so that a run that began
        before them is still the same run.
        """
        later = _later_defaults()
        options = {name: value for name, value in self.to_dict().items() if name not in _LENGTH}
        return {name: value for name, value in options.items() if name not in later or value != later[name]}

    def changed_from(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """This configuration's values of all options that differ from `stored`, the `identity` of a checkpoint."""
        before = _later_defaults() | dict(stored)
        now = _later_defaults() | self.identity
        return {name: value for name, value in now.items() if name not in before or before[name] != value}


_LENGTH = ("total_kimg", "dp_epsilon")
_MAX_NOISE = 1e6  # the accountant cannot compute with much larger numbers


def _later_defaults() -> dict[str, Any]:
    """Defaults of the options that the first checkpoints did not have: those after `precision`."""
    names = [field.name for field in fields(GanConfig)]
    return {field.name: field.default for field in fields(GanConfig)[names.index("precision") + 1 :]}


# The official configurations that do not depend on the data's resolution; `auto` does, see `base_config`.
_PAPER256: dict[str, Any] = {
    "total_kimg": 25000.0,
    "batch": 64,
    "mbstd_group_size": 8,
    "mapping_layers": 8,
    "channel_base": 16384,
    "learning_rate": 0.0025,
    "r1_gamma": 1.0,
    "ema_kimg": 20.0,
    "ema_rampup": None,
}
_STYLEGAN2 = _PAPER256 | {
    "batch": 32,
    "mbstd_group_size": 4,
    "channel_base": 32768,
    "learning_rate": 0.002,
    "r1_gamma": 10.0,
    "ema_kimg": 10.0,
}
_PROJECTED: dict[str, Any] = {
    "r1_gamma": 0.0,
    "pl_weight": 0.0,
    "style_mixing_prob": 0.0,
    "augment_target": None,
    "augment": "blit",
    "augment_p": 0.5,
}
_PRIVATE: dict[str, Any] = {"r1_gamma": 0.0, "augment_target": None, "mbstd_group_size": 1}
_FIXED_BASES = {"paper256": _PAPER256, "stylegan2": _STYLEGAN2}
BASES = ("auto", *_FIXED_BASES)


def base_config(name: str, resolution: int, c_dim: int, **overrides: Any) -> GanConfig:
    """A configuration by its official name.

    auto        batch, learning rate, gamma and average follow the resolution, for one GPU (arXiv 2006.06676, appendix C)
    paper256    the same paper's baseline for FFHQ and LSUN Cat at 256 px: eight GPUs, 25,000 kimg
    stylegan2   configuration F of arXiv 1912.04958, made for 1024 px

    None of them chooses the augmentation. `projected` changes defaults as in arXiv 2111.01007: no R1 (0.1 on the features
    with `relativistic`), no path length, no style mixing, and augmentation of a fixed strength. `dp` changes the defaults
    that differential privacy does not allow: no R1, no mini-batch standard deviation, augmentation of a fixed strength.

    Args:
        name: One of the names above.
        resolution: Side of the images in pixels.
        c_dim: Number of classes; 0 for an unconditional generator.
        overrides: Fields of GanConfig. A value of None leaves the field to the configuration.

    Raises:
        TrainingError: No configuration has this name, or a value is not valid.
    """
    options = {option: value for option, value in overrides.items() if value is not None}
    if options.get("projected"):
        options = _PROJECTED | ({"r1_gamma": 0.1} if options.get("relativistic") else {}) | options
    if options.get("dp"):
        options = _PRIVATE | options
    if name == "auto":
        base = _auto(resolution, options.get("batch"))
    elif name in _FIXED_BASES:
        base = _FIXED_BASES[name]
    else:
        raise TrainingError(f"base: {name!r} is none of {', '.join(BASES)}")
    return GanConfig(resolution=resolution, c_dim=c_dim, **(base | options))


def auto_config(resolution: int, c_dim: int, **overrides: Any) -> GanConfig:
    """The `base_config` named "auto"."""
    return base_config("auto", resolution, c_dim, **overrides)


def automatic_batch(resolution: int, count: int) -> int | None:
    """The official batch for `count` GPUs: the sum of the batches for one GPU, at most 64. None for one GPU."""
    return None if count == 1 else max(min(count * min(4096 // resolution, 32), 64), count)


def automatic_precision(device: torch.device) -> Precision:
    """bf16 if the device multiplies it natively, otherwise fp32."""
    return "bf16" if fast_dtype(device) == torch.bfloat16 else "fp32"


def _auto(resolution: int, batch: int | None) -> dict[str, Any]:
    batch = max(min(4096 // resolution, 32), 1) if batch is None else max(batch, 1)
    return {
        "batch": batch,
        "mbstd_group_size": min(batch, 4),
        "learning_rate": 0.002 if resolution >= 1024 else 0.0025,
        "r1_gamma": 0.0002 * resolution**2 / batch,
        "ema_kimg": batch * 10 / 32,
        "channel_base": 32768 if resolution >= 512 else 16384,
    }
