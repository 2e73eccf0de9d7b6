"""The plan of a private run before it starts: its noise, from epsilon and length, and what the user should know."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from dermis.errors import TrainingError
from training.checkpoint import CHECKPOINT, read_state
from training.data.images import ImageDataset
from training.gan.config import GanConfig
from training.gan.private.accountant import noise_for
from training.gan.private.sampling import PrivacyCost
from training.gan.private.units import units_of


def resolved_privacy(config: GanConfig, dataset: ImageDataset, out: Path, *, resume: bool) -> GanConfig:
    """The configuration with its dp_noise: the stated one, that of the resumed run, or what dp_epsilon needs.

    Args:
        config: Hyper-parameters with `dp`.
        dataset: Training images.
        out: Folder of the run.
        resume: Whether a run in `out` is continued. Its noise cannot change.

    Raises:
        TrainingError: There is neither dp_noise nor dp_epsilon, no noise is enough, or the resumed run is not private.
    """
    units = units_of(dataset)
    cost = PrivacyCost(config, units)
    if config.dp_noise is not None:
        return config
    if config.dp_epsilon is None:
        raise TrainingError("--dp: give --dp-epsilon, --dp-noise or both")
    if resume and (out / CHECKPOINT).exists():
        stored = read_state(out / CHECKPOINT)["config"]
        if not stored.get("dp"):
            raise TrainingError(
                f"{out / CHECKPOINT}: was trained without --dp; a private run needs an --out of its own"
            )
        return replace(config, dp_noise=stored.get("dp_noise"))
    steps = math.ceil(int(config.total_kimg * 1000) / config.batch)
    return replace(config, dp_noise=noise_for(config.dp_epsilon, steps, cost.rate, cost.delta))


def describe_privacy(config: GanConfig, dataset: ImageDataset) -> str:
    """What a private run will spend, in lines; with warnings about units that are not patients and about a known seed."""
    units = units_of(dataset)
    cost = PrivacyCost(config, units)
    planned = math.ceil(int(config.total_kimg * 1000) / config.batch)
    steps = planned if cost.max_steps is None else min(planned, cost.max_steps)
    kinds = ", ".join(f"{count:,} {kind}{'s' if count != 1 else ''}" for kind, count in units.kinds.items() if count)
    lines = [
        f"differential privacy for each {units.unit} ({kinds}): noise {config.dp_noise:g}, clipping norm {config.dp_clip:g}, "
        f"sampling rate {cost.rate:.4g}; epsilon {cost.epsilon(steps):.3f} at delta {cost.delta:.3g} after {steps:,} steps"
    ]
    if units.kinds["lesion"] or units.kinds["image"]:
        lines.append(
            "some images name no patient: a person with several of these lesions or images is not protected as a whole"
        )
    if config.dp_seed is not None:
        lines.append("--dp-seed: whoever knows the seed can subtract the noise; this run protects nobody")
    return "\n".join(lines)
