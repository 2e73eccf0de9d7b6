"""Detect artefacts in dermoscopic images: the black frame of the dermatoscope, rulers, hair, ink.

The detectors are simple and have documented thresholds. They measure the bias of a collection and do not judge one image.
docs/artefacts.md reports how good they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import fft, ndimage
from scipy.stats import chi2_contingency

from dermis.imaging import thumbnail

NAMES = ("frame", "ruler", "hair", "ink")
# Set by eye on the example collection (docs/artefacts.md).
THRESHOLDS = {"frame": 0.003, "ruler": 0.6, "hair": 0.02, "ink": 0.005}
SIDE = 224  # px of the shorter side to which images are resized; all lengths below are in these pixels

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Artefacts:
    """Scores in [0, 1] of one image. An artefact is present if its score is at least its threshold."""

    frame: float  # share of the image in near-black regions that are connected to a corner
    ruler: float  # regularity of the most regular row of dark marks: the least autocorrelation at 1, 2, 3 pitches
    hair: float  # share of the image under long thin dark lines
    ink: float  # share of the image that is blue, purple or green and not in its middle

    @property
    def present(self) -> tuple[str, ...]:
        """Names of the artefacts whose score reaches the threshold, in the order of NAMES."""
        return tuple(name for name in NAMES if getattr(self, name) >= THRESHOLDS[name])


def detect_artefacts(image: NDArray[np.uint8]) -> Artefacts:
    """Compute the scores of one RGB image uint8 [H, W, 3] of any size, resized so that its shorter side is 224 px.

    Cropping can remove the frame, so pass images as they will be used.
    """
    rgb = _at_working_size(image)
    lines = _thin_dark_lines(rgb)
    return Artefacts(
        frame=float(_frame(rgb).mean()),
        ruler=_ruler(lines[0]),
        hair=float(_hair(lines[1] > 12).mean()),
        ink=float(_ink(rgb).mean()),
    )


def frame_share(image: NDArray[np.uint8]) -> float:
    """Compute `detect_artefacts(image).frame` only, twenty times as fast."""
    return float(_frame(_at_working_size(image)).mean())


def _at_working_size(image: NDArray[np.uint8]) -> Floats:
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), dtype=np.float32)


def _thin_dark_lines(rgb: Floats) -> tuple[Floats, Floats]:
    """Black-hat transform of the red channel, [H, W]: darkness relative to the surroundings. Structures under 7 and 9 px.

    After DullRazor (Lee et al., Comput. Biol. Med. 27, 1997). Only the red channel is used: hair and print are dark in it,
    while blood vessels are nearly invisible and the pigment network is faint.
    """
    red = rgb[..., 0]
    fine, wide = (ndimage.grey_closing(red, size=(size, size)) - red for size in (7, 9))
    return fine, wide


# --- Frame


def _frame(rgb: Floats) -> Mask:
    """Regions that include a corner of the image and are darker than 35 % of its bright part in all channels."""
    brightest = ndimage.uniform_filter(rgb.max(axis=2), 3)
    regions, _ = ndimage.label(brightest < 0.35 * np.percentile(brightest, 80))
    with_corner = {int(regions[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    frame: Mask = np.isin(regions, list(with_corner))
    return frame


# --- Ruler


def _ruler(lines: Floats) -> float:
    """Regularity of the most regular row of marks in any of 24 directions.

    A row of tick marks, summed across the row, is a periodic signal: its autocorrelation is high at one, two and three
    pitches and low at half a pitch. Pitches of 3 to 22 px, rows of at least five marks.
    """
    marks = np.clip(lines - 8, 0, 50)
    marks[[0, -1]] = marks[:, [0, -1]] = 0
    best = 0.0
    for angle in np.arange(0, 180, 7.5):
        rows = ndimage.uniform_filter1d(ndimage.rotate(marks, angle, order=1), 7, axis=0)[::3]
        best = max(best, _regularity(rows, 60, np.arange(3, 10)), _regularity(rows, 132, np.arange(8, 22)))
    return best


def _regularity(rows: Floats, window: int, pitches: NDArray[np.int64]) -> float:
    """The most regular of all windows of the rows [n, W], in [0, 1]."""
    windows = np.lib.stride_tricks.sliding_window_view(rows, window, axis=1)[:, :: window // 3].reshape(-1, window)
    windows = windows[windows.mean(axis=1) > 2]  # mean difference in grey levels; windows below it show faint texture
    if len(windows) == 0:
        return 0.0
    windows = windows - windows.mean(axis=1, keepdims=True)
    variance = (windows**2).mean(axis=1, keepdims=True)
    spectrum = np.abs(fft.rfft(windows, 2 * window, axis=1)) ** 2
    overlap = window - np.arange(window // 2)
    correlation = fft.irfft(spectrum, 2 * window, axis=1)[:, : window // 2] / overlap / np.maximum(variance, 1e-6)
    repeated = np.minimum.reduce([correlation[:, times * pitches] for times in (1, 2, 3)])
    between = np.minimum(correlation[:, pitches // 2], correlation[:, (pitches + 1) // 2])
    regular = np.minimum(repeated, correlation[:, pitches] - between)[variance[:, 0] > 4]
    return float(np.clip(regular.max(initial=0), 0, 1))


# --- Hair


def _hair(dark: Mask) -> Mask:
    """Pixels on straight runs of 31 px, in any of 16 directions, that are at least 85 % dark and isolated.

    A run is isolated if at most 35 % of the parallel runs 5 px to either side is dark. This excludes networks and other
    texture, as does the condition that connected runs extend over at least 40 px.
    """
    dark[:3] = dark[-3:] = dark[:, :3] = dark[:, -3:] = False
    half, aside = 15, 5
    height, width = dark.shape
    border = half + aside + 1
    padded, hair = np.pad(dark, border).astype(np.uint8), np.pad(np.zeros_like(dark), border)

    def at(dy: int, dx: int) -> tuple[slice, slice]:
        return slice(border + dy, border + dy + height), slice(border + dx, border + dx + width)

    for angle in np.arange(16) * np.pi / 16:
        run = [(round(s * np.sin(angle)), round(s * np.cos(angle))) for s in range(-half, half + 1)]
        y, x = round(aside * np.cos(angle)), round(-aside * np.sin(angle))
        along, left, right = np.zeros((3, height, width), np.uint8)
        for dy, dx in run:
            along += padded[at(dy, dx)]
            left += padded[at(dy + y, dx + x)]
            right += padded[at(dy - y, dx - x)]
        on_hair = (along >= 0.85 * len(run)) & (left <= 0.35 * len(run)) & (right <= 0.35 * len(run))
        for dy, dx in run:
            hair[at(dy, dx)] |= on_hair
    regions, _ = ndimage.label(hair[at(0, 0)], np.ones((3, 3)))
    spans = [np.hypot(*(edge.stop - edge.start for edge in box)) for box in ndimage.find_objects(regions)]
    long: Mask = np.array([False, *(span >= 40 for span in spans)])[regions]
    return long


# --- Ink


def _ink(rgb: Floats) -> Mask:
    """Bright pixels that are blue, purple or green, both absolutely and relative to the skin, and not part of a lesion.

    Skin is the part of the image between the 70th and the 98th percentile of brightness. A region with more than a fifth of
    its ink in the middle of the image counts as a blue lesion.
    """
    rgb = ndimage.uniform_filter(rgb, (3, 3, 1)) + 4  # avoids division by 0, and the unreliable hue of black
    brightness = rgb.max(axis=2)
    low, high = np.percentile(brightness, [70, 98])
    skin = np.median(rgb[(brightness >= low) & (brightness <= high)], axis=0)
    red, cool = rgb[..., 0], rgb[..., 1:].max(axis=2)
    relative_cool = (rgb[..., 1:] / skin[1:]).max(axis=2)
    ink = (cool > 1.4 * red) & (relative_cool > 1.5 * red / skin[0]) & (relative_cool > 0.6)
    regions, number = ndimage.label(ndimage.binary_dilation(ink, iterations=2))
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]] - np.array(ink.shape).reshape(2, 1, 1) / 2
    middle = np.hypot(y, x) < 0.28 * SIDE
    size = np.bincount(regions[ink], minlength=number + 1)
    central = np.bincount(regions[ink & middle], minlength=number + 1)
    kept: Mask = ink & ((size >= 6) & (central <= 0.2 * size))[regions]
    return kept


# --- Summary


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


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    z = 1.959964
    centre = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * (count * (total - count) / total + z * z / 4) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


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
