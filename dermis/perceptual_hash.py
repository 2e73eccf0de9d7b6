"""Perceptual hashes: 64 bits for an image, of which few differ between copies of it and many between different images.

Only numpy and Pillow are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE, _FREQUENCIES, _FINGERPRINT_FREQUENCIES = 32, 8, 16
FINGERPRINT_WORDS = 4  # of 64 bits
_ROUNDING = 1e-9  # coefficients of a plain image are not exactly zero

Hashes = NDArray[np.uint64]
Matrix = NDArray[np.float64]


def perceptual_hashes(images: Iterable[NDArray[np.uint8]]) -> Hashes:
    """Compute the perceptual hashes (pHash) of images.

    Luminance at 32 x 32 px, type-II DCT, the signs of the coefficients of frequencies 1 to 8 in both directions: the hash of
    Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), section 3.2.1, with two changes. The
    threshold is zero instead of the median, so that mirroring an image flips known bits (`mirrored`). Local contrast is
    normalised first: otherwise all small dark lesions on plain skin have similar hashes.

    Args:
        images: RGB images [H, W, 3] of any sizes.

    Returns:
        uint64 [N], one bit for each of 64 low frequencies.
    """
    return np.array([_hash(image) for image in images], dtype=np.uint64)


def mirrored(hashes: Hashes) -> Hashes:
    """Compute the hashes of mirrored images from those of the images.

    Mirroring a signal changes only the signs of its odd DCT-II coefficients.

    Args:
        hashes: uint64 [N].

    Returns:
        uint64 [N, 4]: hashes of the images as they are, mirrored left-right, mirrored top-bottom, and mirrored in both ways.
    """
    odd = np.broadcast_to(np.arange(1, 9) % 2 == 1, (8, 8))
    masks = [np.zeros((8, 8), bool), odd, odd.T, odd ^ odd.T]
    return hashes[:, None] ^ np.array([np.packbits(mask).view(">u8")[0] for mask in masks], dtype=np.uint64)


def fingerprints(images: Iterable[NDArray[np.uint8]]) -> Hashes:
    """Compute longer hashes, which confuse different images less often when there are many.

    The bits are those of `perceptual_hashes` for the frequencies 1 to 16.

    Args:
        images: RGB images [H, W, 3] of any sizes.

    Returns:
        uint64 [N, 4].
    """
    rows = [np.packbits(_signs(image, _FINGERPRINT_FREQUENCIES)).view(">u8") for image in images]
    return np.array(rows, dtype=np.uint64).reshape(len(rows), FINGERPRINT_WORDS)


def turned_and_mirrored(marks: Hashes) -> Hashes:
    """Compute the fingerprints of images in all eight positions: mirrored, turned by quarters, or both.

    Swapping the axes of an image swaps those of its coefficients, and mirroring it changes the signs of the odd ones.

    Args:
        marks: Fingerprints uint64 [N, 4].

    Returns:
        uint64 [N, 8, 4], the first of which are the fingerprints of the images as they are.
    """
    side = _FINGERPRINT_FREQUENCIES
    bits = np.unpackbits(marks.astype(">u8").view(np.uint8), axis=1).reshape(-1, side, side)
    odd = np.broadcast_to((np.arange(1, side + 1) % 2).astype(np.uint8), (side, side))
    flips = (np.zeros_like(odd), odd, odd.T, odd ^ odd.T)
    positions = np.stack([view ^ flip for view in (bits, bits.transpose(0, 2, 1)) for flip in flips], axis=1)
    packed = np.packbits(positions.reshape(len(marks), 8, side * side), axis=2)
    return packed.view(">u8").astype(np.uint64)


def luminance(image: NDArray[np.uint8], side: int) -> Matrix:
    """Luminance [side, side] of an image. Areas are averaged when shrinking, so that a shift by a pixel changes little."""
    grey = Image.fromarray(image).convert("L")
    method = Image.Resampling.BOX if min(grey.size) >= side else Image.Resampling.BICUBIC
    return np.asarray(grey.resize((side, side), method), dtype=np.float64)


def _hash(image: NDArray[np.uint8]) -> int:
    return int(np.packbits(_signs(image, _FREQUENCIES)).view(">u8")[0])


def _signs(image: NDArray[np.uint8], frequencies: int) -> NDArray[np.bool_]:
    """Return whether the coefficients [frequencies, frequencies] of the texture of an image are positive."""
    grey = luminance(image, _SIDE)
    detail = grey - _blurred(grey, 8)
    detail /= np.sqrt(_blurred(detail**2, 6)) + 3
    cosines = _cosines(frequencies)
    positive: NDArray[np.bool_] = cosines @ detail @ cosines.T > _ROUNDING
    return positive


def _blurred(picture: Matrix, deviation: float) -> Matrix:
    """Apply a Gaussian filter [32, 32]; the picture is mirrored at its border."""
    matrix = _gaussian(deviation)
    return matrix @ picture @ matrix.T


@lru_cache(maxsize=4)
def _gaussian(deviation: float) -> Matrix:
    """Return the matrix [32, 32] of a Gaussian filter that is cut off at four standard deviations."""
    offsets = np.arange(-round(4 * deviation), round(4 * deviation) + 1)
    weights = np.exp(-((offsets / deviation) ** 2) / 2)
    places = (np.arange(_SIDE)[:, None] + offsets) % (2 * _SIDE)
    places = np.minimum(places, 2 * _SIDE - 1 - places)
    matrix = np.zeros((_SIDE, _SIDE))
    np.add.at(matrix, (np.arange(_SIDE)[:, None], places), weights / weights.sum())
    return matrix


@lru_cache(maxsize=4)
def _cosines(frequencies: int) -> Matrix:
    """Return the rows [frequencies, 32] of the type-II DCT from frequency 1 on."""
    return np.cos(np.pi * np.outer(np.arange(1, frequencies + 1), 2 * np.arange(_SIDE) + 1) / (2 * _SIDE))
