"""The state of a run, which changes in training: networks, optimizers, path-length mean, augmentation strength, progress."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dermis.errors import TrainingError
from dermis.networks import Discriminator, Generator
from training.checkpoint import load_checkpoint, read_state, save_checkpoint
from training.data.images import ImageDataset
from training.distributed import ALONE, Ranks
from training.gan.augment import AdaptiveP
from training.gan.config import STRUCTURE, GanConfig
from training.gan.loss import Phases
from training.gan.moments import FeatureMoments
from training.gan.projected import LEARNING_RATE as PROJECTED_RATE
from training.gan.projected import STATISTICS, ProjectedDiscriminator


@dataclass
class GanProgress:
    """Progress of a run. A checkpoint stores it with the tensors."""

    step: int = 0
    nimg: int = 0  # real images shown to the discriminator
    seconds: float = 0.0
    stopped: bool = False  # whether the user stopped the run before total_kimg
    stats: dict[str, float] = field(default_factory=dict)  # the latest value of each statistic
    changes: list[dict[str, Any]] = field(default_factory=list)  # options that changed: {"kimg", "before", "after"}
    started_from: dict[str, Any] = field(default_factory=dict)  # source of the first weights; see transfer.py
    dp_steps: int = 0  # noisy steps that were computed, also those that were lost after a checkpoint

    @property
    def kimg(self) -> float:
        return self.nimg / 1000


@dataclass
class GanState:
    """Everything that a checkpoint holds."""

    G: Generator
    D: Discriminator | ProjectedDiscriminator
    G_ema: Generator
    G_opt: torch.optim.Adam
    D_opt: torch.optim.Adam
    pl_mean: Tensor
    adaptive: AdaptiveP
    progress: GanProgress
    moments: FeatureMoments | None = None  # only with config.moments_weight

    @property
    def networks(self) -> dict[str, torch.nn.Module]:
        return {"G": self.G, "D": self.D, "G_ema": self.G_ema}

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return self.networks if self.moments is None else self.networks | {"moments": self.moments}

    def phases(self, config: GanConfig, ranks: Ranks = ALONE, compiled: bool = False) -> Phases:
        """The training phases of these networks."""
        return Phases(self.G, self.D, self.pl_mean, config, ranks, compiled, self.moments)

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"G_opt": self.G_opt, "D_opt": self.D_opt}


def new_state(config: GanConfig, device: torch.device) -> GanState:
    """The state of a new run, with random weights that follow from config.seed."""
    torch.manual_seed(config.seed)
    G = Generator(config.generator).to(device)
    D = _new_discriminator(config, device)
    return GanState(
        G,
        D,
        G_ema=copy.deepcopy(G).eval().requires_grad_(False),
        G_opt=_adam(G, _lazy_ratio(config.pl_interval, config.pl_weight)),
        D_opt=_adam(D, _lazy_ratio(config.r1_interval, config.r1_gamma)),
        pl_mean=torch.zeros((), device=device),
        adaptive=_adaptive(config),
        progress=GanProgress(),
        moments=FeatureMoments(config.c_dim, STATISTICS, device) if config.moments_weight else None,
    )


def _new_discriminator(config: GanConfig, device: torch.device) -> Discriminator | ProjectedDiscriminator:
    if not config.projected:
        return Discriminator(config.discriminator).to(device)
    return ProjectedDiscriminator(
        config.c_dim,
        config.seed,
        device,
        config.resolution,
        config.projected_levels,
        config.mbstd_group_size if config.projected_mbstd else 0,
        config.projected_input,
        config.projected_width,
    )


@dataclass(frozen=True)
class StoredDiscriminator:
    """The discriminator of a checkpoint, in eval mode and without gradients."""

    network: Discriminator | ProjectedDiscriminator
    config: GanConfig
    dataset_sha256: str


def load_stored_discriminator(checkpoint: Path, device: torch.device) -> StoredDiscriminator:
    """Load the discriminator alone.

    Raises:
        TrainingError: The file is not the checkpoint of a generator's training.
    """
    scalars = read_state(checkpoint)
    if "adaptive" not in scalars:
        raise TrainingError(f"{checkpoint}: is not the checkpoint of a training of a generator")
    config = GanConfig(**scalars["config"])
    network = _new_discriminator(config, device)
    load_checkpoint(checkpoint, {"D": network}, {}, {})
    return StoredDiscriminator(network.eval().requires_grad_(False), config, scalars["dataset_sha256"])


def save_state(checkpoint: Path, state: GanState, config: GanConfig, dataset: ImageDataset) -> None:
    """Replace the checkpoint.

    Raises:
        TrainingError: A value is not finite or the file cannot be written. The old checkpoint is kept.
    """
    scalars = scalars_of(state, config, dataset)
    save_checkpoint(checkpoint, state.modules, state.optimizers, {"pl_mean": state.pl_mean}, scalars)


def scalars_of(state: GanState, config: GanConfig, dataset: ImageDataset) -> dict[str, Any]:
    """The part of a state that is not tensors, as JSON can hold it."""
    return {
        "config": config.identity,
        "dataset_sha256": dataset.sha256,
        "adaptive": vars(state.adaptive),
        "progress": vars(state.progress),
    }


def load_state(
    checkpoint: Path, state: GanState, config: GanConfig, dataset: ImageDataset, allow_changes: bool = False
) -> None:
    """Fill a new state in place with a checkpoint. GanProgress.changes lists the options that changed.

    Raises:
        TrainingError: The checkpoint is of other images, or of other options without `allow_changes`.
    """
    scalars = read_state(checkpoint)
    changes = changes_since(checkpoint, scalars, config, dataset, allow_changes)
    has_moments = scalars["config"].get("moments_weight", 0.0)  # a run without them starts its feature moments now
    modules = state.modules if has_moments else state.networks
    load_checkpoint(checkpoint, modules, state.optimizers, {"pl_mean": state.pl_mean})
    restore_scalars(state, scalars, changes)


def changes_since(
    checkpoint: Path, scalars: dict[str, Any], config: GanConfig, dataset: ImageDataset, allow_changes: bool
) -> dict[str, Any]:
    """The values in `config` of all options that differ from the stored ones. Raises TrainingError as `load_state` does.

    Args:
        checkpoint: The file or folder, for the error message.
        scalars: The stored result of `scalars_of`.
        config: The options of the run that resumes.
        dataset: Its images.
        allow_changes: Whether options are allowed to differ.
    """
    if scalars["dataset_sha256"] != dataset.sha256:
        raise TrainingError(f"{checkpoint}: was trained on other images than those of --data")
    changes = config.changed_from(scalars["config"])
    if changes and (config.dp or scalars["config"].get("dp")):
        raise TrainingError(
            f"{checkpoint}: was trained with other values of {', '.join(sorted(changes))}; a run with differential privacy can "
            "change its length and --dp-epsilon only, and no other run can become one"
        )
    _check_changes(checkpoint, changes, allow_changes)
    return changes


def restore_scalars(state: GanState, scalars: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set the state's progress and augmentation strength, and add `changes` of options to GanProgress.changes."""
    state.progress = progress = GanProgress(**scalars["progress"])
    progress.stopped = False
    if changes:
        before = {name: scalars["config"].get(name) for name in changes}
        progress.changes.append({"kimg": progress.kimg, "before": before, "after": changes})
    ours = state.adaptive
    if ours.target is not None or not changes:
        state.adaptive = replace(AdaptiveP(**scalars["adaptive"]), target=ours.target, kimg=ours.kimg)


