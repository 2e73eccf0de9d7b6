"""Shares of artefacts in the classes of a collection, and a sheet of examples. `dermis.artefacts` detects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.stats import chi2_contingency

from dermis.artefacts import NAMES, Artefacts, wilson_interval
from dermis.imaging import thumbnail


@dataclass(frozen=True)
class Share:
    """Share of the images of one class that show one artefact."""

    artefact: str
    class_name: str
    count: int
    total: int
    share: float
    low: float  # 95 % interval, by Wilson
    high: float
    risk_ratio: float | None  # share of this class divided by the share of all others; None if the latter is 0


@dataclass(frozen=True)
class Association:
    """Association of one artefact with the classes."""

    artefact: str
    cramers_v: float  # 0: independent; 1: the artefact determines the class
    p_value: float  # chi-square test of independence, without continuity correction


@dataclass(frozen=True)
class Summary:
    """Shares and associations of all artefacts."""

    shares: tuple[Share, ...]  # ordered by artefact as in NAMES, then by class name
    associations: tuple[Association, ...]  # one for each artefact of NAMES

    def share(self, artefact: str, class_name: str) -> Share:
        """The share of one artefact in one class.

        Raises:
            KeyError: There is no such artefact or class.
        """
        for entry in self.shares:
            if (entry.artefact, entry.class_name) == (artefact, class_name):
                return entry
        raise KeyError((artefact, class_name))


def summarise(artefacts: Sequence[Artefacts], classes: Sequence[str]) -> Summary:
    """Compute the shares of artefacts in classes, and their association.

    Args:
        artefacts: Scores of each image.
        classes: Class of each image, or another group, such as its source.
    """
    if len(artefacts) != len(classes) or not classes:
        raise ValueError(
            f"{len(artefacts)} images and {len(classes)} classes; give at least one image, and one class for each image"
        )
    names = sorted(set(classes))
    labels = np.array([names.index(name) for name in classes])
    totals = np.bincount(labels, minlength=len(names))
    shares: list[Share] = []
    associations: list[Association] = []
    for artefact in NAMES:
        shows = np.array([artefact in image.present for image in artefacts])
        counts = np.bincount(labels[shows], minlength=len(names))
        for name, count, total in zip(names, counts.tolist(), totals.tolist(), strict=True):
            elsewhere, others = int(counts.sum()) - count, len(classes) - total
            ratio = (count / total) / (elsewhere / others) if elsewhere else None
            low, high = wilson_interval(count, total)
            shares.append(Share(artefact, name, count, total, count / total, low, high, ratio))
        associations.append(_association(artefact, np.stack([counts, totals - counts])))
    return Summary(tuple(shares), tuple(associations))


def _association(artefact: str, table: NDArray[np.int64]) -> Association:
    """Cramer's V = sqrt(chi2 / N) of a table [present or not, classes] (Cramer 1946, section 21.9)."""
    if table.shape[1] < 2 or (table.sum(axis=1) == 0).any():
        return Association(artefact, 0.0, 1.0)
    test = chi2_contingency(table, correction=False)
    return Association(artefact, float((test.statistic / table.sum()) ** 0.5), float(test.pvalue))


def artefact_sheet(
    load: Callable[[int], NDArray[np.uint8]],
    artefacts: Sequence[Artefacts],
    classes: Sequence[str],
    *,
    examples: int = 8,
    size: int = 112,
    seed: int = 0,
) -> NDArray[np.uint8]:
    """Make a labelled contact sheet uint8 [H, W, 3] with a row of random examples for each artefact and class.

    Args:
        load: Loads image i as uint8 [H, W, 3] of any size. Only the examples are loaded.
        artefacts: Scores of each image.
        classes: Class of each image.
        examples: Maximum number of images in a row.
        size: Size of an image in pixels.
        seed: Seed of the random choice.
    """
    random = np.random.default_rng(seed)
    names = sorted(set(classes))
    margin, gap = 128, 4
    width, height = margin + examples * (size + gap), len(NAMES) * len(names) * (size + gap)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    rows = [(artefact, name) for artefact in NAMES for name in names]
    for row, (artefact, name) in enumerate(rows):
        of_class = [i for i, class_name in enumerate(classes) if class_name == name]
        with_artefact = [i for i in of_class if artefact in artefacts[i].present]
        top = row * (size + gap)
        pen.text((4, top + 4), f"{artefact}\n{name}\n{len(with_artefact)} of {len(of_class)}", fill="black")
        selected = sorted(random.permutation(with_artefact)[:examples].tolist())
        for column, i in enumerate(selected):
            sheet.paste(Image.fromarray(thumbnail(load(i), size)), (margin + column * (size + gap), top))
    return np.asarray(sheet)
