"""Does a classifier use a concept? Testing with concept activation vectors (Kim et al., arXiv 1711.11279), by captum.

A linear model divides a layer's activations of images that show the concept from those of images that do not; its normal,
towards the concept, is a concept activation vector (CAV). The TCAV score is the share of input images whose logit of the
positive class grows along the CAV (eq. 2). One CAV says little: any two sets can be divided in so many dimensions. So
there is one for each of several counter-sets, and as many between counter-sets alone, where there is nothing to find; a
t-test tells whether the scores of both differ (section 3.2), and Holm's correction allows for the number of tests.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from dermis.errors import DermisError, install_command
from dermis.imaging import Images

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from dermis.classifier.torch_network import TorchClassifier

LAST = "last"
LEVEL = 0.05
SEPARABLE = 0.7  # held-out accuracy of the CAVs, below which they are no direction of the concept
APART = 0.1  # least difference of mean scores that counts: enough CAVs make any difference significant
_BATCH = 16


@dataclass(frozen=True)
class Concept:
    """Images uint8 [n, S, S, 3] that show something, and counter-sets like them that do not; S is the classifier's size."""

    name: str
    shown: Images
    counters: tuple[Images, ...]


@dataclass(frozen=True)
class ConceptTest:
    """Of one concept in one layer. scores, random: TCAV scores 0..1 of the CAVs against the counter-sets, and of those
    between counter-sets; accuracy: mean of the CAVs on the fifth of the images that they were not fitted to.
    """

    concept: str
    layer: str
    images: int
    accuracy: float
    scores: tuple[float, ...]
    random: tuple[float, ...]
    p_value: float
    p_corrected: float = 1.0

    @property
    def difference(self) -> float:
        """Mean score less that of the random CAVs."""
        return float(np.mean(self.scores) - np.mean(self.random))

    @property
    def verdict(self) -> str:
        """In words, for people who know no p-values."""
        if self.accuracy < SEPARABLE:
            return "no direction of this layer"
        if self.p_corrected >= LEVEL or abs(self.difference) < APART:
            return "no effect shown"
        return "speaks for" if self.difference > 0 else "speaks against"


def layer_names(network: TorchClassifier) -> list[str]:
    """Layers to look at: the two stages before the last one, where the network tells its stages, else the last layer.

    The last layer itself says little: the logit is linear in it, its gradient the same for every image, and so each CAV's
    score 0 or 1.
    """
    told = getattr(network.backbone, "feature_info", None) or []
    stages = [info["module"] for info in told if isinstance(info, dict)]
    return stages[-3:-1] or [LAST]


def tcav(
    network: TorchClassifier, concepts: Sequence[Concept], inputs: Images, layers: Sequence[str], *, seed: int = 0
) -> Iterator[ConceptTest]:
    """A test for each concept in each layer, in this order; corrected ones are for `corrected` to make.

    inputs uint8 [N, S, S, 3], usually images of the positive class; layers: names of modules in the backbone, or "last".
    The same on one kind of machine with one number of threads. DermisError if a layer is unknown or captum is missing.
    """
    try:
        from captum.attr import LayerGradientXActivation
        from captum.concept import TCAV
        from captum.concept import Concept as CaptumConcept
    except ImportError as error:
        raise DermisError(f"TCAV needs captum ({error}): {install_command('explain')}") from error
    staged = _Staged(network, layers)
    x = _tensor(inputs)
    for number, concept in enumerate(concepts):
        sets = [concept.shown, *concept.counters]
        tokens = [CaptumConcept(i, f"{number}-{i}", _Batches(images)) for i, images in enumerate(sets)]
        against = [[tokens[0], counter] for counter in tokens[1:]]
        # The first of each pair is the one whose score is read.
        among = [[tokens[i], tokens[i % len(concept.counters) + 1]] for i in range(1, len(tokens))]
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            interpreter = TCAV(
                staged,
                list(staged.names.values()),
                model_id="classifier",
                classifier=_Ridge(seed),
                layer_attr_method=LayerGradientXActivation(staged, None, multiply_by_inputs=False),
                save_path=folder,
            )
            found = interpreter.interpret(x, [*against, *among])
            for layer, module in staged.names.items():
                key = ["-".join(str(token.id) for token in pair) for pair in (*against, *among)]
                scores = [float(found[each][module]["sign_count"][0]) for each in key]
                accuracies = [float(interpreter.cavs[each][module].stats["accuracy"]) for each in key[: len(against)]]
                own, random = scores[: len(against)], scores[len(against) :]
                yield ConceptTest(
                    concept.name,
                    layer,
                    len(concept.shown),
                    float(np.mean(accuracies)),
                    tuple(own),
                    tuple(random),
                    _p_value(own, random),
                )


