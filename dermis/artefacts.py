"""Detect artefacts in dermoscopic images: the black frame of the dermatoscope, rulers, hair, ink.

The detectors are simple and have documented thresholds. They measure the bias of a collection and do not judge one image.
docs/artefacts.md reports how good they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("frame", "ruler", "hair", "ink")
# Set by eye on the example collection (docs/artefacts.md).
THRESHOLDS = {"frame": 0.003, "ruler": 0.6, "hair": 0.02, "ink": 0.005}
SIDE = 224  # px of the shorter side to which images are resized; all lengths below are in these pixels

_SHORT_ROW, _LONG_ROW, _ROW_HEIGHT = 60, 132, 7  # px of the rows in which marks of a ruler are looked for
_FAINT = 2  # mean difference in grey levels of a window of a row; windows below it show faint texture

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
    rgb = working_size(image)
    return artefacts_of(rgb, frame_mask(rgb))


def artefacts_of(rgb: Floats, frame: Mask) -> Artefacts:
    """Compute the scores of an image of the `working_size` whose `frame_mask` is known."""
    lines = _thin_dark_lines(rgb)
    return Artefacts(
        frame=float(frame.mean()),
        ruler=_ruler(lines[0]),
        hair=float(_hair(lines[1] > 12).mean()),
        ink=float(_ink(rgb).mean()),
    )


def frame_share(image: NDArray[np.uint8]) -> float:
    """Compute `detect_artefacts(image).frame` only, twenty times as fast."""
    return float(frame_mask(working_size(image)).mean())


def working_size(image: NDArray[np.uint8]) -> Floats:
    """Resize an RGB image so that its shorter side is `SIDE` px."""
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), dtype=np.float32)


def _thin_dark_lines(rgb: Floats) -> tuple[Floats, Floats]:
    """Black-hat transform of the red channel, [H, W]: darkness relative to the surroundings. Structures under 7 and 9 px.

    After DullRazor (Lee et al., Comput. Biol. Med. 27, 1997). Only the red channel is used: hair and print are dark in it,
    while blood vessels are nearly invisible and the pigment network is faint.
    """
    from scipy import ndimage

    red = rgb[..., 0]
    fine, wide = (ndimage.grey_closing(red, size=(size, size)) - red for size in (7, 9))
    return fine, wide


# --- Frame


def frame_mask(rgb: Floats) -> Mask:
    """Regions that include a corner of the image and are darker than 35 % of its bright part in all channels."""
    from scipy import ndimage

    brightest = ndimage.uniform_filter(_brightest(rgb), 3)
    regions, _ = ndimage.label(brightest < 0.35 * np.percentile(brightest, 80))
    with_corner = {int(regions[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    frame: Mask = np.isin(regions, list(with_corner))
    return frame


def _brightest(channels: Floats) -> Floats:
    """Compute `channels.max(axis=2)`, six times as fast."""
    brightest: Floats = np.maximum.reduce([channels[..., k] for k in range(channels.shape[2])])
    return brightest


# --- Ruler


def _ruler(lines: Floats) -> float:
    """Regularity of the most regular row of marks in any of 24 directions.

    A row of tick marks, summed across the row, is a periodic signal: its autocorrelation is high at one, two and three
    pitches and low at half a pitch. Pitches of 3 to 22 px, rows of at least five marks.
    """
    marks = np.clip(lines - 8, 0, 50)
    marks[[0, -1]] = marks[:, [0, -1]] = 0
    if marks.sum() <= _SHORT_ROW * _ROW_HEIGHT * _FAINT:  # too few for a single window of a row
        return 0.0
    picture = Image.fromarray(marks)
    best = 0.0
    for angle in np.arange(0, 90, 7.5):
        rotated = _rotated(picture, float(np.deg2rad(angle)))
        for turned in (rotated, np.ascontiguousarray(np.rot90(rotated))):
            rows = _averaged_rows(turned)
            rows = rows[rows.mean(axis=1) * rows.shape[1] > _SHORT_ROW * _FAINT]  # others have no window above it
            for window, pitches in ((_SHORT_ROW, np.arange(3, 10)), (_LONG_ROW, np.arange(8, 22))):
                best = max(best, _regularity(rows, window, pitches))
    return best


def _rotated(picture: Image.Image, angle: float) -> Floats:
    """`scipy.ndimage.rotate` with linear interpolation, ten times as fast. The border of the picture must be 0."""
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[cosine, sine], [-sine, cosine]])  # from a place [y, x] of the result to one of the picture
    shape = np.array([picture.height, picture.width])
    corners = rotation @ np.array([[0, 0, shape[0], shape[0]], [0, shape[1], 0, shape[1]]])
    size = (np.ptp(corners, axis=1) + 0.5).astype(int)
    y, x = (shape - 1) / 2 - rotation @ ((size - 1) / 2) + 0.5 - rotation @ (0.5, 0.5)  # Pillow: pixels have corners
    matrix = (cosine, -sine, x, sine, cosine, y)
    width, height = int(size[1]), int(size[0])
    return np.asarray(
        picture.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR), np.float32
    )


def _averaged_rows(picture: Floats) -> Floats:
    """Means over `_ROW_HEIGHT` rows around every third row; the picture is mirrored at its border."""
    half = _ROW_HEIGHT // 2
    padded = np.pad(picture, ((half, half), (0, 0)), mode="symmetric")
    height = len(picture)
    total = np.zeros_like(picture[::3])
    for offset in range(_ROW_HEIGHT):
        total += padded[offset : offset + height : 3]
    total /= _ROW_HEIGHT
    return total


def _regularity(rows: Floats, window: int, pitches: NDArray[np.int64]) -> float:
    """The most regular of all windows of the rows [n, W], in [0, 1]."""
    from scipy import fft

    windows = np.lib.stride_tricks.sliding_window_view(rows, window, axis=1)[:, :: window // 3].reshape(-1, window)
    windows = windows[windows.mean(axis=1) > _FAINT]
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
    from scipy import ndimage

    dark[:3] = dark[-3:] = dark[:, :3] = dark[:, -3:] = False
    half, aside = 15, 5
    height, width = dark.shape
    border = half + aside + 1
    padded, hair = np.pad(dark, border).astype(np.uint8), np.pad(np.zeros_like(dark), border)

    def at(dy: int, dx: int) -> tuple[slice, slice]:
        return slice(border + dy, border + dy + height), slice(border + dx, border + dx + width)

    for angle in np.arange(16) * np.pi / 16:
        run = [(round(s * np.sin(angle)), round(s * np.cos(angle))) for s in range(-half, half + 1)]

        def count(shift_y: int, shift_x: int, run: Sequence[tuple[int, int]] = run) -> NDArray[np.uint8]:
            total = np.zeros((height, width), np.uint8)
            for dy, dx in run:
                total += padded[at(dy + shift_y, dx + shift_x)]
            return total

        on_hair = count(0, 0) >= 0.85 * len(run)
        if not on_hair.any():
            continue
        y, x = round(aside * np.cos(angle)), round(-aside * np.sin(angle))
        on_hair &= (count(y, x) <= 0.35 * len(run)) & (count(-y, -x) <= 0.35 * len(run))
        if on_hair.any():
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
    from scipy import ndimage

    rgb = ndimage.uniform_filter(rgb, (3, 3, 1)) + 4  # avoids division by 0, and the unreliable hue of black
    red, cool = rgb[..., 0], np.maximum(rgb[..., 1], rgb[..., 2])
    ink = cool > 1.4 * red
    if not ink.any():
        return ink
    brightness = np.maximum(red, cool)
    low, high = np.percentile(brightness, [70, 98])
    skin = np.median(rgb[(brightness >= low) & (brightness <= high)], axis=0)
    relative_cool = _brightest(rgb[..., 1:] / skin[1:])
    ink &= (relative_cool > 1.5 * red / skin[0]) & (relative_cool > 0.6)
    if not ink.any():
        return ink
    regions, number = ndimage.label(ndimage.binary_dilation(ink, iterations=2))
    y, x = np.mgrid[: ink.shape[0], : ink.shape[1]] - np.array(ink.shape).reshape(2, 1, 1) / 2
    middle = np.hypot(y, x) < 0.28 * SIDE
    size = np.bincount(regions[ink], minlength=number + 1)
    central = np.bincount(regions[ink & middle], minlength=number + 1)
    kept: Mask = ink & ((size >= 6) & (central <= 0.2 * size))[regions]
    return kept


# --- Interval


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927)."""
    z = 1.959964
    centre = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * (count * (total - count) / total + z * z / 4) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
