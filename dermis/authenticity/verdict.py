"""Verdicts on generated images by their distance to the nearest training image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Nearest
from dermis.bundle.index import PERCENTILES, IndexDescription

COPY = 1.0
"""Score of the copy detector from which on an image is a copy."""
FALSE_ALARMS = 0.01
"""Share of other real images that the copy detector may take for copies."""
SAME_SHARE = 0.05
"""Share of the typical distance below which two images count as the same image.

It is well above the rounding to 8 bits (0.005), and below the smallest distance of different images (0.08 in 6,543 dermoscopic
images with the features of the demo's classifier)."""
WEAK_SHARE = 0.075
"""Share of the typical distance below which the first percentile of the radii hardly differs from the distances of copies.

That percentile is at 0.13 for 2,181 dermoscopic images with the features of the demo's classifier."""
MIN_DISTINCT = 20


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on N images. All arrays are [N]."""

    distances: NDArray[np.float32]
    """Distance to the nearest training image, in the space of the index."""
    radii: NDArray[np.float32]
    """Radius of that training image: its distance to the nearest other training image."""
    percentiles: NDArray[np.float32]
    """0..100: percentage of training images whose radius is smaller than `distances`. Below 1, hardly any two real images are
    so similar."""
    authentic: NDArray[np.bool_]
    """Whether the distance to the nearest training image is larger than the radius of that training image (Alaa et al., arXiv
    2102.08921, section 3.3)."""
    copies: NDArray[np.bool_] | None = None
    """Whether the copy detector takes the image for a changed copy of a training image; None without a detector."""


def verdicts_of(nearest: Nearest, description: IndexDescription, *, step: float | None = None) -> Verdicts:
    """Return verdicts on images whose nearest training images are known.

    Args:
        nearest: The nearest training images.
        description: Description of the index.
        step: Distances are rounded to multiples of this number, and percentiles are those of the rounded distances. None
            for no rounding.
    """
    distances = nearest.distances
    if step is not None:
        distances = (np.round(distances.astype(np.float64) / step) * step).astype(np.float32)
    percentiles = np.interp(distances, description.radii, PERCENTILES, left=0, right=100).astype(np.float32)
    copies = None if nearest.copy_scores is None else nearest.copy_scores >= COPY
    return Verdicts(distances, nearest.radii, percentiles, nearest.distances > nearest.radii, copies)


def baseline_problem(description: IndexDescription) -> str | None:
    """Return why the baseline of an index cannot separate copies from other images; None if it can."""
    first, half, duplicates = description.radii[1], description.radii[50], description.duplicates
    again = "build the index again: dermis index build"
    if duplicates is None:
        if first < WEAK_SHARE * half or (description.metric == "cosine" and half < SAME_SHARE):
            return (
                f"1 % of the training images are nearer than {first:.4f} to another one, so copies can pass: this index was "
                f"built by a version that counted duplicates among the training images as neighbours; {again}"
            )
        return None
    reasons = []
    if duplicates.distinct < MIN_DISTINCT:
        reasons.append(f"only {duplicates.distinct:,} different training images are left to compare with")
    if first < WEAK_SHARE * duplicates.typical_distance:
        reasons.append(
            f"1 % of the training images are nearer than {first:.4f} to another one, at a typical distance of "
            f"{duplicates.typical_distance:.4f}: they may be photographs of one lesion without a common lesion id, or "
            "edited copies; find them with dermis data leaks"
        )
    if description.exact_radii is not None and description.exact_radii < 0.95:
        reasons.append(
            f"only {description.exact_radii:.1%} of the radii are exact, because the index searches approximately; build it "
            "again with --kind flat"
        )
    return "; ".join(reasons) or None


def baseline_sentence(description: IndexDescription) -> str:
    """Return a sentence on the percentile that verdicts and the gate are based on."""
    text = (
        f"1 % of the {description.vectors:,} training images are nearer than {description.radii[1]:.4f} to another one"
    )
    duplicates = description.duplicates
    if duplicates is None:
        return f"{text} (near-duplicates were not searched: the index was built by an older version)"
    if not duplicates.images:
        return f"{text} (no near-duplicates among them)"
    return f"{text} ({duplicates.images:,} near-duplicates in {duplicates.groups:,} groups, each group counts as one image)"
