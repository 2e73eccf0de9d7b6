"""Descriptors of the training images of a copy detector: 4 bits for each number, and the search among them.

A training image has a descriptor of the whole image, [dim], and one of each half, [4, dim / 2]. The network orders the numbers
of a descriptor by their variance, so that the first half of the numbers is enough for halves. All descriptors have length 1.

The margin of a descriptor is its cosine similarity to the most similar reference, minus half the mean of its similarities to
references of lower ranks. The subtraction is the score normalisation of Pizzi et al. (arXiv 2202.10261, section 3.4), with the
training images themselves as background: an ordinary image, which is similar to many training images, gets a small margin.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Floats, products_of_matrices, search

HALVES = 4
UPPER_LOWER, LEFT_RIGHT = (0, 1), (2, 3)
"""Numbers of the halves on both sides of a horizontal and of a vertical line."""
BACKGROUND = slice(10, 20)
"""Ranks, from 0, of the training images that give the background similarity. A lesion with ten images has a margin, too."""
BACKGROUND_WEIGHT = 0.5
"""Share of the background similarity that is subtracted. 0.5 to 0.75 found most copies of dermoscopic images; 0 and 1 fewer."""
MIN_REFERENCES = BACKGROUND.stop
_BACKGROUND_OF_HALVES = slice(20, 40)  # a training image has up to five of these ranks
_WHOLE_SHARE = 0.65  # of the whole image in a joint similarity; 0.5 missed more crops, 0.75 more pairs of changes
_SHORTLIST = 100  # training images with which all regions are compared
_LEVELS = 16  # of a stored number
_STEP = 0.3352  # width of a level in standard deviations: the best one for normal numbers (Max 1960, table II, N = 16)
# The order in which mirroring and quarter turns can bring upper, lower, left and right.
_ORDERS = tuple(order for order in permutations(range(HALVES)) if {order[0], order[1]} in ({0, 1}, {2, 3}))


@dataclass(frozen=True)
class References:
    """Descriptors of N training images, of length 1."""

    whole: Floats
    """[N, dim]."""
    halves: Floats
    """[N, 4, dim / 2]: upper, lower, left, right."""


def packed(references: References) -> NDArray[np.uint8]:
    """Store references in uint8 [N, 3 dim / 2]: 4 bits for each number."""
    count = len(references.whole)
    rows = [references.whole, *references.halves.transpose(1, 0, 2)]
    levels = []
    for vectors in rows:
        deviation = np.sqrt((vectors**2).mean(axis=1, keepdims=True))
        largest = np.abs(vectors).max(axis=1, keepdims=True)
        step = np.maximum(_STEP * deviation, largest / (_LEVELS / 2))
        levels.append(np.clip(np.floor(vectors / step) + _LEVELS // 2, 0, _LEVELS - 1).astype(np.uint8))
    numbers = np.concatenate(levels, axis=1).reshape(count, -1, 2)
    stored: NDArray[np.uint8] = numbers[..., 0] | numbers[..., 1] << 4
    return stored


def unpacked(stored: NDArray[np.uint8], dim: int) -> References:
    """Return the references that `packed` stored, up to rounding: a similarity changes by about 0.01."""
    numbers = np.stack([stored & (_LEVELS - 1), stored >> 4], axis=2).reshape(len(stored), -1)
    values = numbers.astype(np.float32) - (_LEVELS - 1) / 2  # no value is 0, so no vector has length 0
    halves = values[:, dim:].reshape(len(stored), HALVES, dim // 2)
    return References(normalised(values[:, :dim]), normalised(halves))


def normalised(vectors: Floats) -> Floats:
    """Scale vectors to length 1."""
    scaled: Floats = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return scaled


class CopySearch:
    """Margins of descriptors against the references. Safe to call from several threads.

    Args:
        references: Descriptors of at least `MIN_REFERENCES` training images.
        threads: CPU cores to use.
    """

    def __init__(self, references: References, threads: int) -> None:
        count, dim = references.whole.shape
        self._references = references
        self._threads = threads
        self._whole = _index(references.whole)
        # A whole image that was squeezed into a half resembles the whole training image.
        whole = normalised(references.whole[:, None, : dim // 2])
        parts = np.concatenate([references.halves, whole], axis=1)
        self._parts = _index(parts.reshape(count * (HALVES + 1), dim // 2))

    def whole_margins(self, whole: Floats) -> Floats:
        """Return the margins [N] of descriptors of whole images [N, dim]."""
        return _margins(self._similarities(self._whole, whole, BACKGROUND.stop)[0], BACKGROUND)

    def half_margins(self, halves: Floats) -> Floats:
        """Return the margins [N] of descriptors of halves [N, dim / 2] against all halves and whole images."""
        similarities, _ = self._similarities(self._parts, halves, _BACKGROUND_OF_HALVES.stop)
        return _margins(similarities, _BACKGROUND_OF_HALVES)

    def joint_margins(self, whole: Floats, halves: Floats) -> Floats:
        """Return the margins [N] of a mean of the similarities of whole image and halves, in the halves' best orientation.

        Only the training images whose whole descriptors are nearest are compared.

        Args:
            whole: [N, dim].
            halves: [N, 4, dim / 2].
        """
        count = min(_SHORTLIST, len(self._references.whole))
        similarities, numbers = self._similarities(self._whole, whole, count)
        by_half = np.einsum("nid,nkjd->nkij", halves, self._references.halves[numbers], optimize=True)
        places = np.arange(HALVES)
        best = np.max([by_half[:, :, places, order].mean(axis=2) for order in _ORDERS], axis=0)
        together = _WHOLE_SHARE * similarities + (1 - _WHOLE_SHARE) * best
        return _margins(-np.sort(-together, axis=1), BACKGROUND)

    def _similarities(self, index: object, rows: Floats, count: int) -> tuple[Floats, NDArray[np.int64]]:
        squared, numbers = search(index, np.ascontiguousarray(rows, np.float32), count, self._threads)
        similarities: Floats = np.float32(1) - squared / np.float32(2)  # of vectors of length 1
        return similarities, numbers


def _margins(similarities: Floats, background: slice) -> Floats:
    margins: Floats = similarities[:, 0] - BACKGROUND_WEIGHT * similarities[:, background].mean(axis=1)
    return margins


def _index(vectors: Floats) -> object:
    from dermis.authenticity.build import automatic_kind, new_index  # imports scipy, which the gateway does not need

    count = len(vectors)
    index = new_index(automatic_kind(count), vectors.shape[1], "float", count)
    with products_of_matrices():
        index.train(vectors)
        index.add(vectors)
    return index
