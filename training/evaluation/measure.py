"""The numbers of an evaluation in one feature space, in the form of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dermis.errors import DataError
from dermis.metrics import frechet_distance
from dermis.metrics.alpha import alpha_precision, authentic, beta_recall, same_distance
from dermis.metrics.density import expected_coverage
from dermis.metrics.intervals import frechet_interval, gaussian_estimate, kernel_estimate
from dermis.metrics.kernels import Gaussian, cmmd_kernel, median_kernel
from dermis.metrics.likelihood import feature_likelihood
from dermis.metrics.membership import membership_attack
from dermis.metrics.memorisation import memorisation_test
from dermis.metrics.neighbourhoods import compare_neighbourhoods
from dermis.metrics.neighbours import distinct_radii
from dermis.metrics.path_length import path_length

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Selection = Literal["all", "fast"]
MIN_IMAGES = 10  # in a set: with fewer, neighbourhoods and covariances have no meaning
REPLICATES = 200
CLIP = "clip"  # feature space in which the MMD is called CMMD

Comparison = tuple[str, Features, Features]
"""A name in metrics.json, features of real images, and features of the images that are compared with them."""


@dataclass(frozen=True)
class ImageSets:
    """Features of all images in one space, and the classes of the images (zeros if there are no classes)."""

    training: Features
    training_labels: Labels
    generated: Mapping[
        str, Features
    ]  # key: noise mode, the first is that of the evaluation; values: samples 0 ... M - 1
    generated_labels: Labels
    held_out: Features | None = None
    held_out_labels: Labels | None = None
    groups: Sequence[str] | None = None  # patients of the training, then of the held-out images; None if not known


def compare(
    real: Features, generated: Features, selection: Selection = "all", kernel: Gaussian | None = None
) -> dict[str, Any]:
    """Compute the metrics of generated images against real ones.

    Args:
        real: Features [N, dim].
        generated: Features [M, dim].
        selection: "fast" for distances, precision and recall only.
        kernel: Kernel of the MMD; None for no MMD.

    Raises:
        DataError: A set has fewer than MIN_IMAGES images.
    """
    if min(len(real), len(generated)) < MIN_IMAGES:
        raise DataError(
            f"{len(real)} real and {len(generated)} generated images are too few; give {MIN_IMAGES} or more"
        )
    fd = frechet_distance(real, generated)
    fd_interval = frechet_interval(real, generated, fd, REPLICATES)
    kid = kernel_estimate(real, generated, REPLICATES)
    neighbourhoods = compare_neighbourhoods(real, generated)
    metrics: dict[str, Any] = {
        "images": len(generated),
        "real_images": len(real),
        "fd": fd,
        "fd_interval": [fd_interval.low, fd_interval.high],
        "fd_bias": fd_interval.bias,
        "kid": kid.value,
        "kid_std": kid.deviation,
        "kid_interval": [kid.interval.low, kid.interval.high],
        "precision": neighbourhoods.precision,
        "recall": neighbourhoods.recall,
    }
    if selection == "fast":
        return metrics
    if kernel is not None:
        mmd = gaussian_estimate(real, generated, kernel, REPLICATES)
        metrics |= {"mmd": mmd.value, "mmd_interval": [mmd.interval.low, mmd.interval.high]}
    return metrics | {
        "density": neighbourhoods.density,
        "coverage": neighbourhoods.coverage,
        "expected_coverage": expected_coverage(len(real), len(generated)),
        "alpha_precision": alpha_precision(real, generated).integrated,
        "beta_recall": beta_recall(real, generated, neighbourhoods=neighbourhoods).integrated,
    }


def measure_space(
    space: str,
    sets: ImageSets,
    class_names: Sequence[str] = (),
    selection: Selection = "all",
    on_compared: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """Compute all numbers of one space.

    If there are held-out images, every comparison is of equal numbers of images on both sides: as many as the smallest set
    has, chosen at random in the proportions of the classes. The tests for copies use all images.

    Args:
        space: Name of the space.
        sets: The images.
        class_names: Names of the classes; empty without classes.
        selection: "fast" for distances, precision, recall and the tests for copies only.
        on_compared: Called after each comparison with its number of images.
    """
    kernel = cmmd_kernel() if space == CLIP else median_kernel(sets.training)
    result: dict[str, Any] = {}
    if selection == "all" and kernel is not None:
        result["mmd_kernel"] = {"bandwidth": kernel.bandwidth, "unit_length": kernel.centre is None}

    def measured(comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
        numbers = {}
        for name, real, images in comparisons:
            numbers[name] = compare(real, images, selection, kernel)
            on_compared(len(real) + len(images))
        return numbers

    mode, *other_modes = sets.generated
    result["comparisons"] = measured(_comparisons(sets, mode))
    if other_modes:
        result["other_noise"] = {
            other: measured([each for each in _comparisons(sets, other) if each[0] != "training_holdout"])
            for other in other_modes
        }
    if class_names:
        result["classes"] = {}
    for label, name in enumerate(class_names):
        comparisons = _comparisons(sets, mode, label)
        if all(min(len(real), len(images)) >= MIN_IMAGES for _, real, images in comparisons):
            result["classes"][name] = measured(comparisons)
    if sets.held_out is not None and selection == "all":
        likelihood = feature_likelihood(sets.training, sets.held_out, sets.generated[mode])
        result["fld_gaussians"] = likelihood.gaussians
        result["comparisons"]["generated_holdout"] |= {"fld": likelihood.fld, "fld_gap": likelihood.gap}
        result["comparisons"]["training_holdout"] |= {"fld": 0.0, "fld_gap": likelihood.reference_gap}
    result["copies"] = _copies(sets, sets.generated[mode], selection)
    return result


def _comparisons(sets: ImageSets, mode: str, label: int | None = None) -> list[Comparison]:
    """The comparisons of all images or of one class, with equal numbers on both sides if images are held out."""
    real, generated = sets.training, sets.generated[mode]
    rows = [_of_class(labels, label) for labels in (sets.training_labels, sets.generated_labels)]
    if sets.held_out is None or sets.held_out_labels is None:
        return [("generated_training", real[rows[0]], generated[rows[1]])]
    rows.append(_of_class(sets.held_out_labels, label))
    labels = (sets.training_labels, sets.generated_labels, sets.held_out_labels)
    count = min(map(len, rows))
    real, generated, held_out = (
        features[chosen[subset(set_labels[chosen], count)]]
        for features, chosen, set_labels in zip((real, generated, sets.held_out), rows, labels, strict=True)
    )
    return [
        ("generated_training", real, generated),
        ("generated_holdout", held_out, generated),
        ("training_holdout", held_out, real),
    ]


def subset(labels: Labels, count: int, seed: int = 0) -> NDArray[np.int64]:
    """`count` different rows at random, with the classes in the proportions of `labels`, in ascending order."""
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return np.sort(by_class[np.linspace(0, len(labels) - 1, count).round().astype(np.int64)])


def _of_class(labels: Labels, label: int | None) -> NDArray[np.int64]:
    return np.arange(len(labels)) if label is None else np.flatnonzero(labels == label)


def _copies(sets: ImageSets, generated: Features, selection: Selection) -> dict[str, Any]:
    """Numbers on copies of training images: authenticity and, with held-out images, the tests for memorising."""
    training, held_out = sets.training, sets.held_out
    result: dict[str, Any] = {}
    if selection == "all":
        same = same_distance(training)
        radii, repeated = distinct_radii(training, same)
        result["authenticity"] = float(authentic(training, generated, known_radii=radii).mean())
        result["real_near_duplicates"] = int(repeated.sum())
        if held_out is not None:
            result["holdout_authenticity"] = float(authentic(training, held_out, known_radii=radii).mean())
    if held_out is not None:
        result["memorising"] = asdict(memorisation_test(generated, training, held_out, groups=sets.groups))
        attack = membership_attack(training, held_out, generated, groups=sets.groups)
        if attack is not None:
            result["membership"] = asdict(attack)
    return result


def path_lengths_by_class(
    lengths: Mapping[str, NDArray[np.float64]], labels: Labels, class_names: Sequence[str], distance: str
) -> dict[str, Any]:
    """Perceptual path lengths of all images and of each class, with standard errors.

    Args:
        lengths: Squared speeds [N] of the paths by sampling ("end", "full").
        labels: Classes of the paths, [N].
        class_names: Names of the classes; empty without classes.
        distance: Name of the perceptual distance.
    """

    def summary(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for sampling, values in lengths.items():
            ppl = path_length(values[chosen])
            numbers |= {sampling: ppl.mean, f"{sampling}_error": ppl.standard_error, "paths": ppl.paths}
        return numbers

    class_masks = {name: labels == k for k, name in enumerate(class_names)}
    return {
        "distance": distance,
        **summary(np.ones(len(labels), dtype=bool)),
        "classes": {name: summary(chosen) for name, chosen in class_masks.items() if chosen.sum() >= MIN_IMAGES},
    }
