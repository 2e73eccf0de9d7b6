"""The scenarios of the paper's second table: the training images of classifiers, and reported numbers (arXiv 2208.11702)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from training.classifier.run import Configuration

SYNTHETIC_BALANCED, SYNTHETIC_MELANOMA = 55_000, 22_000
PAPER = "arXiv 2208.11702, table 2"


@dataclass(frozen=True)
class Scenario:
    """One row of the table.

    Attributes:
        generator: Name of the generator of the synthetic images; None without them.
        accuracy: Reported accuracy, in %.
        auc: Reported AUC, in %.
    """

    name: str
    title: str
    configuration: Configuration
    generator: str | None
    accuracy: float
    auc: float

    def counts(self, scale: float) -> dict[str, int]:
        """Return the numbers of synthetic images by class: the paper's numbers times `scale`, at least 1."""
        if self.configuration == "real":
            return {}
        if self.configuration == "augmented":
            return {"malignant": max(1, round(SYNTHETIC_MELANOMA * scale))}
        half = max(1, round(SYNTHETIC_BALANCED * scale / 2))
        return {"benign": half, "malignant": half}


BASELINE = "real"
TABLE2 = (
    Scenario(BASELINE, "real baseline", "real", None, 97.8, 98.8),
    Scenario("synth-gan", "synth-GAN", "synthetic", "gan", 94.1, 94.2),
    Scenario("synth-cgan", "synth-cGAN", "synthetic", "cgan", 94.7, 96.7),
    Scenario("synth-cgan-no-color", "synth-cGAN w/o color", "synthetic", "cgan-no-color", 92.6, 92.7),
    Scenario("aug-gan", "aug-GAN", "augmented", "gan", 97.8, 98.6),
    Scenario("aug-cgan", "aug-cGAN", "augmented", "cgan", 97.8, 98.6),
    Scenario("aug-cgan-no-color", "aug-cGAN w/o color", "augmented", "cgan-no-color", 97.9, 98.8),
)
GENERATORS = ("gan", "cgan", "cgan-no-color")
_TABLE1_EXPERIMENTS: Mapping[str, Mapping[str, str]] = {  # generator -> class -> experiment of table 1
    "gan": {"benign": "ben-gan", "malignant": "mal-gan"},
    "cgan": {"": "cgan"},
    "cgan-no-color": {"": "cgan-no-color"},
}


def sources_of_table1(generator: str) -> Mapping[str, str]:
    """Return the folders of the experiments of table 1 whose bundles form a generator, by class ("" for all classes)."""
    return _TABLE1_EXPERIMENTS[generator]
