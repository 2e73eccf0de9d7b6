"""Skin tone of the skin around a lesion as individual typology angle (ITA).

ITA = arctan((L* - 50) / b*) in degrees, from CIELAB (Chardon, Cretois, Hourseau, Int. J. Cosmet. Sci. 13, 1991). Its six
classes are those of Del Bino and Bernerd, Br. J. Dermatol. 169 (s3), 2013. The photographs are not calibrated: camera, light
and white balance change the angle, so it compares collections and does not measure the skin of a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dermis.artefacts import SIDE, Floats, Mask, Pixels, frame_mask, working_size

CLASSES = ("very light", "light", "intermediate", "tan", "brown", "dark")
_LEAST = (55.0, 41.0, 28.0, 10.0, -30.0)  # an angle above the first one is very light, and so on

_BAND = 0.42  # a pixel is in the outer band if it is further from the centre than this share of the shorter side
_MIN_SHARE = 0.01  # share of the image that the band without the frame must have

# Linear sRGB to XYZ relative to the white point D65 (IEC 61966-2-1).
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(axis=1)


def skin_tone(image: NDArray[np.uint8]) -> float | None:
    """Compute the ITA of the skin in one RGB image uint8 [H, W, 3], in degrees.

    The skin is the outer band of the image without the frame of the dermatoscope. Of its pixels only those between the 50th
    and the 95th percentile of lightness count, because hair, ink and a lesion that reaches into the band are darker, and
    reflections lighter. The angle is that of their median colour.

    Returns:
        The angle from -90 to 90; None if the frame leaves no skin.
    """
    rgb = working_size(image)
    return skin_tone_of(rgb, frame_mask(rgb))


def skin_tone_of(rgb: Pixels, frame: Mask) -> float | None:
    """Compute the ITA of an image of the `working_size` whose `frame_mask` is known."""
    height, width = rgb.shape[:2]
    y, x = np.ogrid[:height, :width]
    outside = (y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2 > (_BAND * SIDE) ** 2
    band = rgb.reshape(-1, 3).compress((outside & ~frame).ravel(), axis=0)
    if len(band) < _MIN_SHARE * height * width:
        return None
    relative = _LINEAR[band] @ (_TO_XYZ[1:] / _WHITE[1:, None]).T
    low, high = np.percentile(relative[:, 0], [50, 95])  # of Y, with which L* grows
    chosen = relative[(relative[:, 0] >= low) & (relative[:, 0] <= high)]
    y, z = _root(chosen.T)
    return typology_angle(float(np.median(116 * y - 16)), float(np.median(200 * (y - z))))


def typology_angle(lightness: float, yellow: float) -> float:
    """Compute the ITA in degrees of L* and b*. Skin has b* above 0; for other colours the limit at b* = 0 is returned."""
    return float(np.degrees(np.arctan2(lightness - 50, max(yellow, 0.0))))


def tone_class(angle: float) -> str:
    """Return the class of an ITA."""
    return CLASSES[sum(angle <= least for least in _LEAST)]


def tone_counts(angles: Sequence[float]) -> dict[str, int]:
    """Count the angles in each class, in the order of `CLASSES`."""
    names = [tone_class(angle) for angle in angles]
    return {name: names.count(name) for name in CLASSES}


def to_lab(rgb: Floats) -> NDArray[np.float64]:
    """Convert sRGB colours [N, 3] from 0 to 255 to CIELAB with the white point D65 (IEC 61966-2-1; CIE 15:2004)."""
    x, y, z = _root(_linear(rgb) @ _TO_XYZ.T / _WHITE).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _linear(values: NDArray[Any]) -> NDArray[np.float64]:
    values = values.astype(np.float64) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055).clip(0) ** 2.4)


_LINEAR = _linear(np.arange(256))


def _root(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    bend = 6 / 29
    return np.where(ratio > bend**3, np.cbrt(ratio), ratio / (3 * bend**2) + 4 / 29)
