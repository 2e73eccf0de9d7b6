"""Artefacts and skin tone of single images, for shares in a class."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.artefacts import NAMES, artefacts_of, frame_mask, working_size
from dermis.cpus import available_cpus
from dermis.skin_tone import skin_tone_of

MAX_THREADS = 4
_NICE = 10


@dataclass(frozen=True)
class Appearance:
    """What is measured in one image."""

    artefacts: tuple[str, ...]
    """Names of the artefacts that it shows."""
    skin_tone: float | None
    """Individual typology angle in degrees; None if no skin is visible around the lesion."""


MeasureImages = Callable[[NDArray[np.uint8]], list[Appearance]]
"""Measures RGB images uint8 [N, H, W, 3], as `appearances` does."""


def appearance(image: NDArray[np.uint8]) -> Appearance:
    """Measure one RGB image uint8 [H, W, 3]."""
    rgb = working_size(image)
    frame = frame_mask(rgb)
    return Appearance(artefacts_of(rgb, frame).present, skin_tone_of(rgb, frame))


def appearances(images: Iterable[NDArray[np.uint8]]) -> list[Appearance]:
    """Measure RGB images in threads of low priority; the results are in the order of the images.

    An image takes about as much processor time as generating two of 128 px, and in a service others wait for images meanwhile.
    """
    threads = min(MAX_THREADS, available_cpus())
    with ThreadPoolExecutor(threads, thread_name_prefix="dermis-report", initializer=lower_priority) as pool:
        return list(pool.map(appearance, images))


def lower_priority() -> None:
    """Lower the priority of this thread alone, which only Linux can."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def artefact_counts(measured: Sequence[Appearance]) -> dict[str, int]:
    """Count the images that show each artefact."""
    return {name: sum(name in each.artefacts for each in measured) for name in NAMES}


def skin_tones(measured: Sequence[Appearance]) -> list[float]:
    """Return the angles of the images in which skin is visible."""
    return [each.skin_tone for each in measured if each.skin_tone is not None]
