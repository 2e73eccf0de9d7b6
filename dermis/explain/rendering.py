"""Heat maps as pictures: attributions over the image, and the regions that matter most.

The colours are built in OKLab (Ottosson, 2020), where equal distances look equal: lightness and chroma grow in proportion
to the attribution's size, from a dark neutral at 0 to light orange (for the positive class) or light blue (against it).
Both arms have the same lightness, and differ for people who do not tell red from green.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dermis.bundle.classifier import NOTICE
from dermis.explain.attribution import Attribution
from dermis.imaging import Images

SALIENT_PERCENT = 20.0
LEAST_SIDE = 256  # of a picture that stands alone, px

_LIGHTNESS = (0.22, 0.86)
_CHROMA = 0.15
_HUES = (255.0, 62.0)  # degrees: blue against, orange for
_OPACITY = (0.25, 0.75)  # of the colours over the image, from attribution 0 to full colour
_QUANTILE = 0.95


def full_colour(found: Attribution) -> float:
    """The size of an attribution (logits a pixel) that gets full colour: exceeded by 5 % of the picture. 0 if all are 0."""
    return float(np.quantile(np.abs(_shown(found)), _QUANTILE))


def per_percent(found: Attribution, value: float) -> float:
    """Logits a pixel as logits for each 1 % of the image's area, which does not depend on its size in px."""
    return value * found.values.size / 100


def heat_map(found: Attribution, side: int | None = None) -> Images:
    """uint8 [side, side, 3]: the image in grey under the attributions in colour. side: default that of the image."""
    side = side or len(found.image)
    scale = full_colour(found)
    values = np.clip(_shown(found) / scale, -1, 1) if scale > 0 else np.zeros_like(found.values)
    resample = Image.Resampling.NEAREST if found.method == "xrai" else Image.Resampling.BILINEAR
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize((side, side), resample))
    grey = np.asarray(Image.fromarray(_resized(found.image, side)).convert("L"), dtype=np.float64)[..., None]
    low, high = _OPACITY
    opacity = (low + (high - low) * np.abs(values))[..., None]
    return _uint8((1 - opacity) * grey + opacity * 255 * colours(values))


def salient_mask(found: Attribution, percent: float = SALIENT_PERCENT) -> NDArray[np.bool_]:
    """bool [S, S]: at least `percent` % of the image, what speaks most for the positive class. Regions are kept whole."""
    shown = _shown(found)
    mask: NDArray[np.bool_] = shown >= np.quantile(shown, 1 - percent / 100)
    return mask


def salient_view(found: Attribution, percent: float = SALIENT_PERCENT) -> Images:
    """uint8 [S, S, 3]: the image where `salient_mask` is true, nearly white elsewhere."""
    faded = 255 - (255 - found.image.astype(np.float64)) * 0.12
    return _uint8(np.where(salient_mask(found, percent)[..., None], found.image, faded))


def colours(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """RGB [..., 3], 0..1, of values [...] from -1 to 1."""
    size = np.abs(values).astype(np.float64)
    lightness = _LIGHTNESS[0] + (_LIGHTNESS[1] - _LIGHTNESS[0]) * size
    hue = np.deg2rad(np.where(values < 0, *_HUES))
    # Chroma rises to the middle and falls again, as sRGB has no strong light colours.
    chroma = _CHROMA * np.sin(np.pi * np.minimum(size, 1) * 0.75)
    return _oklab_to_rgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1))


def legend(width: int = 256, height: int = 14) -> Images:
    """uint8 [height, width, 3]: the colours from -1 (left) to 1."""
    return _uint8(np.broadcast_to(255 * colours(np.linspace(-1, 1, width)), (height, width, 3)))


def to_png(picture: Images) -> bytes:
    """uint8 [H, W, 3] as a PNG, the notice that this is no medical device as its comment: the same bytes every time."""
    text = PngInfo()
    text.add_text("Comment", NOTICE)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=6, pnginfo=text)
    return buffer.getvalue()


def _shown(found: Attribution) -> NDArray[np.floating]:
    """What is drawn: XRAI's regions as they are; integrated gradients smoothed, as single pixels are mostly noise."""
    if found.method == "xrai":
        return found.values
    from scipy.ndimage import gaussian_filter

    smooth: NDArray[np.floating] = gaussian_filter(found.values, sigma=len(found.values) / 32)
    return smooth


def _oklab_to_rgb(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB [..., 3], clipped to 0..1, of OKLab [..., 3] (the inverse matrices of its definition)."""
    to_cones = np.array(
        [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_cones.T) ** 3 @ to_linear.T, 0, 1)
    rgb: NDArray[np.float64] = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb


def _resized(image: Images, side: int) -> Images:
    if len(image) == side:
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def _uint8(values: NDArray[np.floating]) -> Images:
    found: Images = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return found
