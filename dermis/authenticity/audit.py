"""The paper's audit: are projections of real images copies of them, and are samples?

"GAN-based generative modelling for dermatological applications" (arXiv 2208.11702) projects training images into the latent
space and takes the cosine distance of each projection's features from its target's: a generator that has memorised draws its
training images again. Beside it stand what does not depend on the projector: generated samples, and real images that the
generator never saw.
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
_SAME = 1e-3  # distances in the index's space that differ by less are of one image: it stores 8 bits


@dataclass(frozen=True)
class ProjectionAudit:
    """Of N projections of real images."""

    cosine: NDArray[np.float64]
    """[N]: cosine distance of the projection's features from its target's, as the network gives them."""
    verdicts: Verdicts
    """Of the projections."""
    own: NDArray[np.bool_]
    """[N]: whether the nearest training image is the target itself. Only where targets are training images."""
    too_close: NDArray[np.bool_]
    """[N]: nearer to the nearest training image than that one is to its own nearest other one."""


def audit_projections(index: Index, targets: Floats, projections: Floats) -> ProjectionAudit:
    """Of features [N, feature_dim] of targets and of their projections."""
    a, b = (x.astype(np.float64) for x in (targets, projections))
    cosine = 1 - (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    found = index.nearest(projections)
    judged = verdicts_of(found, index.description)
    to_target = np.linalg.norm(index.projected(targets) - found.embeddings, axis=1)
    own = to_target <= found.distances + _SAME + 0.01 * found.distances
    return ProjectionAudit(np.maximum(cosine, 0), judged, own, ~judged.authentic)


@dataclass(frozen=True)
class SampleAudit:
    """Of generated samples, and of held-out real images for comparison."""

    authentic: float
    """Share of authentic samples."""
    too_near: float
    """Share of samples nearer to a training image than 99 % of the training images are to any other."""
    held_out_authentic: float | None
    """What real images that the generator never saw score; None if the index has none."""
    held_out_too_near: float | None
    exposure: Exposure


def audit_samples(index: Index, samples: Floats) -> SampleAudit:
    """Of features [N, feature_dim] of generated samples."""
    found = index.nearest(samples)
    judged = verdicts_of(found, index.description)
    held = None
    if index.held_out is not None:
        held = verdicts_of(index.nearest_of_projected(index.held_out), index.description)
    return SampleAudit(
        authentic=float(judged.authentic.mean()),
        too_near=float((judged.percentiles < 1).mean()),
        held_out_authentic=None if held is None else float(held.authentic.mean()),
        held_out_too_near=None if held is None else float((held.percentiles < 1).mean()),
        exposure=exposure(index, found.embeddings),
    )


def spread(values: NDArray[np.floating]) -> Mapping[str, float]:
    """Mean and percentiles, for reports."""
    shown = {f"p{percentile}": float(np.percentile(values, percentile)) for percentile in _SHOWN}
    return {"mean": float(values.mean()), **shown}
