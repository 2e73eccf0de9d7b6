"""The classifier's part in a dataset: a probability for every image, and other candidates for those it does not accept.

Whether an image is kept depends on its own pixels alone, and the next candidate is the latent of the next counter: so a
filtered dataset is as much a pure function of its request as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dermis.dataset.plan import Plan, latent_index
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
    probability: float | None
    tries: int = 1


@dataclass(frozen=True)
class Tally:
    """How one class came out: images in the dataset, candidates that were drawn for them, and how many of the images the
    classifier gives this class (None where it does not know the class).
    """

    images: int
    drawn: int
    agreeing: int | None

    @property
    def rejected(self) -> int:
        return self.drawn - self.images


def draw(
    plan: Plan, indices: Sequence[int], labels: Sequence[int], synthesize: Synthesize, score: Score | None
) -> list[Draw]:
    """The samples of a batch, in order. `score` is needed where the plan has scores."""
    if not plan.scored:
        return [Draw(image, None) for image in synthesize(indices, labels)]
    if score is None:
        raise ValueError("this plan has scores, so it needs a classifier")
    done: dict[int, Draw] = {}
    waiting = list(range(len(indices)))
    for attempt in range(plan.request.tries):
        candidates = [latent_index(indices[i], attempt) for i in waiting]
        images = synthesize(candidates, [labels[i] for i in waiting])
        grey = images.shape[3] == 1
        probabilities = np.round(score(images.repeat(3, axis=3) if grey else images), _DECIMALS).tolist()
        for i, image, probability in zip(waiting, images, probabilities, strict=True):
            if _accepts(plan, labels[i], probability):
                done[i] = Draw(image, probability, attempt + 1)
        waiting = [i for i in waiting if i not in done]
        if not waiting:
            break
    return [done.get(i, Draw(None, None, plan.request.tries)) for i in range(len(indices))]


def agrees(plan: Plan, label: int, probability: float) -> bool:
    """Whether the classifier gives an image the class that it was drawn for, at the request's threshold."""
    assert plan.classifier is not None
    options = plan.request.classifier
    threshold = plan.classifier.threshold() if options is None else plan.classifier.threshold(options.threshold)
    return plan.classifier.class_at(probability, threshold) == plan.class_names[label]


def tally(plan: Plan, outcomes: Mapping[str, Sequence[tuple[float | None, int]]]) -> dict[str, Tally]:
    """By class, of each sample's probability (None: missing) and number of candidates."""
    assert plan.classifier is not None
    tallies: dict[str, Tally] = {}
    for name, samples in outcomes.items():
        label = plan.class_names.index(name)
        kept = [probability for probability, _ in samples if probability is not None]
        known = name in plan.classifier.class_names
        agreeing = sum(agrees(plan, label, probability) for probability in kept) if known else None
        tallies[name] = Tally(len(kept), sum(tries for _, tries in samples), agreeing)
    return tallies


def _accepts(plan: Plan, label: int, probability: float) -> bool:
    options = plan.request.classifier
    if options is None:
        return True
    within = options.min_probability <= probability <= options.max_probability
    return within and (options.keep == "all" or agrees(plan, label, probability))
