"""Changes of an image that make a copy of it hard to recognise: a copy detector is measured with them.

Every transformation takes an image uint8 [S, S, 3] and a random generator, from which it draws its strength, and returns an
image of the same size. Lengths are relative to the side.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from dermis.imaging import Images

Transformation = Callable[[Images, np.random.Generator], Images]

_BICUBIC = Image.Resampling.BICUBIC
_DRAWING_SCALE = 2  # lines are drawn at this multiple of the size, so that their edges are smooth


def mirror(image: Images, rng: np.random.Generator) -> Images:
    """Mirror from left to right."""
    return image[:, ::-1]


def quarter_turn(image: Images, rng: np.random.Generator) -> Images:
    """Rotate by 90, 180 or 270 degrees."""
    return turned(image, int(rng.integers(1, 4)))


def turned(image: Images, quarters: int) -> Images:
    """Rotate by this number of quarter turns."""
    return np.rot90(image, quarters)


def crop(image: Images, rng: np.random.Generator, share: float = 0.8) -> Images:
    """Cut out a square of this share of the side, at a random place, and enlarge it to the full size."""
    side = len(image)
    kept = max(1, round(side * share))
    top, left = rng.integers(0, side - kept + 1, 2)
    return resized(image[top : top + kept, left : left + kept], (side, side))


def shrink(image: Images, rng: np.random.Generator) -> Images:
    """Reduce to 40 to 80 % of the side and enlarge again, which loses detail."""
    side = len(image)
    reduced = max(8, round(side * rng.uniform(0.4, 0.8)))
    return resized(resized(image, (reduced, reduced)), (side, side))


def recolour(image: Images, rng: np.random.Generator) -> Images:
    """Shift the hue by up to a tenth of the colour circle and scale the saturation by 0.7 to 1.3."""
    hsv = np.asarray(_picture(image).convert("HSV")).astype(np.int16)
    hsv[..., 0] = (hsv[..., 0] + round(rng.uniform(-0.1, 0.1) * 255)) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.7, 1.3), 0, 255)
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))


def relight(image: Images, rng: np.random.Generator) -> Images:
    """Scale brightness and contrast by 0.7 to 1.3 each."""
    brightness, contrast = rng.uniform(0.7, 1.3, 2)
    values = image.astype(np.float32)
    mean = values.mean()
    changed: Images = np.clip(((values - mean) * contrast + mean) * brightness, 0, 255).astype(np.uint8)
    return changed


def blur(image: Images, rng: np.random.Generator) -> Images:
    """Blur with a Gaussian whose standard deviation is 0.6 to 1.25 % of the side."""
    radius = rng.uniform(0.8, 1.6) * len(image) / 128
    return np.asarray(_picture(image).filter(ImageFilter.GaussianBlur(radius)))


def compress(image: Images, rng: np.random.Generator, quality: int = 30) -> Images:
    """Save as JPEG of this quality and read again."""
    file = io.BytesIO()
    _picture(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def grey(image: Images, rng: np.random.Generator) -> Images:
    """Remove the colour."""
    return np.asarray(_picture(image).convert("L").convert("RGB"))


def paint_hair(image: Images, rng: np.random.Generator) -> Images:
    """Paint 6 to 19 curved dark hairs over the image."""
    picture, draw, side = _canvas(image)
    for _ in range(rng.integers(6, 20)):
        x, y = rng.uniform(0, side, 2)
        angle, bend, length = rng.uniform(0, 2 * math.pi), rng.uniform(-1.5, 1.5), rng.uniform(0.3, 1.0) * side
        points = [(x, y)]
        for _ in range(12):
            angle += bend / 12
            x, y = x + length / 12 * math.cos(angle), y + length / 12 * math.sin(angle)
            points.append((x, y))
        dark = int(rng.integers(10, 70))
        width = max(1, round(rng.uniform(0.008, 0.016) * side))
        draw.line(points, fill=(dark, int(dark * 0.8), int(dark * 0.7)), width=width)
    return _finished(picture, image)


def paint_ruler(image: Images, rng: np.random.Generator) -> Images:
    """Paint the marks of a ruler along one edge."""
    picture, draw, side = _canvas(image)
    top, pitch, dark = rng.uniform(0.02, 0.15) * side, rng.uniform(0.02, 0.06) * side, int(rng.integers(0, 60))
    width = max(1, round(rng.uniform(0.004, 0.012) * side))
    for number, x in enumerate(np.arange(rng.uniform(0, pitch), side, pitch)):
        length = (0.08 if number % 5 == 0 else 0.04) * side
        draw.line([(x, top), (x, top + length)], fill=(dark, dark, dark), width=width)
    return turned(_finished(picture, image), int(rng.integers(0, 4)))


TRANSFORMATIONS: Mapping[str, Transformation] = {
    "mirror": mirror,
    "quarter turn": quarter_turn,
    "crop to 80 %": crop,
    "shrink": shrink,
    "recolour": recolour,
    "relight": relight,
    "blur": blur,
    "JPEG 30": compress,
    "grey": grey,
    "hair": paint_hair,
    "ruler": paint_ruler,
}


def combined(image: Images, rng: np.random.Generator) -> Images:
    """Apply two different transformations of `TRANSFORMATIONS`, drawn at random, one after the other."""
    first, second = rng.choice(len(TRANSFORMATIONS), 2, replace=False)
    functions = list(TRANSFORMATIONS.values())
    changed: Images = functions[second](functions[first](image, rng), rng)
    return changed


def join_halves(image: Images, other: Images) -> Images:
    """Stick the left half of one image to the right half of another."""
    middle = image.shape[1] // 2
    return np.concatenate([image[:, :middle], other[:, middle:]], axis=1)


def join_squeezed(image: Images, other: Images) -> Images:
    """Place two images side by side, each squeezed to half of its width."""
    side = len(image)
    middle = side // 2
    return np.concatenate([resized(image, (middle, side)), resized(other, (side - middle, side))], axis=1)


JOINS: Mapping[str, Callable[[Images, Images], Images]] = {
    "halves joined": join_halves,
    "squeezed and joined": join_squeezed,
}


def resized(image: Images, size: tuple[int, int]) -> Images:
    """Resize to (width, height) with an antialiased bicubic filter."""
    return np.asarray(_picture(image).resize(size, _BICUBIC))


def _picture(image: Images) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image))


def _canvas(image: Images) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    side = len(image) * _DRAWING_SCALE
    picture = _picture(image).resize((side, side), _BICUBIC)
    return picture, ImageDraw.Draw(picture), side


def _finished(picture: Image.Image, image: Images) -> Images:
    return np.asarray(picture.resize((len(image), len(image)), Image.Resampling.LANCZOS))
