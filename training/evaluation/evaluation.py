"""Evaluate a bundle against real images: the numbers and, on request, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.bundle import Bundle, amend_bundle, load_generator, trained_on
from dermis.devices import resolve_device
from dermis.errors import DataError
from dermis.features import FeatureExtractor
from dermis.image_metadata import origin_of
from dermis.metrics.intervals import LEVEL
from dermis.metrics.path_length import PerceptualDistance, Sampling, path_lengths
from dermis.metrics.perceptual import feature_distance, lpips
from dermis.network_config import NoiseMode
from dermis.networks import Generator
from dermis.synthesizer import Synthesizer
from training.data.embedding import progress_bar
from training.data.images import ImageDataset
from training.evaluation import measure, pictures
from training.evaluation.features import labels_in_proportion
from training.evaluation.holdout import check_holdout, groups_of, without_ids
from training.evaluation.measure import MIN_IMAGES, REPLICATES, ImageSets, Selection
from training.evaluation.record import FORMAT_VERSION, discriminator_space
from training.evaluation.report import report_page
from training.evaluation.sets import Generation, all_features
from training.gan.card import renewed_card

CLOSEST, UNSELECTED, GRID, INTERPOLATIONS = 12, 8, 32, 4
# Units of the progress bar: embedding one image is 1, so that the remaining time is useful.
_COMPARED_PER_UNIT = 8  # compared images that take as long as embedding one
_UNITS_OF_A_PATH = 4  # a path needs two images, which are generated and embedded


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation."""

    metrics: dict[str, Any]  # content of metrics.json of the bundle
    page: str | None  # HTML that shows training images


def evaluate_bundle(
    bundle: Bundle,
    dataset: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    *,
    holdout: ImageDataset | None = None,
    holdout_name: str = "",
    selection: Selection = "all",
    count: int | None = None,
    ppl_paths: int = 2000,
    seed: int = 0,
    truncation_psi: float = 1.0,
    noise_modes: Sequence[NoiseMode] = ("random",),
    cache: Path | None = None,
    device: str = "auto",
    page: bool = False,
) -> Evaluation:
    """Generate images and compare them with real ones. All arguments are checked before the long work.

    Path lengths (selection "all") are measured by LPIPS if the first extractor is `inception`, otherwise by the features of
    one extractor.

    Args:
        bundle: The generator.
        dataset: The training images. With others, authenticity and the test for memorising say nothing about copies;
            metrics.json states which images they are.
        extractors: The feature spaces.
        holdout: Real images that were not used in training.
        holdout_name: Name of the held-out images for the card.
        selection: "fast" for distances, precision, recall and the tests for copies only.
        count: Number of generated images; None for as many as in `dataset`.
        ppl_paths: Number of paths of the perceptual path length.
        seed: Seed of the generated images.
        truncation_psi: Truncation of the generated images.
        noise_modes: Noise of the generated images. Everything is measured with the first mode, and only comparisons with
            the others.
        cache: Folder for features of real images.
        device: Device of the networks.
        page: Whether to make the page.

    Raises:
        DataError: Classes do not fit, there are too few images, or held-out images were used in training.
        DermisError: Weights cannot be loaded.
    """
    _check(bundle, dataset, holdout, count, ppl_paths)
    generator = load_generator(bundle).to(resolve_device(device))
    discriminator_space_name = discriminator_space(bundle.provenance)
    independent = next((i for i, extractor in enumerate(extractors) if extractor.name != discriminator_space_name), 0)
    distance = _path_distance(extractors, independent, device) if selection == "all" else None
    names = bundle.class_names
    real_labels = dataset.labels if names else np.zeros_like(dataset.labels)
    labels = labels_in_proportion(real_labels, len(real_labels) if count is None else count)
    generation = Generation(labels, seed, truncation_psi, noise_modes)
    groups = None if holdout is None else groups_of(dataset, holdout)

    embedding = len(extractors) * (len(real_labels) + (0 if holdout is None else len(holdout.labels)))
    embedding += len(noise_modes) * len(labels) * (1 + len(extractors))
    comparing = len(extractors) * _compared_images(len(real_labels), len(labels), holdout, names, len(noise_modes))
    walking = 0 if distance is None else len(get_args(Sampling)) * ppl_paths * _UNITS_OF_A_PATH
    with (
        Synthesizer(bundle, device=device) as synthesizer,
        progress_bar(embedding + comparing // _COMPARED_PER_UNIT + walking, "evaluating") as bar,
    ):
        sets = all_features(
            synthesizer,
            dataset,
            holdout,
            groups,
            generation,
            extractors,
            conditional=bool(names),
            cache=cache,
            bar=bar,
        )
        metrics: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "images": len(labels),
            "real_images": len(real_labels),
            "real_sha256": dataset.sha256,
            "real_is_training_set": trained_on(bundle.provenance) == dataset.sha256,
            "seed": seed,
            "truncation_psi": truncation_psi,
            "noise_mode": noise_modes[0],
            "synthesizer": dict(synthesizer.identity),
            "interval_level": LEVEL,
            "bootstrap_replicates": REPLICATES,
            "spaces": {},
        }
        if holdout is not None:
            metrics["holdout"] = {
                "images": len(holdout.labels),
                "patients": None if groups is None else len(set(groups[len(real_labels) :])),
                "without_ids": None if groups is None else without_ids(holdout).patient_and_lesion,
                "name": holdout_name,
                "sha256": holdout.sha256,
            }
        on_compared = partial(_count_compared, bar)
        for extractor, space_sets in zip(extractors, sets, strict=True):
            metrics["spaces"][extractor.name] = {
                "identity": extractor.identity,
                "trained_discriminator": None
                if discriminator_space_name is None
                else extractor.name == discriminator_space_name,
                **measure.measure_space(extractor.name, space_sets, names, selection, on_compared=on_compared),
            }
        if distance is not None:
            path_labels = labels_in_proportion(real_labels, ppl_paths)
            lengths = _path_lengths(generator, distance[1], path_labels, seed, bar)
            metrics["ppl"] = measure.path_lengths_by_class(lengths, path_labels, names, distance[0])
        bar.update(bar.total - bar.n)  # classes with too few images are not compared
        html = None
        if page:
            html = _page(bundle, generator, synthesizer, dataset, sets[independent], metrics)
    return Evaluation(metrics, html)


