"""Test whether a classifier uses a concept, by concept activation vectors (TCAV; Kim et al., arXiv 1711.11279) of captum.

A linear model separates the activations in a layer of images that show the concept from those of images that do not. Its
normal, towards the concept, is a concept activation vector (CAV). The TCAV score is the share of input images whose logit of
the positive class grows along the CAV (eq. 2). One CAV means little, because any two sets can be separated in so many
dimensions. So there is a CAV for each of several counter-sets, and as many between two counter-sets (random CAVs). A t-test
compares the scores of both (section 3.2), and Holm's correction accounts for the number of tests.
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
SEPARABLE = 0.7  # least held-out accuracy with which CAVs count as a direction of the concept
APART = 0.1  # least difference of mean scores that counts, because with many CAVs every difference is significant
_BATCH = 16


@dataclass(frozen=True)
class Concept:
    """A concept: images uint8 [n, S, S, 3] that show it, and counter-sets that do not. S is the classifier's size."""

    name: str
    examples: Images
    counter_sets: tuple[Images, ...]


@dataclass(frozen=True)
class ConceptTest:
    """The test of one concept in one layer.

    `scores` are the TCAV scores, 0..1, of the CAVs against the counter-sets, `random` those of the random CAVs. `accuracy` is
    the mean accuracy of the CAVs on the fifth of the images that was held out.
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
        """Mean score less the mean score of the random CAVs."""
        return float(np.mean(self.scores) - np.mean(self.random))

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.accuracy < SEPARABLE:
            return "not separable in this layer"
        if self.p_corrected >= LEVEL or abs(self.difference) < APART:
            return "no effect shown"
        return "raises the probability" if self.difference > 0 else "lowers the probability"


def layer_names(network: TorchClassifier) -> list[str]:
    """Choose layers to test: the two stages before the last one if the network lists its stages, otherwise the last layer.

    The last layer means little: the logit is linear in it, so that the gradient is the same for every image and the score of
    each CAV is 0 or 1.
    """
    feature_info = getattr(network.backbone, "feature_info", None) or []
    stages = [info["module"] for info in feature_info if isinstance(info, dict)]
    return stages[-3:-1] or [LAST]


def tcav(
    network: TorchClassifier, concepts: Sequence[Concept], inputs: Images, layers: Sequence[str], *, seed: int = 0
) -> Iterator[ConceptTest]:
    """Test each concept in each layer.

    Results are the same on one kind of machine with one number of threads. They are not corrected for the number of tests;
    see `corrected`.

    Args:
        network: The classifier.
        concepts: The concepts.
        inputs: uint8 [N, S, S, 3], usually images of the positive class.
        layers: Names of modules in the backbone, or "last".
        seed: Seed of the splits.

    Yields:
        The tests, concept by concept.

    Raises:
        DermisError: A layer is unknown, or captum is not installed.
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
        sets = [concept.examples, *concept.counter_sets]
        tokens = [CaptumConcept(i, f"{number}-{i}", _Batches(images)) for i, images in enumerate(sets)]
        against = [[tokens[0], counter] for counter in tokens[1:]]
        # The score of the first set of each pair is used.
        among = [[tokens[i], tokens[i % len(concept.counter_sets) + 1]] for i in range(1, len(tokens))]
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
            results = interpreter.interpret(x, [*against, *among])
            for layer, module in staged.names.items():
                key = ["-".join(str(token.id) for token in pair) for pair in (*against, *among)]
                scores = [float(results[each][module]["sign_count"][0]) for each in key]
                accuracies = [float(interpreter.cavs[each][module].stats["accuracy"]) for each in key[: len(against)]]
                own, random = scores[: len(against)], scores[len(against) :]
                yield ConceptTest(
                    concept.name,
                    layer,
                    len(concept.examples),
                    float(np.mean(accuracies)),
                    tuple(own),
                    tuple(random),
                    _p_value(own, random),
                )


def corrected(tests: Sequence[ConceptTest]) -> list[ConceptTest]:
    """Apply Holm's step-down correction over all tests (Holm 1979)."""
    order = np.argsort([test.p_value for test in tests], kind="stable")
    p = np.array([test.p_value for test in tests])
    steps = np.maximum.accumulate(np.minimum(1.0, p[order] * (len(tests) - np.arange(len(tests)))))
    values = np.empty(len(tests))
    values[order] = steps
    return [replace(test, p_corrected=float(value)) for test, value in zip(tests, values, strict=True)]


class _Staged(nn.Module):
    """The classifier with its logit as the only output. `names` has the name of the module of each layer, for captum."""

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
        """Compute logits [N]."""
        network = self.network
        return network.logit(network.pooled(self.last(network.maps(images.requires_grad_()))))


class _Batches:
    """Images uint8 [n, S, S, 3] as float batches [b, 3, S, S], which can be iterated several times."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self.images), _BATCH):
            yield _tensor(self.images[start : start + _BATCH])


class _Ridge:
    """Ridge regression on the two labels with captum's interface of a linear model. It has one solution and is fast."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._model: Any = None

    def train_and_eval(self, dataloader: DataLoader[Any], **_: Any) -> dict[str, float]:
        """Fit four fifths of the activations and return the accuracy on the others."""
        from sklearn.linear_model import RidgeClassifier
        from sklearn.model_selection import train_test_split

        parts = list(dataloader)
        x = torch.cat([part[0] for part in parts]).numpy()
        y = torch.cat([part[1] for part in parts]).numpy()
        train, test, train_y, test_y = train_test_split(x, y, test_size=0.2, random_state=self._seed, stratify=y)
        scale = train.std() or 1.0  # one number for all dimensions keeps the direction in the units of the layer
        self._model = RidgeClassifier(alpha=1.0).fit(train / scale, train_y)
        return {"accuracy": float(self._model.score(test / scale, test_y))}

    def weights(self) -> Tensor:
        normal = torch.tensor(self._model.coef_).flatten()
        return torch.stack([-normal, normal])

    def classes(self) -> list[int]:
        return [int(label) for label in self._model.classes_]


def _tensor(images: Images) -> Tensor:
    return torch.tensor(images).permute(0, 3, 1, 2).float()


def _p_value(scores: Sequence[float], random: Sequence[float]) -> float:
    """Return the p-value of a two-sided t-test with unequal variances (Welch); 1 if all scores are equal."""
    a, b = np.array(scores), np.array(random)
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return 1.0 if a[0] == b[0] else 0.0
    p_value: NDArray[np.float64] = stats.ttest_ind(a, b, equal_var=False).pvalue
    return float(p_value)
