"""The audit of the paper: whether projections of real images, and samples, are copies of training images.

"GAN-based generative modelling for dermatological applications" (arXiv 2208.11702) projects training images into the latent
space and measures the cosine distance of each projection's features to those of its target: a generator that has memorised
its training images can reproduce them. Generated samples, and real images that the generator never saw, are measured as
well, because their results do not depend on the projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.attack import Exposure, exposure
from dermis.authenticity.index import Floats, Index
from dermis.authenticity.verdict import Verdicts, verdicts_of

_SHOWN = (0, 1, 5, 25, 50, 75, 95, 99, 100)
_SAME = 1e-3  # smaller differences of distances can come from the rounding to 8 bits


@dataclass(frozen=True)
class ProjectionAudit:
    """Results for N projections of real images."""

    cosine: NDArray[np.float64]
    """[N]: cosine distance between the features of the projection and of its target."""
    verdicts: Verdicts
    """Verdicts on the projections."""
    nearest_is_target: NDArray[np.bool_]
    """[N]: whether the nearest training image is the target itself. It is meaningful if targets are training images."""
    not_authentic: NDArray[np.bool_]
    """[N]: whether the distance to the nearest training image is at most the radius of that training image."""


def audit_projections(index: Index, targets: Floats, projections: Floats) -> ProjectionAudit:
    """Audit projections.

    Args:
        index: The index of the training images.
        targets: Features [N, feature_dim] of the real images.
        projections: Features [N, feature_dim] of their projections.
    """
    a, b = (x.astype(np.float64) for x in (targets, projections))
    cosine = 1 - (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    nearest = index.nearest(projections)
    verdicts = verdicts_of(nearest, index.description)
    to_target = np.linalg.norm(index.projected(targets) - nearest.embeddings, axis=1)
    nearest_is_target = to_target <= nearest.distances + _SAME + 0.01 * nearest.distances
    return ProjectionAudit(np.maximum(cosine, 0), verdicts, nearest_is_target, ~verdicts.authentic)


@dataclass(frozen=True)
class SampleAudit:
    """Results for generated samples, and for held-out real images for comparison."""

    authentic: float
    """Share of authentic samples."""
    below_first_percentile: float
    """Share of samples nearer to a training image than 99 % of the training images are to any other."""
    held_out_authentic: float | None
    """Share of authentic held-out images; None if the index has none."""
    held_out_below_first_percentile: float | None
    exposure: Exposure


def audit_samples(index: Index, samples: Floats) -> SampleAudit:
    """Audit generated samples by their features [N, feature_dim]."""
    nearest = index.nearest(samples)
    verdicts = verdicts_of(nearest, index.description)
    held_out = None
    if index.held_out is not None:
        held_out = verdicts_of(index.nearest_of_projected(index.held_out), index.description)
    return SampleAudit(
        authentic=float(verdicts.authentic.mean()),
        below_first_percentile=float((verdicts.percentiles < 1).mean()),
        held_out_authentic=None if held_out is None else float(held_out.authentic.mean()),
        held_out_below_first_percentile=None if held_out is None else float((held_out.percentiles < 1).mean()),
        exposure=exposure(index, nearest.embeddings),
    )


def spread(values: NDArray[np.floating]) -> Mapping[str, float]:
    """Return mean and percentiles of values, for reports."""
    shown = {f"p{percentile}": float(np.percentile(values, percentile)) for percentile in _SHOWN}
    return {"mean": float(values.mean()), **shown}
