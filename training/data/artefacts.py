"""What is in a dermoscopic image beside skin: the black frame of the dermatoscope, rulers, hair, ink.

Simple detectors with documented thresholds, meant to measure the bias of a collection and not to judge one image.
docs/artefacts.md tells how good they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage
from scipy.stats import chi2_contingency

from dermis.imaging import thumbnail

NAMES = ("frame", "ruler", "hair", "ink")
THRESHOLDS = {"frame": 0.01, "ruler": 0.25, "hair": 0.02, "ink": 0.005}
SIDE = 224  # pixels of the shorter side at which an image is looked at; all lengths below are in these pixels
NEAR_BLACK = 60  # of 255, in the brightest channel


@dataclass(frozen=True)
class Artefacts:
    """Scores in [0, 1] of one image. An artefact counts as found where its score is at least its threshold."""

    frame: float  # share of the image that is near-black and connected to a corner or fills a side
    ruler: float  # tick marks of the longest regular row, over 20
    hair: float  # share of the image under long thin dark lines
    ink: float  # share of the image in marker colours

    @property
    def found(self) -> tuple[str, ...]:
        """Names of the artefacts found, in the order of NAMES."""
        return tuple(name for name in NAMES if getattr(self, name) >= THRESHOLDS[name])


def detect_artefacts(image: NDArray[np.uint8]) -> Artefacts:
    """Scores of one RGB image uint8 [H, W, 3] of any size; it is looked at with its shorter side at 224 px."""
    rgb = _at_working_size(image)
    frame = _frame_mask(rgb)
    return Artefacts(frame=float(frame.mean()), ruler=0.0, hair=0.0, ink=0.0)


def _at_working_size(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), dtype=np.uint8)


def _frame_mask(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Near-black regions that hold a corner of the image, or fill one of its sides."""
    dark = ndimage.uniform_filter(rgb.max(axis=2).astype(np.float32), 3) < NEAR_BLACK
    regions, _ = ndimage.label(dark)
    held = {int(regions[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    mask: NDArray[np.bool_] = np.isin(regions, list(held))
    return mask


@dataclass(frozen=True)
class Share:
    """How many images of one class show one artefact."""

    artefact: str
    class_name: str
    count: int
    total: int
    share: float
    low: float  # Wilson 95 % interval
    high: float
    risk_ratio: float | None  # this class's share over the share in all other classes; None where they have none


@dataclass(frozen=True)
class Association:
    """How closely one artefact goes with the classes."""

    artefact: str
    cramers_v: float  # 0: independent, 1: the artefact tells the class
    p_value: float  # chi-square test of independence, without continuity correction


@dataclass(frozen=True)
class Summary:
    """Shares and associations of all artefacts: what `dermis data inspect` tells."""

    shares: tuple[Share, ...]  # every artefact of NAMES, and for it every class in alphabetical order
    associations: tuple[Association, ...]  # one for every artefact of NAMES

    def share(self, artefact: str, class_name: str) -> Share:
        """The share of one artefact in one class; KeyError if there is none."""
        for entry in self.shares:
            if (entry.artefact, entry.class_name) == (artefact, class_name):
                return entry
        raise KeyError((artefact, class_name))


def summarise(artefacts: Sequence[Artefacts], classes: Sequence[str]) -> Summary:
    """Counts and shares of every artefact in every class, and how closely both go together.

    `classes` names the class of every image; anything else that splits the images (their source, say) does as well.
    """
    if len(artefacts) != len(classes) or not classes:
        raise ValueError(f"{len(artefacts)} images and {len(classes)} classes; need one class an image, and an image")
    names = sorted(set(classes))
    of = np.array([names.index(name) for name in classes])
    totals = np.bincount(of, minlength=len(names))
    shares: list[Share] = []
    associations: list[Association] = []
    for artefact in NAMES:
        found = np.array([artefact in image.found for image in artefacts])
        counts = np.bincount(of[found], minlength=len(names))
        for name, count, total in zip(names, counts.tolist(), totals.tolist(), strict=True):
            elsewhere, others = int(counts.sum()) - count, len(classes) - total
            ratio = (count / total) / (elsewhere / others) if elsewhere else None
            low, high = wilson_interval(count, total)
            shares.append(Share(artefact, name, count, total, count / total, low, high, ratio))
        associations.append(_association(artefact, np.stack([counts, totals - counts])))
    return Summary(tuple(shares), tuple(associations))


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    z = 1.959964
    centre = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * (count * (total - count) / total + z * z / 4) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _association(artefact: str, table: NDArray[np.int64]) -> Association:
    """Cramer's V = sqrt(chi2 / N) of a table [found or not, classes] (Cramer 1946, section 21.9)."""
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
    """A labelled contact sheet, uint8 [H, W, 3]: a row for every artefact and class, up to `examples` images drawn at random.

    `load(i)` gives image i as uint8 [H, W, 3], of any size; only the images shown are loaded.
    """
    random = np.random.default_rng(seed)
    names = sorted(set(classes))
    margin, gap = 128, 4
    width, height = margin + examples * (size + gap), len(NAMES) * len(names) * (size + gap)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    rows = [(artefact, name) for artefact in NAMES for name in names]
    for row, (artefact, name) in enumerate(rows):
        of_class = [i for i, own in enumerate(classes) if own == name]
        having = [i for i in of_class if artefact in artefacts[i].found]
        top = row * (size + gap)
        pen.text((4, top + 4), f"{artefact}\n{name}\n{len(having)} of {len(of_class)}", fill="black")
        shown = sorted(random.permutation(having)[:examples].tolist())
        for column, i in enumerate(shown):
            sheet.paste(Image.fromarray(thumbnail(load(i), size)), (margin + column * (size + gap), top))
    return np.asarray(sheet)
