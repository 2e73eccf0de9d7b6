"""Detect artefacts in dermoscopic images: the black frame of the dermatoscope, rulers, hair, ink.

The detectors are simple and have documented thresholds. They measure the bias of a collection and do not judge one image.
docs/artefacts.md reports how good they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("frame", "ruler", "hair", "ink")
# Set by eye on the example collection (docs/artefacts.md).
THRESHOLDS = {"frame": 0.003, "ruler": 0.6, "hair": 0.02, "ink": 0.005}
SIDE = 224  # px of the shorter side to which images are resized; all lengths below are in these pixels

_SHORT_ROW, _LONG_ROW, _ROW_HEIGHT = 60, 132, 7  # px of the rows in which marks of a ruler are looked for
_FAINT = 2  # mean difference in grey levels of a window of a row; windows below it show faint texture

_ANGLES = tuple(np.deg2rad(np.arange(0, 90, 7.5)))  # of rulers, with those at a right angle to them

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Pixels = NDArray[np.uint8]
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


def artefacts_of(rgb: Pixels, frame: Mask) -> Artefacts:
    """Compute the scores of an image of the `working_size` whose `frame_mask` is known."""
    fine, wide = _thin_dark_lines(rgb[..., 0])
    return Artefacts(
        frame=float(frame.mean()),
        ruler=_ruler(fine),
        hair=float(_hair(wide > 12).mean()),
        ink=float(_ink(rgb).mean()),
    )


def frame_share(image: NDArray[np.uint8]) -> float:
    """Compute `detect_artefacts(image).frame` only, ten times as fast."""
    return float(frame_mask(working_size(image)).mean())


def working_size(image: NDArray[np.uint8]) -> Pixels:
    """Resize an RGB image so that its shorter side is `SIDE` px."""
    height, width = image.shape[:2]
    scale = SIDE / min(height, width)
    size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def _thin_dark_lines(red: Pixels) -> tuple[Pixels, Pixels]:
    """Black-hat transform of the red channel, [H, W]: darkness relative to the surroundings. Structures under 7 and 9 px.

    After DullRazor (Lee et al., Comput. Biol. Med. 27, 1997). Only the red channel is used: hair and print are dark in it,
    while blood vessels are nearly invisible and the pigment network is faint.
    """
    # the maximum of the complement is the complement of the minimum
    fine, wide = (~_maximum(~_maximum(red, size), size) - red for size in (7, 9))
    return fine, wide


def _maximum(values: Pixels, size: int) -> Pixels:
    """`scipy.ndimage.maximum_filter` with an odd size, ten times as fast."""
    values = np.pad(values, size // 2)  # with 0, which changes no maximum
    for _ in range(2):
        length = 1
        while length < size:
            step = min(length, size - length)
            values = np.maximum(values[:-step], values[step:])  # the maxima of length + step pixels
            length += step
        values = np.ascontiguousarray(values.T)
    return values


# --- Frame


def frame_mask(rgb: Pixels) -> Mask:
    """Regions that include a corner of the image and are darker than 35 % of its bright part in all channels."""
    from scipy import ndimage

    brightest = ndimage.uniform_filter(_brightest(rgb).astype(np.float32), 3)
    dark = brightest < 0.35 * np.percentile(brightest, 80)
    corners = np.ix_((0, -1), (0, -1))
    if not dark[corners].any():
        return np.zeros_like(dark)
    regions, number = ndimage.label(dark)
    with_corner = np.zeros(number + 1, np.bool_)
    with_corner[regions[corners]] = True
    frame: Mask = with_corner[regions] & dark
    return frame


def _brightest(channels: NDArray[Any]) -> NDArray[Any]:
    """Compute `channels.max(axis=2)`, many times as fast."""
    brightest: NDArray[Any] = np.maximum.reduce([channels[..., k] for k in range(channels.shape[2])])
    return brightest


# --- Ruler


def _ruler(lines: Pixels) -> float:
    """Regularity of the most regular row of marks in any of 24 directions.

    A row of tick marks, summed across the row, is a periodic signal: its autocorrelation is high at one, two and three
    pitches and low at half a pitch. Pitches of 3 to 22 px, rows of at least five marks.
    """
    marks = np.clip(lines, 8, 58).astype(np.float32) - 8
    marks[[0, -1]] = marks[:, [0, -1]] = 0
    if marks.sum() <= _SHORT_ROW * _ROW_HEIGHT * _FAINT:  # too few for a single window of a row
        return 0.0
    found = [_averaged_rows(turned) for rotated in _rotations(marks) for turned in (rotated, np.rot90(rotated))]
    rows = np.full((sum(map(len, found)), max(each.shape[1] for each in found)), -np.inf, np.float32)
    first = 0
    for each in found:  # no window that leaves its row has a mean above `_FAINT`
        rows[first : first + len(each), : each.shape[1]] = each
        first += len(each)
    return max(_regularity(rows, _SHORT_ROW, np.arange(3, 10)), _regularity(rows, _LONG_ROW, np.arange(8, 22)))


def _rotations(picture: Floats) -> list[Floats]:
    """`scipy.ndimage.rotate` by 0, 7.5, ... 82.5 degrees with linear interpolation. The border of the picture must be 0."""
    if picture.shape != (SIDE, SIDE):
        return [_rotated(Image.fromarray(picture), angle) for angle in _ANGLES]
    sizes, matrix = _square_rotations()
    marked = np.flatnonzero(picture)
    values = matrix[:, marked] @ picture.ravel()[marked]
    parts = np.split(values, np.cumsum([height * width for height, width in sizes])[:-1])
    return [part.reshape(size) for part, size in zip(parts, sizes, strict=True)]


@cache
def _square_rotations() -> tuple[list[tuple[int, int]], Any]:
    """Sizes of the results of `_rotated`, and the matrix from a square picture to all of them: 21 MB, computed in 0.06 s.

    Its product with a picture is five times as fast as Pillow, and generated images are square.
    """
    from scipy import sparse

    sizes, result, source, weight = [], [], [], []
    first = 0
    for angle in _ANGLES:
        (height, width), rotation, (y, x) = _rotation(SIDE, SIDE, angle)
        places = np.mgrid[:height, :width].reshape(2, -1)
        below, right = rotation @ places + [[y], [x]]
        inside = np.flatnonzero((below >= 0) & (below < SIDE - 1) & (right >= 0) & (right < SIDE - 1))
        below, right = below[inside], right[inside]
        top, left = below.astype(np.int32), right.astype(np.int32)
        below -= top
        right -= left
        for dy, vertical in enumerate((1 - below, below)):
            for dx, horizontal in enumerate((1 - right, right)):
                result.append((first + inside).astype(np.int32))
                source.append((top + dy) * SIDE + left + dx)
                weight.append((vertical * horizontal).astype(np.float32))
        sizes.append((height, width))
        first += height * width
    entries = np.concatenate(weight), (np.concatenate(result), np.concatenate(source))
    matrix = sparse.csc_array(entries, shape=(first, SIDE * SIDE))
    matrix.eliminate_zeros()
    return sizes, matrix


def _rotated(picture: Image.Image, angle: float) -> Floats:
    """One of the `_rotations`, by Pillow."""
    (height, width), rotation, (y, x) = _rotation(picture.height, picture.width, angle)
    y, x = np.array([y, x]) + 0.5 - rotation @ (0.5, 0.5)  # Pillow: pixels have corners
    matrix = (rotation[1, 1], rotation[1, 0], x, rotation[0, 1], rotation[0, 0], y)
    return np.asarray(
        picture.transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR), np.float32
    )


def _rotation(height: int, width: int, angle: float) -> tuple[tuple[int, int], Doubles, Doubles]:
    """Size of a rotated picture, and the rotation and shift from a place [y, x] in it to one in the picture."""
    cosine, sine = np.cos(angle), np.sin(angle)
    rotation = np.array([[cosine, sine], [-sine, cosine]])
    corners = rotation @ np.array([[0, 0, height, height], [0, width, 0, width]])
    size = (np.ptp(corners, axis=1) + 0.5).astype(int)
    shift = (np.array([height, width]) - 1) / 2 - rotation @ ((size - 1) / 2)
    return (int(size[0]), int(size[1])), rotation, shift


def _averaged_rows(picture: Floats) -> Floats:
    """Means over `_ROW_HEIGHT` rows around every third row, of those that are dark enough for a window above `_FAINT`.

    The picture is mirrored at its border.
    """
    half = _ROW_HEIGHT // 2
    height = len(picture)
    mirrored = np.concatenate([np.arange(half)[::-1], np.arange(height), np.arange(height - half, height)[::-1]])
    rows = np.lib.stride_tricks.sliding_window_view(mirrored, _ROW_HEIGHT)[::3]
    least = 0.999 * _SHORT_ROW * _FAINT * _ROW_HEIGHT  # the sum of such a window, less errors of rounding
    rows = rows[picture.sum(axis=1)[rows].sum(axis=1) > least]
    if len(rows) == 0:
        return np.zeros((0, picture.shape[1]), np.float32)
    picture = np.ascontiguousarray(picture)
    total: Floats = picture[rows[:, 0]]
    for offset in range(1, _ROW_HEIGHT):
        total += picture[rows[:, offset]]
    total /= _ROW_HEIGHT
    return total


def _regularity(rows: Floats, window: int, pitches: NDArray[np.int64]) -> float:
    """The most regular of all windows of the rows [n, W], in [0, 1]."""
    from scipy import fft

    windows = np.lib.stride_tricks.sliding_window_view(rows, window, axis=1)[:, :: window // 3]
    windows = windows[windows.mean(axis=2) > _FAINT]
    windows -= windows.mean(axis=1, keepdims=True)
    variance = (windows**2).mean(axis=1)
    windows, variance = windows[variance > 4], variance[variance > 4]
    if len(windows) == 0:
        return 0.0
    lags = 3 * int(pitches[-1]) + 1
    size = fft.next_fast_len(window + lags - 1, real=True)
    spectrum = np.abs(fft.rfft(windows, size, axis=1)) ** 2
    correlation = fft.irfft(spectrum, size, axis=1)[:, :lags] / (window - np.arange(lags)) / variance[:, None]
    repeated = np.minimum.reduce([correlation[:, times * pitches] for times in (1, 2, 3)])
    between = np.minimum(correlation[:, pitches // 2], correlation[:, (pitches + 1) // 2])
    regular = np.minimum(repeated, correlation[:, pitches] - between)
    return float(np.clip(regular.max(), 0, 1))


# --- Hair


def _hair(dark: Mask) -> Mask:
    """Pixels on straight runs of 31 px, in any of 16 directions, that are at least 85 % dark and isolated.

    A run is isolated if at most 35 % of the parallel runs 5 px to either side is dark. This excludes networks and other
    texture, as does the condition that connected runs extend over at least 40 px.
    """
    from scipy import ndimage

    dark[:3] = dark[-3:] = dark[:, :3] = dark[:, -3:] = False
    half, aside = 15, 5
    border = half + aside + 1
    height, width = dark.shape
    padded = np.pad(dark, border)
    counts, hair = np.zeros_like(padded, np.uint8), np.zeros_like(padded)
    line = padded.shape[1]
    first = half * (line + 1)
    # one long array is added faster than many short rows; what it counts in the borders is not used
    flat, total = padded.view(np.uint8).ravel(), counts.ravel()[first:-first]

    def at(dy: int, dx: int) -> tuple[slice, slice]:
        return slice(border + dy, border + dy + height), slice(border + dx, border + dx + width)

    for angle in np.arange(16) * np.pi / 16:
        run = [round(s * np.sin(angle)) * line + round(s * np.cos(angle)) for s in range(-half, half + 1)]
        total[:] = 0
        for shift in run:
            total += flat[first + shift : first + shift + len(total)]
        on_hair = counts[at(0, 0)] >= 0.85 * len(run)
        if not on_hair.any():
            continue
        y, x = round(aside * np.cos(angle)), round(-aside * np.sin(angle))
        on_hair &= (counts[at(y, x)] <= 0.35 * len(run)) & (counts[at(-y, -x)] <= 0.35 * len(run))
        hair.ravel()[np.add.outer(np.flatnonzero(np.pad(on_hair, border)), run)] = True
    regions, _ = ndimage.label(hair[at(0, 0)], np.ones((3, 3)))
    spans = [np.hypot(*(edge.stop - edge.start for edge in box)) for box in ndimage.find_objects(regions)]
    long: Mask = np.array([False, *(span >= 40 for span in spans)])[regions]
    return long


# --- Ink


def _ink(rgb: Pixels) -> Mask:
    """Bright pixels that are blue, purple or green, both absolutely and relative to the skin, and not part of a lesion.

    Skin is the part of the image between the 70th and the 98th percentile of brightness. A region with more than a fifth of
    its ink in the middle of the image counts as a blue lesion.
    """
    from scipy import ndimage

    levels = rgb.astype(np.int16)
    excess = 10 * np.maximum(levels[..., 1], levels[..., 2]) - 14 * levels[..., 0]
    if excess.max() < 16:  # then no mean of pixels, with 4 added, is over 1.4 times the red; so in most images
        return np.zeros(excess.shape, np.bool_)
    # 4 avoids division by 0, and the unreliable hue of black
    smooth: Floats = ndimage.uniform_filter(rgb.astype(np.float32), (3, 3, 1)) + 4
    red, cool = smooth[..., 0], np.maximum(smooth[..., 1], smooth[..., 2])
    ink: Mask = cool > 1.4 * red
    if not ink.any():
        return ink
    brightness = np.maximum(red, cool)
    low, high = np.percentile(brightness, [70, 98])
    skin = np.median(smooth[(brightness >= low) & (brightness <= high)], axis=0)
    relative_cool = _brightest(smooth[..., 1:] / skin[1:])
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