def _check_changes(checkpoint: Path, changes: dict[str, Any], allow: bool) -> None:
    structural = changes.keys() & STRUCTURE
    if structural or (changes and not allow):
        names = ", ".join(sorted(structural or changes))
        hint = "" if structural else ", or add --allow-changes to continue with the new ones"
        raise TrainingError(f"{checkpoint}: was trained with other values of {names}; use the same options{hint}")


def set_learning_rates(state: GanState, config: GanConfig, factor: float = 1.0) -> None:
    """Set the learning rates of the next step to `factor` times those of the configuration.

    The projected discriminator has a constant rate of its own, because its weights are under spectral normalisation.
    """
    rate = config.learning_rate_at(state.progress.nimg)
    D_rate = PROJECTED_RATE if config.projected else rate
    for optimizer, value, interval, weight in (
        (state.G_opt, rate, config.pl_interval, config.pl_weight),
        (state.D_opt, D_rate, config.r1_interval, config.r1_gamma),
    ):
        for group in optimizer.param_groups:
            group["lr"] = value * _lazy_ratio(interval, weight) * factor


def _lazy_ratio(interval: int, weight: float) -> float:
    """Correction of Adam for regularisation every `interval` steps (StyleGAN2, appendix B); 1 without regularisation."""
    return interval / (interval + 1) if weight else 1.0


def _adam(module: torch.nn.Module, ratio: float) -> torch.optim.Adam:
    """Adam with beta (0, 0.99), corrected by `_lazy_ratio`. `set_learning_rates` sets its rate before every step."""
    return torch.optim.Adam(module.parameters(), betas=(0.0, 0.99**ratio), eps=1e-8, fused=True)


def _adaptive(config: GanConfig) -> AdaptiveP:
    if config.augment == "none":
        return AdaptiveP(0.0, None)
    return AdaptiveP(config.augment_p, config.augment_target, kimg=config.augment_kimg)
