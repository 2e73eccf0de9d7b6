"""Artefacts and skin tone of single images, for shares in a class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.artefacts import NAMES, detect_artefacts
from dermis.cpus import available_cpus
from dermis.skin_tone import skin_tone

MAX_THREADS = 4


@dataclass(frozen=True)
class Appearance:
    """What is measured in one image."""

    artefacts: tuple[str, ...]
    """Names of the artefacts that it shows."""
    skin_tone: float | None
    """Individual typology angle in degrees; None if no skin is visible around the lesion."""


def appearance(image: NDArray[np.uint8]) -> Appearance:
    """Measure one RGB image uint8 [H, W, 3]."""
    return Appearance(detect_artefacts(image).present, skin_tone(image))


def appearances(images: Iterable[NDArray[np.uint8]]) -> list[Appearance]:
    """Measure RGB images in threads; the results are in the order of the images."""
    with ThreadPoolExecutor(min(MAX_THREADS, available_cpus()), thread_name_prefix="dermis-report") as pool:
        return list(pool.map(appearance, images))


def artefact_counts(measured: Sequence[Appearance]) -> dict[str, int]:
    """Count the images that show each artefact."""
    return {name: sum(name in each.artefacts for each in measured) for name in NAMES}


def skin_tones(measured: Sequence[Appearance]) -> list[float]:
    """Return the angles of the images in which skin is visible."""
    return [each.skin_tone for each in measured if each.skin_tone is not None]
