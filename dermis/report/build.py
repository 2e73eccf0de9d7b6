"""Make the statistics of real images with which reports compare: `dermis bundle reference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dermis.artefacts import THRESHOLDS
from dermis.bundle.reference import (
    COUNT_STEP,
    MINIMUM_GROUP,
    BaselineSample,
    ClassFeatures,
    ClassReference,
    FeatureSpace,
    ReferenceDescription,
)
from dermis.errors import DataError
from dermis.report.appearance import Appearance, artefact_counts, skin_tones
from dermis.report.features import Counts, Floats, baseline, statistics_of
from dermis.skin_tone import tone_counts

MAX_DIM = 64
"""Components of the index's embeddings that are used at most. The first ones have most of the variance."""
IMAGES_PER_DIM = 50
"""Images of the smallest class for each component: a covariance of few images fits these images better than others."""


@dataclass(frozen=True)
class RealImages:
    """What was measured of real images.

    Attributes:
        classes: Class of each image.
        appearances: Artefacts and skin tone of each image; empty for held-out images, of which only features are used.
        groups: Patient or lesion of each image, "" where neither is known; None if it is for none.
        features: Features [N, dim]; None without an index.
    """

    classes: Sequence[str]
    appearances: Sequence[Appearance] = ()
    groups: Sequence[str] | None = None
    features: Floats | None = None


def build_reference(
    real: RealImages,
    *,
    resolution: int,
    index: str | None,
    held_out: RealImages | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> tuple[ReferenceDescription, dict[str, ClassFeatures]]:
    """Compute the statistics of each class. Classes with images of fewer than `MINIMUM_GROUP` patients have none.

    Where only the lesion of an image is known, it takes the place of the patient. An image without both counts as one patient,
    because nothing says which images belong together; so if no image has an id, images are counted.

    Args:
        real: The images that the generator was trained on.
        resolution: Side of the images, px.
        index: SHA-256 of the index whose features these are; None without features.
        held_out: Real images that it was not trained on, for the baseline.
        provenance: Where the images come from, as JSON values.

    Returns:
        The description, and the statistics of features by class.

    Raises:
        DataError: No class has images of enough patients.
    """
    classes = np.array(real.classes)
    patients = _patients(real)
    names = sorted(set(real.classes))
    large = [name for name in names if len(set(patients[classes == name])) >= MINIMUM_GROUP]
    if not large:
        raise DataError(
            f"no class has images of at least {MINIMUM_GROUP} patients; statistics of fewer could disclose single ones "
            "(an image without an id of patient and lesion counts as a patient)"
        )
    width = 0 if real.features is None else real.features.shape[1]
    smallest = int(min((classes == name).sum() for name in large))
    dim = max(1, min(MAX_DIM, width, smallest // IMAGES_PER_DIM))
    described: dict[str, ClassReference] = {}
    features: dict[str, ClassFeatures] = {}
    for name in large:
        chosen = np.flatnonzero(classes == name).tolist()
        measured = [real.appearances[i] for i in chosen]
        angles = skin_tones(measured)
        seen = {patients[i] for i in chosen if real.appearances[i].skin_tone is not None}
        if len(seen) < MINIMUM_GROUP:  # a median of few patients could be the angle of one of them
            angles = []
        cells: tuple[int, ...] = ()
        typical: float | None = None
        samples: tuple[BaselineSample, ...] = ()
        if real.features is not None and index is not None:
            features[name], cells, typical = statistics_of(real.features[chosen, :dim], patients[chosen])
            if held_out is not None and held_out.features is not None:
                others = np.array(held_out.classes) == name
                if len(set(_patients(held_out)[others])) >= MINIMUM_GROUP:
                    samples = baseline(held_out.features[others, :dim], features[name], cells, typical)
        described[name] = ClassReference(
            images=len(chosen),
            patients=None if real.groups is None else len({real.groups[i] for i in chosen} - {""}),
            artefacts={key: _coarse(count) for key, count in artefact_counts(measured).items()},
            skin_tones={key: _coarse(count) for key, count in tone_counts(angles).items()},
            skin_tone_median=round(float(np.median(angles)), 1) if angles else 0.0,
            cells=cells,
            typical_distance=typical,
            baseline=samples,
        )
    description = ReferenceDescription(
        resolution=resolution,
        classes=described,
        suppressed=tuple(name for name in names if name not in large),
        thresholds=THRESHOLDS,
        space=FeatureSpace(index, dim) if features and index and real.features is not None else None,
        provenance=dict(provenance or {}),
    )
    return description, features


def _patients(real: RealImages) -> Counts:
    """Return a number for each image, which is the same for images of one patient. An image without an id has its own."""
    numbers: dict[str | int, int] = {}
    groups = [""] * len(real.classes) if real.groups is None else real.groups
    return np.array([numbers.setdefault(group or i, len(numbers)) for i, group in enumerate(groups)], np.intp)


def _coarse(count: int) -> int:
    """Round a count, so that a single image does not show in it."""
    return COUNT_STEP * round(count / COUNT_STEP)