def keep_metrics(bundle: Bundle, metrics: Mapping[str, Any]) -> Bundle:
    """Write metrics into a local bundle and into the section "Measured" of its card."""
    card = renewed_card(bundle.model_card, bundle.provenance, metrics)
    return amend_bundle(bundle, metrics=metrics, model_card=card)


def check_images(dataset: ImageDataset, holdout: ImageDataset | None, trained_on: str | None = None) -> None:
    """Check the numbers of images, and that held-out images were not used in training (`check_holdout`).

    Raises:
        DataError: A check fails.
    """
    for option, images in (("--data", dataset), ("--holdout", holdout)):
        if images is not None and len(images.labels) < MIN_IMAGES:
            raise DataError(
                f"{option}: {len(images.labels)} images are too few to measure anything; give {MIN_IMAGES} or more"
            )
    if holdout is not None:
        check_holdout(dataset, holdout, trained_on)


def _check(
    bundle: Bundle, dataset: ImageDataset, holdout: ImageDataset | None, count: int | None, ppl_paths: int
) -> None:
    for option, images in (("--data", dataset), ("--holdout", holdout)):
        if images is not None and bundle.class_names and images.class_names != bundle.class_names:
            raise DataError(f"{option}: has the classes {images.class_names}, but the bundle {bundle.class_names}")
    check_images(dataset, holdout, trained_on(bundle.provenance))
    if count is not None and count < MIN_IMAGES:
        raise DataError(f"--count: {count} images are too few to measure anything; give {MIN_IMAGES} or more")
    if ppl_paths < MIN_IMAGES:
        raise DataError(f"--ppl-paths: {ppl_paths} paths are too few to measure anything; give {MIN_IMAGES} or more")


def _compared_images(
    real: int, generated: int, holdout: ImageDataset | None, names: Sequence[str], noise_modes: int
) -> int:
    """Number of images on both sides of all comparisons in one space, if all classes have enough images."""
    classes = bool(names)  # the classes together have as many images as the set
    if holdout is None:
        return (real + generated) * (noise_modes + classes)
    smallest = min(real, generated, len(holdout.labels))
    return 2 * smallest * (3 + 2 * (noise_modes - 1) + 3 * classes)


def _count_compared(bar: tqdm, images: int) -> None:
    bar.update(images // _COMPARED_PER_UNIT)


def _path_distance(
    extractors: Sequence[FeatureExtractor], independent: int, device: str
) -> tuple[str, PerceptualDistance]:
    """The distance that path lengths are measured with, and its name."""
    differentiable = [each for each in (extractors[independent], *extractors) if each.embed is not None]
    if extractors[0].name == "inception" or not differentiable:
        return "lpips-vgg16", lpips(resolve_device(device))
    return differentiable[0].name, feature_distance(differentiable[0])


def _path_lengths(
    generator: Generator, distance: PerceptualDistance, labels: NDArray[np.int64], seed: int, bar: tqdm
) -> dict[str, NDArray[np.float64]]:
    return {
        sampling: path_lengths(
            generator,
            distance,
            labels,
            sampling=sampling,
            seed=seed,
            on_batch=lambda paths: bar.update(paths * _UNITS_OF_A_PATH),
        )
        for sampling in get_args(Sampling)
    }


def _page(
    bundle: Bundle,
    generator: Generator,
    synthesizer: Synthesizer,
    dataset: ImageDataset,
    sets: ImageSets,
    metrics: dict[str, Any],
) -> str:
    """Make the page, with neighbours in the space of `sets`."""
    mode: NoiseMode = metrics["noise_mode"]
    draw = pictures.Drawing(generator, synthesizer, metrics["seed"], metrics["truncation_psi"], mode)
    classes = dict(enumerate(bundle.class_names)) or {0: "samples"}
    interpolations = {f"within {name}": draw.interpolations(label, INTERPOLATIONS) for label, name in classes.items()}
    for start, end in pairwise(classes):
        caption = f"from {classes[start]} to {classes[end]}, z kept"
        interpolations[caption] = draw.class_interpolations(start, end, INTERPOLATIONS)
    closest, even = draw.matches(
        sets.generated_labels,
        sets.generated[mode],
        sets.training,
        dataset.images,
        closest=CLOSEST,
        even=UNSELECTED,
    )
    samples = {name: draw.samples(label, GRID) for label, name in classes.items()}
    return report_page(origin_of(bundle), metrics, bundle.class_names, samples, closest, even, interpolations)
