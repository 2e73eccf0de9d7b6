"""The gate of a dataset: a condition on the distance of every image to the generator's training images.

Whether an image passes depends on its own pixels alone, so a gated dataset is a pure function of its request as well. Only
rounded distances are written, and never to which training image they are.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.attack import Exposure
from dermis.authenticity.index import Floats, Nearest
from dermis.authenticity.verdict import Verdicts, baseline_problem, baseline_sentence, verdicts_of
from dermis.bundle.index import PERCENTILES, IndexDescription
from dermis.dataset.plan import DatasetPlan
from dermis.dataset.request import GateOptions
from dermis.imaging import Images

if TYPE_CHECKING:
    from dermis.authenticity.checker import Checker

Examine = Callable[[Images], Nearest]
"""Images, uint8 [N, H, W, 3] -> nearest training images by the bundle's index."""
Expose = Callable[[Iterable[Floats]], Exposure]
"""Embeddings of a whole dataset in the space of the index, in pieces [n, dim] -> what they disclose of the training set."""

SHOWN = (1, 5, 25, 50, 75, 95)
"""Percentiles of the nearest distances in the report of a dataset."""


@dataclass(frozen=True)
class GateVerdict:
    """Result of the comparison of one image with the training images."""

    distance: float
    """Distance to the nearest training image, with two decimals."""
    percentile: int
    """0..100: percentage of training images whose radius is smaller than `distance`."""
    authentic: bool
    passed: bool
    """Whether the image meets the condition of the gate."""
    copy_score: float | None = None
    """Score of the copy detector; from 1 on the image is a copy. None without a detector."""
    embedding: str = ""
    """float16 [dim] in the space of the index, base64. It is removed when the report on the dataset is written."""


@dataclass(frozen=True)
class Checks:
    """Results of the gate for one sample: candidates that it checked, authentic ones, rejected ones, and copies."""

    seen: int
    authentic: int
    rejected: int
    verdict: GateVerdict | None
    """The verdict on the image in the dataset; None if the sample is missing."""
    copies: int = 0
    """Candidates that the copy detector took for copies."""


@dataclass(frozen=True)
class PrivacyTally:
    """Results of one class.

    Attributes:
        images: Images in the dataset.
        seen: Candidates that were compared with the training images.
        seen_authentic: Authentic ones of these candidates.
        rejected: Candidates that the gate rejected.
        authentic: Authentic images in the dataset.
        flagged: Images in the dataset that do not meet the condition.
        copies: Candidates that the copy detector took for copies of training images; None if there was no detector.
    """

    images: int
    seen: int
    seen_authentic: int
    rejected: int
    authentic: int
    flagged: int
    copies: int | None = None


@dataclass(frozen=True)
class PrivacyReport:
    """Results of the comparison with the training images, for manifest.json and the dataset's card."""

    index: str
    """SHA-256 of authenticity.json."""
    classes: Mapping[str, PrivacyTally]
    distances: tuple[float, ...]
    """Percentiles `SHOWN` of the images' distances to their nearest training image."""
    baseline: tuple[float, ...]
    """The same percentiles of the radii of the training images."""
    exposure: Exposure
    limit: float | None = None
    """The distance that the gate min_distance requires; None for the gate authentic."""
    stands_on: str = ""
    """A sentence on the first percentile of the baseline, and on near-duplicates; empty in manifests of older versions."""
    weakness: str | None = None
    """Why copies can pass the gate; None if no reason is known."""

    @property
    def authentic_share_of_candidates(self) -> float:
        """Share of authentic images among all that were compared, including rejected ones."""
        seen = sum(class_tally.seen for class_tally in self.classes.values())
        return sum(class_tally.seen_authentic for class_tally in self.classes.values()) / max(seen, 1)

    @property
    def authentic_share_of_images(self) -> float:
        """Share of authentic images in the dataset."""
        images = sum(class_tally.images for class_tally in self.classes.values())
        return sum(class_tally.authentic for class_tally in self.classes.values()) / max(images, 1)


