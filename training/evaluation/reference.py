"""Measure real images for the statistics in a bundle, in the same way as the images of a dataset are measured."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from dermis.authenticity.checker import Checker
from dermis.bundle import Bundle
from dermis.report.appearance import Appearance, appearances
from dermis.report.build import RealImages
from dermis.report.features import Floats
from training.data.embedding import CHUNK, progress_bar
from training.data.images import ImageDataset
from training.evaluation.holdout import groups_of


def measure_real(
    bundle: Bundle, dataset: ImageDataset, held_out: ImageDataset | None, device: str
) -> tuple[RealImages, RealImages | None]:
    """Measure training images and held-out images.

    Args:
        bundle: The bundle, whose index gives the features if it has one.
        dataset: The training images at the resolution of the generator.
        held_out: Held-out images.
        device: Device of the network that computes features.
    """
    total = len(dataset.images) + (0 if held_out is None else len(held_out.images))
    with ExitStack() as stack:
        checker = None
        if bundle.authenticity is not None:
            checker = stack.enter_context(Checker(bundle, device=device))
        bar = stack.enter_context(progress_bar(total, "measuring"))

        def measure(images: ImageDataset, looks: bool) -> RealImages:
            seen: list[Appearance] = []
            features: list[Floats] = []
            for start in range(0, len(images.images), CHUNK):
                chunk = np.ascontiguousarray(images.images[start : start + CHUNK])
                if looks:
                    seen += appearances(chunk)
                if checker is not None:
                    features.append(checker.index.projected(checker.embed(chunk)))
                bar.update(len(chunk))
            classes = [images.class_names[label] for label in images.labels]
            return RealImages(classes, seen, _known_groups(images), np.concatenate(features) if features else None)

        return measure(dataset, True), None if held_out is None else measure(held_out, False)


def _known_groups(images: ImageDataset) -> list[str] | None:
    """The patient (or lesion) of every image, "" where neither is known; None if it is for none."""
    groups = groups_of(images)
    if groups is None:
        return None
    records = zip(groups, images.records, strict=True)
    return [group if record.patient_id or record.lesion_id else "" for group, record in records]
