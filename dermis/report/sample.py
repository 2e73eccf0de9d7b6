"""Measure a sample of the images of a finished dataset for its report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice

import numpy as np

from dermis.bundle import Bundle
from dermis.dataset.containers import file_name
from dermis.dataset.plan import BATCH, DatasetPlan
from dermis.dataset.privacy import Examine
from dermis.errors import DermisError
from dermis.imaging import Images, as_rgb
from dermis.report.appearance import Appearance, MeasureImages, appearances
from dermis.report.content import Measurements
from dermis.report.features import MIN_IMAGES, Floats

SAMPLE = 200
"""Images whose pixels are measured, of all classes together."""
MAX_FEATURES = 10_000
"""Images whose features are compared if the gate has computed those of all, of all classes together."""


def evenly_spaced(number: int, most: int) -> list[int]:
    """Return at most `most` of the positions 0 ... number - 1, evenly spaced."""
    count = min(number, most)
    return [(2 * k + 1) * number // (2 * count) for k in range(count)]


def choose(kept: Mapping[str, Sequence[int]], most: int) -> dict[str, list[int]]:
    """Choose about the same number of samples of each class, evenly spaced, at most `most` or one of each."""
    remaining, classes = most, sorted(kept, key=lambda name: len(kept[name]))
    counts: dict[str, int] = {}
    for position, name in enumerate(classes):  # what a small class leaves is for the others
        counts[name] = min(len(kept[name]), max(1, remaining // (len(classes) - position)))
        remaining -= counts[name]
    return {
        name: [samples[k] for k in evenly_spaced(len(samples), counts[name])] if samples else []
        for name, samples in kept.items()
    }


def measure(
    plan: DatasetPlan,
    bundle: Bundle,
    kept: Mapping[str, Sequence[int]],
    images: Callable[[Collection[str]], Iterable[tuple[str, Images]]],
    examine: Examine | None,
    embeddings: Callable[[Sequence[int]], Floats] | None,
    on_batch: Callable[[], None] | None = None,
    measure_images: MeasureImages = appearances,
) -> Measurements:
    """Measure the images for the report.

    Args:
        plan: The plan of the dataset.
        bundle: The bundle whose generator made the images.
        kept: Indices of the samples that have an image, by class.
        images: Yields name and pixels of the images with the given file names.
        examine: Computes features if there is no gate, of classes with enough images for a comparison; None if it cannot.
        embeddings: Indices of samples -> features that the gate has computed, float32 [n, dim]; None without a gate.
        on_batch: Called between batches of images.
        measure_images: Measures artefacts and skin tone of a batch.
    """
    sample = choose(kept, SAMPLE)
    class_of = {
        file_name(plan, index, plan.class_names.index(name)): name
        for name, indices in sample.items()
        for index in indices
    }
    reference = bundle.reference
    needed = reference is not None and reference.space is not None
    examining = needed and not plan.gated  # a gate has computed the features already
    problem = "the index of the bundle cannot be used here" if examining and examine is None else None
    known = reference.classes if examining and reference is not None else {}
    compared = {name for name, indices in sample.items() if name in known and len(indices) >= MIN_IMAGES}
    seen: dict[str, list[Appearance]] = {name: [] for name in kept}
    features: dict[str, list[Floats]] = {name: [] for name in kept}
    remaining = iter(images(class_of))
    while batch := list(islice(remaining, BATCH)):
        if on_batch is not None:
            on_batch()
        names = [class_of[name] for name, _ in batch]
        colour = as_rgb(np.stack([pixels for _, pixels in batch]))
        for name, measured in zip(names, measure_images(colour), strict=True):
            seen[name].append(measured)
        examined = [position for position, name in enumerate(names) if name in compared]
        if examined and examine is not None and problem is None:
            try:
                embeddings_of_batch = examine(colour[examined]).embeddings
            except DermisError as error:
                problem = f"the index of the bundle could not be used ({error})"
                continue
            for position, row in zip(examined, embeddings_of_batch, strict=True):
                features[names[position]].append(row)
    stacked = {name: np.stack(rows) for name, rows in features.items() if rows} if problem is None else {}
    if needed and embeddings is not None:
        stacked = {name: embeddings(indices) for name, indices in choose(kept, MAX_FEATURES).items() if indices}
    return Measurements(seen, stacked, problem)
