"""The gate in a dataset: how near is each image to the generator's training images, and may it stay?

Whether an image passes depends on its own pixels alone, so a gated dataset is a pure function of its request too. Of what the
index tells, only rounded distances are written: how near an image is, never to which.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dermis.authenticity.attack import Exposure
from dermis.authenticity.index import Floats, Nearest
from dermis.authenticity.verdict import stands_on, verdicts_of, weakness
from dermis.bundle.index import PERCENTILES, IndexDescription
from dermis.dataset.plan import Plan
from dermis.imaging import Images

Examine = Callable[[Images], Nearest]
"""uint8 [N, H, W, 3] -> nearest training images, by the bundle's index."""
Expose = Callable[[Floats], Exposure]
"""Embeddings [N, dim] of a whole dataset in the index's space -> what they tell of the training set."""

SHOWN = (1, 5, 25, 50, 75, 95)
"""Percentiles of nearest distances that a dataset's report gives."""


@dataclass(frozen=True)
class Verdict:
    """What the index says of one image."""

    distance: float
    """To the nearest training image, to two decimals."""
    percentile: int
    """0..100: share of training images whose own nearest other one is nearer than that."""
    authentic: bool
    passed: bool
    """Whether the gate lets it through."""
    embedding: str
    """float16 [dim] in the index's space, base64: for the report on the whole dataset, and kept no longer."""


@dataclass(frozen=True)
class Checks:
    """What the gate did for one sample: candidates that it saw, those that are authentic, those that it rejected."""

    seen: int
    authentic: int
    rejected: int
    verdict: Verdict | None
    """Of the image that is in the dataset; None if there is none."""


@dataclass(frozen=True)
class PrivacyTally:
    """How one class came out. `seen`: candidates that were compared with the training images."""

    images: int
    seen: int
    seen_authentic: int
    rejected: int
    authentic: int
    flagged: int


@dataclass(frozen=True)
class PrivacyReport:
    """What the comparison with the training images gave: in manifest.json and on the dataset's card."""

    index: str
    """SHA-256 of authenticity.json."""
    classes: Mapping[str, PrivacyTally]
    distances: tuple[float, ...]
    """Percentiles `SHOWN` of the images' distances to their nearest training image."""
    baseline: tuple[float, ...]
    """The same of the training images' distances to their nearest other one."""
    exposure: Exposure
    limit: float | None = None
    """The distance that the gate min_distance requires, at its percentile of the baseline."""
    stands_on: str = ""
    """A sentence on the first percentile of the baseline, and on near-duplicates; empty in manifests of older versions."""
    weakness: str | None = None
    """Why copies may pass the gate; None if there is no known reason."""

    @property
    def before(self) -> float:
        """Share of authentic ones among all images that were compared, those that were rejected among them."""
        seen = sum(found.seen for found in self.classes.values())
        return sum(found.seen_authentic for found in self.classes.values()) / max(seen, 1)

    @property
    def after(self) -> float:
        """Share of authentic ones among the images of the dataset."""
        images = sum(found.images for found in self.classes.values())
        return sum(found.authentic for found in self.classes.values()) / max(images, 1)


def verdicts(plan: Plan, found: Nearest) -> list[Verdict]:
    """Verdicts on images whose nearest training images are known."""
    described, options = plan.authenticity, plan.request.privacy
    assert described is not None and options is not None
    judged = verdicts_of(found, described)
    passed = judged.authentic
    if options.gate == "min_distance":
        passed = judged.distances >= least_distance(described, options.percentile)
    rows = zip(
        judged.distances.tolist(),
        judged.percentiles.tolist(),
        judged.authentic.tolist(),
        passed.tolist(),
        found.embeddings.astype("<f2"),
        strict=True,
    )
    return [
        Verdict(round(distance, 2), int(percentile), authentic, through, base64.b64encode(row.tobytes()).decode())
        for distance, percentile, authentic, through, row in rows
    ]


def least_distance(described: IndexDescription, percentile: float) -> float:
    """The distance at a percentile of the real-to-real baseline."""
    return float(np.interp(percentile, PERCENTILES, described.radii))


def report(plan: Plan, samples: Sequence[tuple[int, Checks]], expose: Expose) -> PrivacyReport:
    """The report of a dataset from its samples' labels and checks; at least one image must be left."""
    described, options = plan.authenticity, plan.request.privacy
    assert described is not None and options is not None
    tallies: dict[str, PrivacyTally] = {}
    for name in plan.request.classes:
        label = plan.class_names.index(name)
        checks = [found for of, found in samples if of == label]
        kept = [found.verdict for found in checks if found.verdict is not None]
        tallies[name] = PrivacyTally(
            images=len(kept),
            seen=sum(found.seen for found in checks),
            seen_authentic=sum(found.authentic for found in checks),
            rejected=sum(found.rejected for found in checks),
            authentic=sum(verdict.authentic for verdict in kept),
            flagged=sum(not verdict.passed for verdict in kept),
        )
    kept = list(_kept(samples))
    distances = np.percentile([verdict.distance for verdict in kept], SHOWN)
    return PrivacyReport(
        index=described.digest,
        classes=tallies,
        distances=tuple(round(float(value), 4) for value in distances),
        baseline=tuple(round(least_distance(described, percentile), 4) for percentile in SHOWN),
        exposure=expose(np.stack([_embedding(verdict) for verdict in kept])),
        limit=round(least_distance(described, options.percentile), 4) if options.gate == "min_distance" else None,
        stands_on=stands_on(described),
        weakness=weakness(described),
    )


def _kept(samples: Sequence[tuple[int, Checks]]) -> Iterator[Verdict]:
    return (found.verdict for _, found in samples if found.verdict is not None)


def _embedding(verdict: Verdict) -> Floats:
    return np.frombuffer(base64.b64decode(verdict.embedding), "<f2").astype(np.float32)
