"""What a bundle states about its differential privacy: in provenance.json, and as a section of the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from training.data.images import ImageDataset
from training.gan.config import GanConfig
from training.gan.private.accountant import ACCOUNTANT
from training.gan.private.sampling import PrivacyCost
from training.gan.private.units import units_of

COVERED = "the weights in this bundle, and everything that is generated with them"
NOT_COVERED = (
    "numbers in the card and in provenance.json that describe the training set: the names of the classes, the numbers of "
    "images, of each class and of units, and the hash, with which anyone who knows all images but one can test a guess of "
    "that one",
    "measurements against real images that are added later (dermis evaluate)",
    "parts that are added later and learn from real images: index, encoder, directions, classifier",
    "other trainings on the same images, for instance to choose options: their epsilons add up",
    "several units that are one person in reality: images without a patient, or a patient with several ids",
    "times, such as the hours on the card: a step with more patients takes longer",
    "attacks on the rounding of floating-point noise, and on the machine that trains",
)


def privacy_record(config: GanConfig, dataset: ImageDataset, dp_steps: int) -> dict[str, Any]:
    """The section "privacy" of a bundle's provenance.

    Args:
        config: Hyper-parameters with `dp`.
        dataset: Training images.
        dp_steps: Number of noisy steps that were computed.
    """
    units = units_of(dataset)
    cost = PrivacyCost(config, units)
    epsilon = cost.epsilon(dp_steps)
    protected = config.dp_seed is None and math.isfinite(epsilon)
    return {
        "guarantee": protected,
        "epsilon": epsilon if protected else None,
        "delta": cost.delta,
        "unit": units.unit,
        "units": {kind: count for kind, count in units.kinds.items() if count},
        "neighbours": f"training sets that differ by all images of one {units.unit}",
        "mechanism": "DP-SGD of the discriminator: Poisson sampling, gradients clipped for each unit, Gaussian noise",
        "accountant": f"{ACCOUNTANT}, dp-accounting {version('dp-accounting')}",
        "noise_multiplier": config.dp_noise,
        "clip": config.dp_clip,
        "sampling_rate": cost.rate,
        "steps": dp_steps,
        "images_per_unit": config.dp_images_per_patient,
        "noise": "from the operating system" if config.dp_seed is None else f"from the stated seed {config.dp_seed}",
        "first_weights": "stated to be public" if config.dp_public_start else "random",
        "covered": COVERED,
        "not_covered": list(NOT_COVERED),
    }


def privacy_section(record: Mapping[str, Any]) -> str:
    """The section "Differential privacy" of the model card."""
    units = ", ".join(f"{count:,} {kind}{'s' if count != 1 else ''}" for kind, count in record["units"].items())
    if record["guarantee"]:
        promise = (
            f"The weights are ({record['epsilon']:.3g}, {record['delta']:.3g})-differentially private with regard to all "
            f"images of one {record['unit']} (training sets with and without them are neighbours)."
        )
    elif record["noise_multiplier"]:
        promise = (
            "**No guarantee**: the noise came from a stated seed, and whoever knows the seed can subtract it. Such a run is "
            "for tests only."
        )
    else:
        promise = "**No guarantee**: the noise is 0, so that epsilon is infinite. Such a run is for comparisons only."
    not_covered = "\n".join(f"- {item}" for item in record["not_covered"])
    return f"""## Differential privacy

{promise}

| | |
| --- | --- |
| mechanism | {record["mechanism"]} |
| units | {units} |
| noise multiplier, clipping norm | {record["noise_multiplier"]:g}, {record["clip"]:g} |
| sampling rate, steps | {record["sampling_rate"]:.4g}, {record["steps"]:,} |
| accountant | {record["accountant"]} |
| noise | {record["noise"]} |
| first weights | {record["first_weights"]} |

Covered: {record["covered"]}. Not covered:

{not_covered}
"""
