"""From latents to the images of a dataset: candidates, until one is accepted by the classifier's filter and the privacy gate.

The filter comes first, and the gate sees what it accepts; each may reject so many candidates of a sample. Whether an image is
kept depends on its own pixels alone, and the next candidate is the latent of the next counter: so a filtered dataset is as
much a pure function of its request as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dermis.dataset.plan import Plan, latent_index
from dermis.dataset.privacy import Checks, Examine, Verdict, verdicts
from dermis.imaging import Images

Synthesize = Callable[[Sequence[int], Sequence[int]], Images]
"""(indices of latents, labels) -> uint8 [N, H, W, 3]."""
Score = Callable[[Images], npt.NDArray[np.float64]]
"""uint8 [N, H, W, 3] -> calibrated probabilities [N] by the bundle's classifier."""

_DECIMALS = 6  # as written; what is kept is decided by what is written


@dataclass(frozen=True)
class Draw:
    """What became of one sample: its image after `tries` candidates, or none if all were rejected."""

    image: Images | None
    probability: float | None = None
    tries: int = 1
    checks: Checks | None = None
    """What the gate did; None if there is none."""


@dataclass(frozen=True)
class Tally:
    """How one class came out: images in the dataset, candidates that were drawn for them (without those that the privacy
    gate rejected), and how many of the images the classifier gives this class (None where it does not know the class).
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
    """A sample on its way."""

    index: int
    label: int
    tries: int = 0
    seen: int = 0
    authentic: int = 0
    rejected: int = 0
    """By the gate."""


def draw(
    plan: Plan,
    indices: Sequence[int],
    labels: Sequence[int],
    synthesize: Synthesize,
    score: Score | None = None,
    examine: Examine | None = None,
) -> list[Draw]:
    """The samples of a batch, in order. `score` is needed where the plan has scores, `examine` where it has a gate."""
    if plan.scored and score is None:
        raise ValueError("this plan has scores, so it needs a classifier")
    if plan.gated and examine is None:
        raise ValueError("this plan has a gate, so it needs an index")
    samples = [_Sample(index, label) for index, label in zip(indices, labels, strict=True)]
    done: dict[int, Draw] = {}
    while waiting := [sample for sample in samples if sample.index not in done]:
        candidates = [latent_index(sample.index, sample.tries) for sample in waiting]
        images = synthesize(candidates, [sample.label for sample in waiting])
        colour = images.repeat(3, axis=3) if images.shape[3] == 1 else images
        probabilities: list[float | None] = [None] * len(waiting)
        if plan.scored and score is not None:
            probabilities = np.round(score(colour), _DECIMALS).tolist()
        accepted = [place for place, sample in enumerate(waiting) if _accepts(plan, sample.label, probabilities[place])]
        judged: dict[int, Verdict] = {}
        if plan.gated and examine is not None and accepted:
            judged = dict(zip(accepted, verdicts(plan, examine(colour[accepted])), strict=True))
        for place, sample in enumerate(waiting):
            sample.tries += 1
            verdict = judged.get(place)
            if verdict is not None:
                sample.seen += 1
                sample.authentic += verdict.authentic
                sample.rejected += not _stays(plan, verdict)
            if place in accepted and (verdict is None or _stays(plan, verdict)):
                done[sample.index] = Draw(
                    images[place], probabilities[place], sample.tries, _checks(plan, sample, verdict)
                )
            elif _spent(plan, sample):
                done[sample.index] = Draw(None, None, sample.tries, _checks(plan, sample, None))
    return [done[index] for index in indices]


def _stays(plan: Plan, verdict: Verdict) -> bool:
    assert plan.request.privacy is not None
    return verdict.passed or plan.request.privacy.on_reject == "flag"


def _spent(plan: Plan, sample: _Sample) -> bool:
    """Whether the classifier or the gate has rejected as many candidates as it may."""
    most = plan.request.privacy.most if plan.request.privacy is not None else 1
    by_classifier = sample.tries - sample.rejected
    return by_classifier >= plan.request.classifier_tries or (plan.gated and sample.rejected >= most)


def _checks(plan: Plan, sample: _Sample, verdict: Verdict | None) -> Checks | None:
    return Checks(sample.seen, sample.authentic, sample.rejected, verdict) if plan.gated else None


def agrees(plan: Plan, label: int, probability: float) -> bool:
    """Whether the classifier gives an image the class that it was drawn for, at the request's threshold."""
    assert plan.classifier is not None
    options = plan.request.classifier
    threshold = plan.classifier.threshold() if options is None else plan.classifier.threshold(options.threshold)
    return plan.classifier.class_at(probability, threshold) == plan.class_names[label]


def tally(plan: Plan, outcomes: Mapping[str, Sequence[tuple[float | None, int]]]) -> dict[str, Tally]:
    """By class, of each sample's probability (None: missing) and number of candidates, without those that the gate rejected."""
    assert plan.classifier is not None
    tallies: dict[str, Tally] = {}
    for name, samples in outcomes.items():
        label = plan.class_names.index(name)
        kept = [probability for probability, _ in samples if probability is not None]
        known = name in plan.classifier.class_names
        agreeing = sum(agrees(plan, label, probability) for probability in kept) if known else None
        tallies[name] = Tally(len(kept), sum(tries for _, tries in samples), agreeing)
    return tallies


def _accepts(plan: Plan, label: int, probability: float | None) -> bool:
    """By the classifier's filter."""
    options = plan.request.classifier
    if options is None or probability is None:
        return True
    within = options.min_probability <= probability <= options.max_probability
    return within and (options.keep == "all" or agrees(plan, label, probability))