def verdicts(plan: DatasetPlan, nearest: Nearest) -> list[GateVerdict]:
    """Return the verdicts on images whose nearest training images are known."""
    index, options = plan.authenticity, plan.request.privacy
    assert index is not None and options is not None
    compared = verdicts_of(nearest, index)
    results = _passed(compared, index, options)
    scores: list[float | None] = [None] * len(results)
    if options.detect_copies and compared.copies is not None and nearest.copy_scores is not None:
        scores = [round(float(score), 3) for score in nearest.copy_scores]
    rows = zip(
        compared.distances.tolist(),
        compared.percentiles.tolist(),
        compared.authentic.tolist(),
        results.tolist(),
        scores,
        nearest.embeddings.astype("<f2"),
        strict=True,
    )
    return [
        GateVerdict(
            round(distance, 2), int(percentile), authentic, passes, score, base64.b64encode(row.tobytes()).decode()
        )
        for distance, percentile, authentic, passes, score, row in rows
    ]


def pass_gate(checker: Checker, images: Images, options: GateOptions) -> NDArray[np.bool_]:
    """Return whether each image, uint8 [N, H, W, 3], meets the condition of a gate, as bool [N]."""
    index = checker.description
    limit = exact_below_of(index, options)
    nearest = checker.nearest(images, exact_below=limit, detect_copies=options.detect_copies)
    return passed(nearest, index, options)


def passed(nearest: Nearest, index: IndexDescription, options: GateOptions) -> NDArray[np.bool_]:
    """Return whether each image, whose nearest training image is known, meets the condition of a gate, as bool [N]."""
    return _passed(verdicts_of(nearest, index), index, options)


def _passed(compared: Verdicts, index: IndexDescription, options: GateOptions) -> NDArray[np.bool_]:
    results: NDArray[np.bool_] = compared.authentic
    if options.gate == "min_distance":
        results = compared.distances >= distance_at_percentile(index, options.percentile)
    return results & ~compared.copies if options.detect_copies and compared.copies is not None else results


def exact_below(plan: DatasetPlan) -> float:
    """Return the distance up to which the gate needs exact results (`dermis.authenticity.checker.Checker.nearest`)."""
    index, options = plan.authenticity, plan.request.privacy
    return math.inf if index is None or options is None else exact_below_of(index, options)


def exact_below_of(index: IndexDescription, options: GateOptions) -> float:
    """Return the distance up to which a gate needs exact results (`dermis.authenticity.checker.Checker.nearest`)."""
    return distance_at_percentile(index, options.percentile) if options.gate == "min_distance" else math.inf


def examiner(plan: DatasetPlan, checker: Checker) -> Examine:
    """Return the comparison with training images that the gate of a plan needs."""
    return partial(checker.nearest, exact_below=exact_below(plan), detect_copies=plan.detects_copies)


def distance_at_percentile(index: IndexDescription, percentile: float) -> float:
    """Return the distance at a percentile (0..100) of the real-to-real baseline."""
    return float(np.interp(percentile, PERCENTILES, index.radii))


def report(plan: DatasetPlan, samples: Iterable[tuple[int, Checks]], exposure: Exposure) -> PrivacyReport:
    """Make the report of a dataset.

    Args:
        plan: The plan of the dataset.
        samples: Label and checks of every sample. At least one must have an image.
        exposure: What the images disclose of the training set.
    """
    index, options = plan.authenticity, plan.request.privacy
    assert index is not None and options is not None
    counts = {name: Counter[str]() for name in plan.request.classes}
    all_distances = array("d")
    for label, checks in samples:
        count = counts[plan.class_names[label]]
        count.update(seen=checks.seen, seen_authentic=checks.authentic, rejected=checks.rejected, copies=checks.copies)
        verdict = checks.verdict
        if verdict is not None:
            count.update(images=1, authentic=verdict.authentic, flagged=not verdict.passed)
            all_distances.append(verdict.distance)
    tallies = {
        name: PrivacyTally(
            count["images"],
            count["seen"],
            count["seen_authentic"],
            count["rejected"],
            count["authentic"],
            count["flagged"],
            count["copies"] if plan.detects_copies else None,
        )
        for name, count in counts.items()
    }
    distances = np.percentile(np.frombuffer(all_distances, np.float64), SHOWN)
    return PrivacyReport(
        index=index.digest,
        classes=tallies,
        distances=tuple(round(float(value), 4) for value in distances),
        baseline=tuple(round(distance_at_percentile(index, percentile), 4) for percentile in SHOWN),
        exposure=exposure,
        limit=round(distance_at_percentile(index, options.percentile), 4) if options.gate == "min_distance" else None,
        stands_on=baseline_sentence(index),
        weakness=baseline_problem(index),
    )


def has_percentile(images: int, percentile: int) -> bool:
    """Return whether a percentile lies beyond at least one of this number of images, at either end."""
    return images * min(percentile, 100 - percentile) >= 100
