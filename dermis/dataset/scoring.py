"""Generate candidates of each sample until the classifier's filter and the privacy gate accept one.

The filter is applied first, and the gate checks what it accepts. Each of them has a limit of candidates that it can reject
per sample. Whether an image is kept depends on its own pixels alone, and the latent of the next candidate has a fixed
index. So a filtered dataset is a pure function of its request as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dermis.authenticity.verdict import COPY
from dermis.dataset.plan import DatasetPlan, latent_index
from dermis.dataset.privacy import Checks, Examine, GateVerdict, verdicts
from dermis.imaging import Images, as_rgb

Synthesize = Callable[[Sequence[int], Sequence[int]], Images]
"""(indices of latents [N], labels [N]) -> images, uint8 [N, H, W, 3]."""
Score = Callable[[Images], npt.NDArray[np.float64]]
"""Images, uint8 [N, H, W, 3] -> calibrated probabilities [N] by the bundle's classifier."""

_DECIMALS = 6  # decimals of a written probability; the filter decides by the rounded value


@dataclass(frozen=True)
class SampleResult:
    """Result of one sample: the image after `tries` candidates, or None if all were rejected."""

    image: Images | None
    probability: float | None = None
    tries: int = 1
    checks: Checks | None = None
    """Results of the gate; None without a gate."""


@dataclass(frozen=True)
class ClassifierTally:
    """Result of the classifier for one class.

    Attributes:
        images: Images in the dataset.
        drawn: Candidates that were generated for them, without those that the privacy gate rejected.
        agreeing: Images to which the classifier gives this class; None if it does not know the class.
    """

    images: int
    drawn: int
    agreeing: int | None

    @property
    def rejected(self) -> int:
        """Candidates that the classifier's filter rejected."""
        return self.drawn - self.images


@dataclass
class _Sample:
    """A sample whose candidates are being generated."""

    index: int
    label: int
    tries: int = 0
    seen: int = 0
    authentic: int = 0
    rejected: int = 0
    """Candidates that the gate rejected."""
    copies: int = 0
    """Candidates that the copy detector took for copies."""


def generate_samples(
    plan: DatasetPlan,
    indices: Sequence[int],
    labels: Sequence[int],
    synthesize: Synthesize,
    score: Score | None = None,
    examine: Examine | None = None,
) -> list[SampleResult]:
    """Generate the samples of a batch.

    Args:
        plan: The plan of the dataset.
        indices: Indices of the samples.
        labels: Their labels.
        synthesize: Generates images from indices of latents and labels.
        score: Scores images; required if `plan.scored`.
        examine: Compares images with the training images; required if `plan.gated`.

    Returns:
        The results, in the order of `indices`.
    """
    if plan.scored and score is None:
        raise ValueError("this plan has scores, so it needs a classifier")
    if plan.gated and examine is None:
        raise ValueError("this plan has a gate, so it needs an index")
    samples = [_Sample(index, label) for index, label in zip(indices, labels, strict=True)]
    done: dict[int, SampleResult] = {}
    while pending := [sample for sample in samples if sample.index not in done]:
        candidates = [latent_index(sample.index, sample.tries) for sample in pending]
        images = synthesize(candidates, [sample.label for sample in pending])
        colour = as_rgb(images)
        probabilities: list[float | None] = [None] * len(pending)
        if plan.scored and score is not None:
            probabilities = np.round(score(colour), _DECIMALS).tolist()
        accepted = [
            position for position, sample in enumerate(pending) if _accepts(plan, sample.label, probabilities[position])
        ]
        verdict_at: dict[int, GateVerdict] = {}
        if plan.gated and examine is not None and accepted:
            verdict_at = dict(zip(accepted, verdicts(plan, examine(colour[accepted])), strict=True))
        for position, sample in enumerate(pending):
            sample.tries += 1
            verdict = verdict_at.get(position)
            if verdict is not None:
                sample.seen += 1
                sample.authentic += verdict.authentic
                sample.rejected += not _is_kept(plan, verdict)
                sample.copies += verdict.copy_score is not None and verdict.copy_score >= COPY
            if position in accepted and (verdict is None or _is_kept(plan, verdict)):
                done[sample.index] = SampleResult(
                    images[position], probabilities[position], sample.tries, _checks(plan, sample, verdict)
                )
            elif _is_exhausted(plan, sample):
                done[sample.index] = SampleResult(None, None, sample.tries, _checks(plan, sample, None))
    return [done[index] for index in indices]


def _is_kept(plan: DatasetPlan, verdict: GateVerdict) -> bool:
    assert plan.request.privacy is not None
    return verdict.passed or plan.request.privacy.on_reject == "flag"


def _is_exhausted(plan: DatasetPlan, sample: _Sample) -> bool:
    """Whether the classifier or the gate has reached its limit of rejected candidates."""
    most = plan.request.privacy.most if plan.request.privacy is not None else 1
    by_classifier = sample.tries - sample.rejected
    return by_classifier >= plan.request.classifier_tries or (plan.gated and sample.rejected >= most)


def _checks(plan: DatasetPlan, sample: _Sample, verdict: GateVerdict | None) -> Checks | None:
    return Checks(sample.seen, sample.authentic, sample.rejected, verdict, sample.copies) if plan.gated else None


def agrees(plan: DatasetPlan, label: int, probability: float) -> bool:
    """Whether the classifier gives an image the class that was requested, at the threshold of the request."""
    assert plan.classifier is not None
    options = plan.request.classifier
    threshold = plan.classifier.threshold() if options is None else plan.classifier.threshold(options.threshold)
    return plan.classifier.class_at(probability, threshold) == plan.class_names[label]


def tally(plan: DatasetPlan, outcomes: Iterable[tuple[int, float | None, int]]) -> dict[str, ClassifierTally]:
    """Count the results by class.

    Args:
        plan: The plan of the dataset.
        outcomes: Label and probability of each sample (None if it is missing), and its number of candidates without those
            that the gate rejected.
    """
    assert plan.classifier is not None
    known = set(plan.classifier.class_names)
    counts = {name: Counter[str]() for name in plan.request.classes}
    for label, probability, tries in outcomes:
        name = plan.class_names[label]
        counts[name]["drawn"] += tries
        if probability is not None:
            counts[name]["images"] += 1
            counts[name]["agreeing"] += name in known and agrees(plan, label, probability)
    return {
        name: ClassifierTally(count["images"], count["drawn"], count["agreeing"] if name in known else None)
        for name, count in counts.items()
    }


def _accepts(plan: DatasetPlan, label: int, probability: float | None) -> bool:
    """Whether the classifier's filter accepts an image."""
    options = plan.request.classifier
    if options is None or probability is None:
        return True
    within = options.min_probability <= probability <= options.max_probability
    return within and (options.keep == "all" or agrees(plan, label, probability))
