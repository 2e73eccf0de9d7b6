"""Procedural dermoscopy for tests: skin with a pigmented lesion, and the artefacts of real images."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Image = NDArray[np.uint8]


@cache
def lesion(seed: int, size: int = 160) -> Image:
    """uint8 [size, size, 3]: pinkish skin with faint texture and one brown lesion of irregular outline and pigment."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size - 0.5

    def clouds(scale: float) -> NDArray[np.float64]:
        field = ndimage.gaussian_filter(random.standard_normal((size, size)), scale * size)
        return np.asarray(field / field.std())

    skin = np.array([225, 185, 170]) + random.uniform(-12, 12, 3)
    pigment = np.array([120, 70, 50]) + random.uniform(-15, 15, 3)
    centre = random.uniform(-0.06, 0.06, 2)
    reach = np.hypot(y - centre[0], x - centre[1]) + 0.05 * clouds(0.06)
    inside = 1 / (1 + np.exp((reach - random.uniform(0.2, 0.28)) * 60))
    shade = np.clip(inside * (1 + 0.25 * clouds(0.03)), 0, 1.2)[..., None]
    image = skin * (1 - shade) + pigment * shade
    image += 4 * clouds(0.015)[..., None] + 2 * clouds(0.1)[..., None]
    drawn: Image = np.clip(image, 0, 255).astype(np.uint8)
    drawn.flags.writeable = False
    return drawn


def framed(image: Image, radius: float = 0.53) -> Image:
    """Black outside a centred disc (radius as a share of the side)."""
    size = len(image)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return np.where(np.hypot(y, x)[..., None] > radius * size, np.uint8(12), image)


def barred(image: Image, share: float = 0.08) -> Image:
    """A black bar over the top and the bottom."""
    out, rows = image.copy(), round(share * len(image))
    out[:rows] = out[-rows:] = 0
    return out


def ruled(image: Image, pitch: float = 0.07, marks: int = 9) -> Image:
    """Tick marks in a row near the lower edge, every fifth longer."""
    out, size = image.copy(), len(image)
    bottom, thick = round(0.95 * size), max(1, round(size / 160))
    for mark in range(marks):
        x = round((0.1 + mark * pitch) * size)
        length = round((0.07 if mark % 5 == 0 else 0.045) * size)
        out[bottom - length : bottom, x : x + thick] = 30
    return out


def hairy(image: Image, seed: int = 0, hairs: int = 12) -> Image:
    """Dark hairs, slightly bent, across the image."""
    random, size = np.random.default_rng(seed), len(image)
    marked = np.zeros((size, size), bool)
    along = np.linspace(-0.6, 0.6, 6 * size)
    for _ in range(hairs):
        start, turn, bend = random.uniform(0.2, 0.8, 2), random.uniform(0, np.pi), random.uniform(-0.2, 0.2)
        across = bend * along**2
        y = np.round((start[0] + along * np.sin(turn) + across * np.cos(turn)) * size).astype(int)
        x = np.round((start[1] + along * np.cos(turn) - across * np.sin(turn)) * size).astype(int)
        kept = (y >= 0) & (y < size) & (x >= 0) & (x < size)
        marked[y[kept], x[kept]] = True
    return np.where(marked[..., None], np.array([50, 35, 30], np.uint8), image)


def inked(image: Image, colour: tuple[int, int, int] = (70, 60, 190)) -> Image:
    """Marker strokes in two corners."""
    out, size = image.copy(), len(image)
    width = max(2, size // 40)
    for k in range(size // 5):
        out[k : k + width, size // 5 - k : size // 5 - k + width] = colour
        out[size - 1 - k - width : size - 1 - k, size - size // 5 + k : size - size // 5 + k + width] = colour
    return out
