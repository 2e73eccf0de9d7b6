"""Features of all image sets of an evaluation in several feature spaces, under one progress bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.errors import DermisError
from dermis.features import FeatureExtractor, feature_extractor
from dermis.network_config import NoiseMode
from dermis.synthesizer import Synthesizer
from training.data.images import ImageDataset
from training.evaluation.features import BATCH, real_features
from training.evaluation.measure import Features, ImageSets, Labels

DEFAULT_SPACES = ("lite0", "lite1")
"""Default feature spaces: lite0, which the projected discriminator uses, and lite1, which no training uses."""


@dataclass(frozen=True)
class Generation:
    """Options of the generated images: samples 0 ... N - 1 of a seed, with each kind of noise."""

    labels: Labels  # [N], classes of the samples
    seed: int
    truncation_psi: float
    noise_modes: Sequence[NoiseMode]


def load_spaces(
    names: Sequence[str], device: torch.device, *, option: str = "--extractor"
) -> tuple[list[FeatureExtractor], str]:
    """Load the feature spaces of --extractor or, without names, those of the default that can be loaded.

    Args:
        names: Values of the option, each with one name or several separated by commas.
        device: Device of the networks.
        option: Name of the option, for messages.

    Returns:
        The spaces, and a remark on default spaces that cannot be loaded; "" if there are none.

    Raises:
        DermisError: A named space cannot be loaded, or two have the same name, under which their numbers would be stored.
    """
    chosen = [part.strip() for name in names for part in name.split(",")]
    if chosen:
        if len(set(chosen)) < len(chosen):
            raise DermisError(f"{option}: {max(chosen, key=chosen.count)} is given more than once")
        loaded = [feature_extractor(name, device) for name in chosen]
        labels = [extractor.name for extractor in loaded]
        for name, label in zip(chosen, labels, strict=True):
            if labels.count(label) > 1:
                raise DermisError(f"{option}: {name} has the same name as another one, {label}; rename its file")
        return loaded, ""
    spaces, missing = [], []
    for name in DEFAULT_SPACES:
        try:
            spaces.append(feature_extractor(name, device))
        except (DermisError, ImportError) as error:
            missing.append((name, str(error)))
    if not spaces:
        raise DermisError(f"{option}: none of {', '.join(DEFAULT_SPACES)} can be loaded: {missing[0][1]}")
    reasons = "; ".join(f"{name} cannot be loaded ({reason})" for name, reason in missing)
    remark = f"{option}: {reasons}; measuring in {spaces[0].name} only" if missing else ""
    return spaces, remark


def parse_noise_modes(names: Sequence[str]) -> list[NoiseMode]:
    """Check the values of --noise-mode.

    Raises:
        DermisError: A value is not a noise mode, or is repeated.
    """
    modes = {mode: mode for mode in get_args(NoiseMode)}
    for name in names:
        if name not in modes:
            raise DermisError(f"--noise-mode: {name!r} is none of {', '.join(modes)}")
    if len(set(names)) < len(names):
        raise DermisError(f"--noise-mode: {max(names, key=list(names).count)} is given more than once")
    return [modes[name] for name in names]


def all_features(
    synthesizer: Synthesizer,
    dataset: ImageDataset,
    holdout: ImageDataset | None,
    groups: Sequence[str] | None,
    generation: Generation,
    extractors: Sequence[FeatureExtractor],
    *,
    conditional: bool,
    cache: Path | None,
    bar: tqdm,
) -> list[ImageSets]:
    """Compute the features of all images in each space. Every image is generated once for all spaces.

    Args:
        synthesizer: Synthesizer of the bundle.
        dataset: The training images.
        holdout: Held-out images.
        groups: Patients of the training images, then of the held-out images.
        generation: Options of the generated images.
        extractors: The spaces.
        conditional: Whether the generator has classes.
        cache: Folder for features of real images.
        bar: Counts each image once for every space and, if it is generated, once more.

    Returns:
        The image sets of each space.
    """

    def labels_of(images: ImageDataset) -> Labels:
        return images.labels if conditional else np.zeros_like(images.labels)

    real = [real_features(dataset, extractor, cache, bar=bar) for extractor in extractors]
    held_out = [
        None if holdout is None else real_features(holdout, extractor, cache, bar=bar) for extractor in extractors
    ]
    generated = {
        mode: _generated_features(synthesizer, generation, mode, extractors, bar) for mode in generation.noise_modes
    }
    return [
        ImageSets(
            training=real[i],
            training_labels=labels_of(dataset),
            generated={mode: features[i] for mode, features in generated.items()},
            generated_labels=generation.labels,
            held_out=held_out[i],
            held_out_labels=None if holdout is None else labels_of(holdout),
            groups=groups,
        )
        for i in range(len(extractors))
    ]


def _generated_features(
    synthesizer: Synthesizer,
    generation: Generation,
    noise_mode: NoiseMode,
    extractors: Sequence[FeatureExtractor],
    bar: tqdm,
) -> list[Features]:
    """Features [N, dim] of the generated images in each space."""
    parts: list[list[Features]] = [[] for _ in extractors]
    for images in generated_batches(synthesizer, generation, noise_mode):
        bar.update(len(images))
        for collected, extractor in zip(parts, extractors, strict=True):
            collected.append(extractor.extract(images))
            bar.update(len(images))
    return [np.concatenate(collected) for collected in parts]


def generated_batches(
    synthesizer: Synthesizer, generation: Generation, noise_mode: NoiseMode
) -> Iterator[NDArray[np.uint8]]:
    """Generate images in batches uint8 [n, H, W, channels]."""
    for start in range(0, len(generation.labels), BATCH):
        indices = list(range(start, min(start + BATCH, len(generation.labels))))
        yield synthesizer.images(
            [generation.seed] * len(indices),
            indices,
            generation.labels[indices].tolist(),
            truncation_psi=generation.truncation_psi,
            noise_mode=noise_mode,
        )
