"""Is a generated image a copy? Verdicts by distance to the nearest training image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Nearest
from dermis.bundle.index import PERCENTILES, IndexDescription

SAME_SHARE = 0.05
"""Of the typical distance: images nearer than that are one image. It is well above the rounding to 8 bits (0.005 of it)
and below what different images reach (0.08 of it in 6,543 dermoscopic images, features of the demo's classifier)."""
WEAK_SHARE = 0.075
"""Of the typical distance: below this, the first percentile of the radii hardly differs from the distances of copies.
It is 0.13 of it for 2,181 dermoscopic images in the features of the demo's classifier."""
FEWEST_DISTINCT = 20


@dataclass(frozen=True)
class Verdicts:
    """Of N images, all arrays [N]."""

    distances: NDArray[np.float32]
    """To the nearest training image, in the index's space."""
    radii: NDArray[np.float32]
    """How far that training image is from its own nearest other one."""
    percentiles: NDArray[np.float32]
    """0..100: the share of training images whose own nearest other one is nearer than that. Below 1, hardly any two real
    images are so alike."""
    authentic: NDArray[np.bool_]
    """Whether the image is farther from its nearest training image than that one is from its own nearest training
    neighbour (Alaa et al., arXiv 2102.08921, section 3.3)."""


def verdicts_of(found: Nearest, described: IndexDescription) -> Verdicts:
    """Verdicts on images whose nearest training images are known."""
    percentiles = np.interp(found.distances, described.radii, PERCENTILES, left=0, right=100).astype(np.float32)
    return Verdicts(found.distances, found.radii, percentiles, found.distances > found.radii)


def weakness(described: IndexDescription) -> str | None:
    """Why the baseline of an index cannot separate copies from other images; None if it can."""
    first, half, duplicates = described.radii[1], described.radii[50], described.duplicates
    again = "build the index again: dermis index build"
    if duplicates is None:
        if first < WEAK_SHARE * half or (described.metric == "cosine" and half < SAME_SHARE):
            return (
                f"1 % of the training images are nearer than {first:.4f} to another one, so copies can pass: this index was "
                f"built by a version that counted duplicates among the training images as neighbours; {again}"
            )
        return None
    reasons = []
    if duplicates.distinct < FEWEST_DISTINCT:
        reasons.append(f"only {duplicates.distinct:,} different training images are left to compare with")
    if first < WEAK_SHARE * duplicates.typical_distance:
        reasons.append(
            f"1 % of the training images are nearer than {first:.4f} to another one, at a typical distance of "
            f"{duplicates.typical_distance:.4f}: they may be photographs of one lesion without an id that says so, or copies "
            "that were changed; find them with dermis data leaks"
        )
    if described.exact_radii is not None and described.exact_radii < 0.95:
        reasons.append(
            f"only {described.exact_radii:.1%} of the radii are right, as the index searches approximately; build it again "
            "with --kind flat"
        )
    return "; ".join(reasons) or None


def stands_on(described: IndexDescription) -> str:
    """One sentence on the percentile that verdicts and the gate are based on."""
    text = f"1 % of the {described.vectors:,} training images are nearer than {described.radii[1]:.4f} to another one"
    duplicates = described.duplicates
    if duplicates is None:
        return f"{text} (near-duplicates not looked for: the index is of an older version)"
    if not duplicates.images:
        return f"{text} (no near-duplicates among them)"
    return f"{text} ({duplicates.images:,} near-duplicates in {duplicates.groups:,} groups, each group counts as one image)"
