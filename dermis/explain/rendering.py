"""Heat maps as pictures: attributions over the image, and the regions that matter most.

Colours are computed in OKLab (Ottosson, 2020), in which equal distances look equal: lightness and chroma are proportional to
the size of the attribution, from a dark neutral at 0 to light orange (for the positive class) or light blue (against it).
Both colours have the same lightness, and people with red-green colour blindness can distinguish them.
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
MIN_SIDE = 256  # side of a picture that is shown alone, px

_LIGHTNESS = (0.22, 0.86)
_CHROMA = 0.15
_HUES = (255.0, 62.0)  # degrees: blue against, orange for
_OPACITY = (0.25, 0.75)  # opacity of the colours over the image, from attribution 0 to full colour
_QUANTILE = 0.95


def full_colour(attribution: Attribution) -> float:
    """Return the attribution (logits of a pixel) of full colour, which 5 % of the picture exceed; 0 if all are 0."""
    return float(np.quantile(np.abs(_smoothed(attribution)), _QUANTILE))


def per_percent(attribution: Attribution, value: float) -> float:
    """Convert logits of a pixel to logits of 1 % of the image's area, which do not depend on its size in px."""
    return value * attribution.values.size / 100


def heat_map(attribution: Attribution, side: int | None = None) -> Images:
    """Draw the image in grey under the attributions in colour, uint8 [side, side, 3]. `side` is by default the image's."""
    side = side or len(attribution.image)
    scale = full_colour(attribution)
    values = np.clip(_smoothed(attribution) / scale, -1, 1) if scale > 0 else np.zeros_like(attribution.values)
    resample = Image.Resampling.NEAREST if attribution.method == "xrai" else Image.Resampling.BILINEAR
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize((side, side), resample))
    grey = np.asarray(Image.fromarray(_resized(attribution.image, side)).convert("L"), dtype=np.float64)[..., None]
    low, high = _OPACITY
    opacity = (low + (high - low) * np.abs(values))[..., None]
    return _uint8((1 - opacity) * grey + opacity * 255 * colours(values))


def salient_mask(attribution: Attribution, percent: float = SALIENT_PERCENT) -> NDArray[np.bool_]:
    """Return bool [S, S]: the regions with the largest attribution, until they cover at least `percent` % of the image."""
    shown = _smoothed(attribution)
    mask: NDArray[np.bool_] = shown >= np.quantile(shown, 1 - percent / 100)
    return mask


def salient_view(attribution: Attribution, percent: float = SALIENT_PERCENT) -> Images:
    """Draw the image, uint8 [S, S, 3], where `salient_mask` is true, and nearly white elsewhere."""
    faded = 255 - (255 - attribution.image.astype(np.float64)) * 0.12
    return _uint8(np.where(salient_mask(attribution, percent)[..., None], attribution.image, faded))


def colours(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return RGB [..., 3] in 0..1 for values [...] from -1 to 1."""
    size = np.abs(values).astype(np.float64)
    lightness = _LIGHTNESS[0] + (_LIGHTNESS[1] - _LIGHTNESS[0]) * size
    hue = np.deg2rad(np.where(values < 0, *_HUES))
    # Chroma rises to the middle and falls again, because sRGB has no light colours of high chroma.
    chroma = _CHROMA * np.sin(np.pi * np.minimum(size, 1) * 0.75)
    return _oklab_to_rgb(np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1))


def legend(width: int = 256, height: int = 14) -> Images:
    """Draw the colours from -1 (left) to 1 (right), uint8 [height, width, 3]."""
    return _uint8(np.broadcast_to(255 * colours(np.linspace(-1, 1, width)), (height, width, 3)))


def to_png(picture: Images) -> bytes:
    """Encode a picture uint8 [H, W, 3] as PNG, with the medical notice as its comment. The bytes are always the same."""
    text = PngInfo()
    text.add_text("Comment", NOTICE)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=6, pnginfo=text)
    return buffer.getvalue()


def _smoothed(attribution: Attribution) -> NDArray[np.floating]:
    """Return the values to draw: XRAI's regions unchanged, integrated gradients smoothed, as single pixels are mostly noise."""
    if attribution.method == "xrai":
        return attribution.values
    from scipy.ndimage import gaussian_filter

    smooth: NDArray[np.floating] = gaussian_filter(attribution.values, sigma=len(attribution.values) / 32)
    return smooth


def _oklab_to_rgb(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert OKLab [..., 3] to sRGB [..., 3], clipped to 0..1, by the inverse matrices of its definition."""
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
    pixels: Images = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return pixels
