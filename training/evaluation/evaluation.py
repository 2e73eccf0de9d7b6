"""One evaluation from a bundle and real images to the numbers and, if asked for, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dermis.bundle import Bundle, amend_bundle, load_generator
from dermis.devices import resolve_device
from dermis.errors import DataError
from dermis.features import FeatureExtractor
from dermis.metrics.intervals import LEVEL
from dermis.metrics.path_length import PerceptualDistance, Sampling, path_lengths
from dermis.metrics.perceptual import feature_distance, lpips
from dermis.networks import Generator
from dermis.synthesizer import Synthesizer
from training.data.embedding import progress_bar
from training.data.isic import ImageDataset
from training.evaluation import measure, pictures
from training.evaluation.features import generated_features, labels_in_proportion, real_features
from training.evaluation.holdout import check_holdout, groups_of
from training.evaluation.measure import FEWEST, REPLICATES, Features, Selection
from training.evaluation.report import report_page
from training.evaluation.table import table_rows
from training.gan.card import renewed_card, trained_on

CLOSEST, UNSELECTED, GRID, WALKS = 12, 8, 32, 4


@dataclass(frozen=True)
class Evaluation:
    """metrics: what metrics.json of the bundle is to hold. page: HTML that shows training images, or None."""

    metrics: dict[str, Any]
    page: str | None


def evaluate_bundle(
    bundle: Bundle,
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    *,
    holdout: ImageDataset | None = None,
    selection: Selection = "all",
    count: int | None = None,
    ppl_paths: int = 2000,
    seed: int = 0,
    truncation_psi: float = 1.0,
    cache: Path | None = None,
    device: str = "auto",
    page: bool = False,
) -> Evaluation:
    """Generate `count` images (as many as there are real ones if None) and compare them with the real ones.

    `dataset` should be what the generator was trained on, or authenticity and the test for memorising mean nothing;
    metrics.json says whether it is. `holdout` are real images that it never saw. Path lengths (selection "all") are
    measured by the extractor's features, or by LPIPS where the extractor takes 8-bit images only. Raises DataError if
    classes do not fit or there are too few images, DermisError if weights cannot be had; both before the long work.
    """
    _check(bundle, dataset, holdout, count, ppl_paths)
    generator = load_generator(bundle).to(resolve_device(device))
    distance = None
    if selection == "all":
        distance = lpips(resolve_device(device)) if extractor.embed is None else feature_distance(extractor)
    names = bundle.class_names
    real_labels = dataset.labels if names else np.zeros_like(dataset.labels)
    labels = labels_in_proportion(real_labels, len(real_labels) if count is None else count)

    groups = None if holdout is None else groups_of(dataset, holdout)
    total = len(real_labels) + len(labels) + (0 if holdout is None else len(holdout.labels))
    with Synthesizer(bundle, device=device) as synthesizer:
        with progress_bar(total, "embedding") as bar:
            real = real_features(dataset, extractor, cache, bar=bar)
            held = None if holdout is None else real_features(holdout, extractor, cache, bar=bar)
            generated = generated_features(
                synthesizer, labels, extractor, seed=seed, truncation_psi=truncation_psi, bar=bar
            )
        metrics: dict[str, Any] = {
            "extractor": extractor.name,
            "extractor_identity": extractor.identity,
            "real_sha256": dataset.sha256,
            "real_is_training_set": trained_on(bundle.provenance) == dataset.sha256,
            "seed": seed,
            "truncation_psi": truncation_psi,
            "synthesizer": dict(synthesizer.identity),
            "interval_level": LEVEL,
            "bootstrap_replicates": REPLICATES,
            **_compare(real, real_labels, generated, labels, held, names, selection, groups),
        }
        if holdout is not None:
            metrics["holdout"]["sha256"] = holdout.sha256
        if distance is not None:
            label = "lpips-vgg16" if extractor.embed is None else extractor.name
            path_labels = labels_in_proportion(real_labels, ppl_paths)
            lengths = _path_lengths(generator, distance, path_labels, seed)
            metrics["ppl"], by_class = measure.path_lengths_by_class(lengths, path_labels, names, label)
            for name in by_class.keys() & metrics.get("classes", {}).keys():
                metrics["classes"][name]["ppl"] = by_class[name]
        html = _page(bundle, generator, synthesizer, dataset, real, generated, labels, metrics) if page else None
    return Evaluation(metrics, html)


def keep_metrics(bundle: Bundle, metrics: Mapping[str, Any]) -> Bundle:
    """Write metrics into a local bundle and into the section "Measured" of its card."""
    card = renewed_card(bundle.model_card, bundle.provenance, metrics)
    return amend_bundle(bundle, metrics=metrics, model_card=card)


def check_images(dataset: ImageDataset, holdout: ImageDataset | None, trained_on: str | None = None) -> None:
    """DataError if these images are too few to measure anything, or held-out ones are not held out (`check_holdout`)."""
    for what, images in (("--data", dataset), ("--holdout", holdout)):
        if images is not None and len(images.labels) < FEWEST:
            raise DataError(
                f"{what}: {len(images.labels)} images are too few to measure anything; give {FEWEST} or more"
            )
    if holdout is not None:
        check_holdout(dataset, holdout, trained_on)


def _check(
    bundle: Bundle, dataset: ImageDataset, holdout: ImageDataset | None, count: int | None, ppl_paths: int
) -> None:
    for what, images in (("--data", dataset), ("--holdout", holdout)):
        if images is not None and bundle.class_names and images.class_names != bundle.class_names:
            raise DataError(f"{what}: has the classes {images.class_names}, but the bundle {bundle.class_names}")
    check_images(dataset, holdout, trained_on(bundle.provenance))
    if count is not None and count < FEWEST:
        raise DataError(f"--count: {count} images are too few to measure anything; give {FEWEST} or more")
    if ppl_paths < FEWEST:
        raise DataError(f"--ppl-paths: {ppl_paths} paths are too few to measure anything; give {FEWEST} or more")


def _compare(
    real: Features,
    real_labels: NDArray[np.int64],
    generated: Features,
    labels: NDArray[np.int64],
    held: Features | None,
    names: tuple[str, ...],
    selection: Selection,
    groups: Sequence[str] | None,
) -> dict[str, Any]:
    """`compare` of all, of every class that has enough images in both sets, and of the held-out images."""
    with tqdm(total=1 + len(names) + (held is not None), desc="comparing", unit="set") as bar:
        metrics = measure.compare(real, generated, selection)
        bar.update()
        if names:
            metrics["classes"] = {}
        for k, name in enumerate(names):
            of_class = real[real_labels == k], generated[labels == k]
            if min(map(len, of_class)) >= FEWEST:
                metrics["classes"][name] = measure.compare(*of_class, selection)
            bar.update()
        if held is not None:
            metrics["holdout"] = measure.compare_holdout(real, held, generated, selection, groups)
            bar.update()
    return metrics


def _path_lengths(
    generator: Generator, distance: PerceptualDistance, labels: NDArray[np.int64], seed: int
) -> dict[str, NDArray[np.float64]]:
    with tqdm(total=2 * len(labels), desc="paths", unit="path") as bar:
        return {
            sampling: path_lengths(generator, distance, labels, sampling=sampling, seed=seed, on_batch=bar.update)
            for sampling in get_args(Sampling)
        }


def _page(
    bundle: Bundle,
    generator: Generator,
    synthesizer: Synthesizer,
    dataset: ImageDataset,
    real: Features,
    generated: Features,
    labels: NDArray[np.int64],
    metrics: dict[str, Any],
) -> str:
    draw = pictures.Drawing(generator, synthesizer, metrics["seed"], metrics["truncation_psi"])
    classes = dict(enumerate(bundle.class_names)) or {0: "samples"}
    walks = {f"within {name}": draw.interpolations(label, WALKS) for label, name in classes.items()}
    for start, end in pairwise(classes):
        caption = f"from {classes[start]} to {classes[end]}, z kept"
        walks[caption] = draw.class_interpolations(start, end, WALKS)
    closest, even = draw.matches(labels, generated, real, dataset.images, closest=CLOSEST, even=UNSELECTED)
    samples = {name: draw.samples(label, GRID) for label, name in classes.items()}
    return report_page(bundle.name, table_rows(metrics), metrics, bundle.class_names, samples, closest, even, walks)
