"""Blinded reader studies: choosing the images, their order for each reader, and files that do not show what they are.

Half of the images are real and half generated, with the same classes in both halves. `dermis survey` and the studies of the
service use this module, `dermis.metrics.reader_study` has their statistics.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dermis.errors import DermisError
from dermis.imaging import Images

Truth = Literal["real", "generated"]

# Separate streams of random numbers, so that a change in the use of one does not change the others.
_REAL, _MIX, _ORDER = 0, 1, 2


class PlanError(DermisError):
    """The images of a study cannot be chosen; the message is about their number."""


@dataclass(frozen=True)
class Slot:
    """One planned image of a survey."""

    truth: Truth
    label: int
    index: int  # row of the real images, or sample of the seed


def plan_images(
    labels: NDArray[np.int64], class_names: Sequence[str], count: int, seed: int, *, equal_classes: bool = False
) -> tuple[Slot, ...]:
    """Choose images, half of them real, and shuffle them. The result depends on the arguments only.

    Args:
        labels: Classes of the real images, int64 [N], indices into `class_names`; all 0 without classes.
        class_names: Names of the classes.
        count: Number of images. Real ones are drawn without replacement.
        seed: Seed of the random numbers.
        equal_classes: Whether both halves have the same number of images of each class. Otherwise they have the proportions
            of `labels` (largest remainders decide the last images).

    Raises:
        PlanError: `count` is odd, or there are too few real images.
    """
    if count < 2 or count % 2:
        raise PlanError(f"must be even and at least 2, as half are real; got {count}")
    half = count // 2
    available = np.bincount(labels, minlength=len(class_names))
    shares = (available > 0) / (available > 0).sum() if equal_classes else available / available.sum()
    counts = apportion(shares, half)
    if (short := np.flatnonzero(counts > available)).size:
        k = int(short[0])
        kind = f"real {class_names[k]} images" if class_names else "real images"
        raise PlanError(f"{count} takes {counts[k]} {kind}, but there are {available[k]}")
    rng = np.random.default_rng([seed, _REAL])
    slots: list[Slot] = []
    for label, number in enumerate(counts.tolist()):
        rows = rng.choice(np.flatnonzero(labels == label), number, replace=False)
        slots += [Slot("real", label, row) for row in rows.tolist()]
    slots += [Slot("generated", label, i) for i, label in enumerate(np.repeat(np.arange(len(counts)), counts).tolist())]
    order = np.random.default_rng([seed, _MIX]).permutation(count)
    return tuple(slots[i] for i in order)


def apportion(shares: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Whole numbers with the sum `total` that are nearest to shares * total (Hamilton's method)."""
    exact = shares * total
    numbers = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(-(exact - numbers), kind="stable")
    numbers[order[: total - int(numbers.sum())]] += 1
    return numbers


def order_for_reader(count: int, seed: int, reader: int) -> list[int]:
    """Positions of the images in the order in which a reader sees them.

    Args:
        count: Number of images.
        seed: Seed of the study, which readers do not know.
        reader: Number of the reader; each has another order.
    """
    order: list[int] = np.random.default_rng([seed, _ORDER, reader]).permutation(count).tolist()
    return order


def uncompressed_png(image: Images) -> bytes:
    """Encode an image as a PNG file whose structure and length depend on the size of the image only.

    The size of a compressed file shows how noisy an image is, which differs between generators and cameras. Here the pixels are
    stored in blocks of deflate without compression, and each row has the filter 0 (none).

    Args:
        image: uint8 [H, W, 3].
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)
    rows[:, 1:] = image.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of each of three colours
    data = zlib.compress(rows.tobytes(), 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def equally_long(pngs: Sequence[bytes]) -> list[bytes]:
    """Pad PNG files to the length of the longest one, with a private chunk of zeros before the last chunk, IEND.

    Viewers ignore the chunk. The sizes of the files then do not show how noisy the images are, but the length of the chunk
    does; `uncompressed_png` has no such trace, and makes larger files.
    """
    longest, end = max(map(len, pngs)), 12
    return [png[:-end] + _chunk(b"paDd", bytes(longest - len(png))) + png[-end:] for png in pngs]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % confidence interval; None if `total` is 0."""

    count: int
    total: int
    share: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Rates:
    """Accuracy and the rates that it consists of."""

    accuracy: Rate
    sensitivity: Rate
    specificity: Rate
    called_generated: Rate
    """Response bias: the share of "generated" among all answers."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of the readers."""

    images: int
    """Images that all readers answered."""
    observed: float | None
    """Mean share of pairs of readers with the same answer."""
    fleiss_kappa: float | None
    pairs: tuple[tuple[str, str, float | None], ...]
    """Cohen's kappa of every two readers, on the images that both answered."""
