"""What a run changes as it trains: networks, optimizers, path-length mean, augmentation strength, position."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dermis.errors import TrainingError
from dermis.networks import Discriminator, Generator
from training.data.isic import ImageDataset
from training.gan.augment import AdaptiveP
from training.gan.checkpoint import load_checkpoint, read_state, save_checkpoint
from training.gan.config import STRUCTURE, GanConfig
from training.gan.loss import Phases
from training.gan.moments import FeatureMoments
from training.gan.parallel import ALONE, Ranks
from training.gan.projected import LEARNING_RATE as PROJECTED_RATE
from training.gan.projected import STATISTICS, ProjectedDiscriminator


@dataclass
class Progress:
    """Where a run stands; what a checkpoint stores besides tensors."""

    step: int = 0
    nimg: int = 0
    seconds: float = 0.0
    stopped: bool = False  # by the user, before total_kimg
    stats: dict[str, float] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)  # of options on the way: {"kimg", "before", "after"}
    started_from: dict[str, Any] = field(default_factory=dict)  # the weights that a run began with; see transfer.py

    @property
    def kimg(self) -> float:
        return self.nimg / 1000


@dataclass
class State:
    """Everything that a checkpoint holds."""

    G: Generator
    D: Discriminator | ProjectedDiscriminator
    G_ema: Generator
    G_opt: torch.optim.Adam
    D_opt: torch.optim.Adam
    pl_mean: Tensor
    adaptive: AdaptiveP
    progress: Progress
    moments: FeatureMoments | None = None  # where config.moments_weight asks for them

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


def new_state(config: GanConfig, device: torch.device) -> State:
    """Random weights of config.seed."""
    torch.manual_seed(config.seed)
    G = Generator(config.generator).to(device)
    D: Discriminator | ProjectedDiscriminator
    if config.projected:
        D = ProjectedDiscriminator(
            config.c_dim,
            config.seed,
            device,
            config.resolution,
            config.projected_levels,
            config.mbstd_group_size if config.projected_mbstd else 0,
            config.projected_input,
        )
    else:
        D = Discriminator(config.discriminator).to(device)
    return State(
        G,
        D,
        G_ema=copy.deepcopy(G).eval().requires_grad_(False),
        G_opt=_adam(G, _lazy_ratio(config.pl_interval, config.pl_weight)),
        D_opt=_adam(D, _lazy_ratio(config.r1_interval, config.r1_gamma)),
        pl_mean=torch.zeros((), device=device),
        adaptive=_adaptive(config),
        progress=Progress(),
        moments=FeatureMoments(config.c_dim, STATISTICS, device) if config.moments_weight else None,
    )


def save_state(checkpoint: Path, state: State, config: GanConfig, dataset: ImageDataset) -> None:
    """Replace the checkpoint; TrainingError, and the old one stays, if a value is not finite or the disk is full."""
    scalars = scalars_of(state, config, dataset)
    save_checkpoint(checkpoint, state.modules, state.optimizers, {"pl_mean": state.pl_mean}, scalars)


def scalars_of(state: State, config: GanConfig, dataset: ImageDataset) -> dict[str, Any]:
    """What is saved of a state besides its tensors, as JSON holds it."""
    return {
        "config": config.identity,
        "dataset_sha256": dataset.sha256,
        "adaptive": vars(state.adaptive),
        "progress": vars(state.progress),
    }


def load_state(
    checkpoint: Path, state: State, config: GanConfig, dataset: ImageDataset, allow_changes: bool = False
) -> None:
    """Fill the state in place. TrainingError if the checkpoint is of other images or, unless `allow_changes`, options.

    Changed options are noted in Progress.changes.
    """
    scalars = read_state(checkpoint)
    changes = changes_since(checkpoint, scalars, config, dataset, allow_changes)
    stored = scalars["config"].get("moments_weight", 0.0)  # without them, the feature moments begin now
    modules = state.modules if stored else state.networks
    load_checkpoint(checkpoint, modules, state.optimizers, {"pl_mean": state.pl_mean})
    restore_scalars(state, scalars, changes)


def changes_since(
    checkpoint: Path, scalars: dict[str, Any], config: GanConfig, dataset: ImageDataset, allow_changes: bool
) -> dict[str, Any]:
    """Our values of all options that differ from those of `scalars_of`. TrainingError as for `load_state`."""
    if scalars["dataset_sha256"] != dataset.sha256:
        raise TrainingError(f"{checkpoint}: was trained on other images than the folder given with --data")
    changes = config.changed_from(scalars["config"])
    _check_changes(checkpoint, changes, allow_changes)
    return changes


def restore_scalars(state: State, scalars: dict[str, Any], changes: dict[str, Any]) -> None:
    """Set the state's progress and augmentation strength; `changes` of options are noted in Progress.changes."""
    state.progress = progress = Progress(**scalars["progress"])
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
        hint = "" if structural else ", or add --allow-changes to go on with the new ones"
        raise TrainingError(f"{checkpoint}: was trained with another {names}; use the same options{hint}")


def set_learning_rates(state: State, config: GanConfig, factor: float = 1.0) -> None:
    """Set the learning rates of the next step, `factor` times those of the configuration.

    The projected discriminator has a constant rate of its own: its weights are under spectral normalisation.
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
    """Correction of Adam for regularisation every `interval` steps (StyleGAN2, appendix B); 1 without any."""
    return interval / (interval + 1) if weight else 1.0


def _adam(module: torch.nn.Module, ratio: float) -> torch.optim.Adam:
    """Adam with beta (0, 0.99), corrected by `_lazy_ratio`; `set_learning_rates` gives it a rate before every step."""
    return torch.optim.Adam(module.parameters(), betas=(0.0, 0.99**ratio), eps=1e-8, fused=True)


def _adaptive(config: GanConfig) -> AdaptiveP:
    if config.augment == "none":
        return AdaptiveP(0.0, None)
    return AdaptiveP(config.augment_p, config.augment_target, kimg=config.augment_kimg)