def corrected(tests: Sequence[ConceptTest]) -> list[ConceptTest]:
    """The tests with Holm's step-down correction over all of them (Holm 1979)."""
    order = np.argsort([test.p_value for test in tests], kind="stable")
    p = np.array([test.p_value for test in tests])
    steps = np.maximum.accumulate(np.minimum(1.0, p[order] * (len(tests) - np.arange(len(tests)))))
    values = np.empty(len(tests))
    values[order] = steps
    return [replace(test, p_corrected=float(value)) for test, value in zip(tests, values, strict=True)]


class _Staged(nn.Module):
    """The classifier's logit alone, with its layers under names that captum finds. `names`: module by layer."""

    def __init__(self, network: TorchClassifier, layers: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.last = nn.Identity()
        known = dict(network.backbone.named_modules())
        self.names: dict[str, str] = {}
        for layer in layers:
            if layer != LAST and (layer not in known or not layer):
                raise DermisError(f"layer: {layer!r} is none of this network's modules; {LAST!r} is the last one")
            self.names[layer] = LAST if layer == LAST else f"network.backbone.{layer}"

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N]."""
        network = self.network
        return network.logit(network.pooled(self.last(network.maps(images.requires_grad_()))))


class _Batches:
    """Images uint8 [n, S, S, 3] as float batches [b, 3, S, S], as often as they are asked for."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.images), _BATCH):
            yield _tensor(self.images[start : start + _BATCH])


class _Ridge:
    """captum's interface of a linear model: ridge regression on the two labels, which has one solution and is fast."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._model: Any = None

    def train_and_eval(self, dataloader: DataLoader[Any], **_: Any) -> dict[str, float]:
        """Fit four fifths of the activations; the accuracy on the others."""
        from sklearn.linear_model import RidgeClassifier
        from sklearn.model_selection import train_test_split

        parts = list(dataloader)
        x = torch.cat([part[0] for part in parts]).numpy()
        y = torch.cat([part[1] for part in parts]).numpy()
        learn, held, learn_y, held_y = train_test_split(x, y, test_size=0.2, random_state=self._seed, stratify=y)
        scale = learn.std() or 1.0  # one number for all: the direction stays in the layer's own units
        self._model = RidgeClassifier(alpha=1.0).fit(learn / scale, learn_y)
        return {"accuracy": float(self._model.score(held / scale, held_y))}

    def weights(self) -> Tensor:
        normal = torch.tensor(self._model.coef_).flatten()
        return torch.stack([-normal, normal])

    def classes(self) -> list[int]:
        return [int(label) for label in self._model.classes_]


def _tensor(images: Images) -> Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2).float()


def _p_value(scores: Sequence[float], random: Sequence[float]) -> float:
    """Of a two-sided t-test with unequal variances (Welch); 1 if nothing varies and the means are equal."""
    a, b = np.array(scores), np.array(random)
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return 1.0 if a[0] == b[0] else 0.0
    found: NDArray[np.float64] = stats.ttest_ind(a, b, equal_var=False).pvalue
    return float(found)
