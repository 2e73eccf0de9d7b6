"""Near-duplicates: copies of one image and repeated photographs of one lesion.

A near-duplicate that stands in training and in validation makes every score too good, and a generator that is trained
on copies learns to repeat them. Perceptual hashes find copies, embeddings find other views of a lesion; both also pair
strangers that look alike, so `confirmed` lays the two images of a pair over each other and keeps those that match.
All pairs are compared, in blocks: 40,000 images need about 1 GB, never an N x N matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

# Set by eye on ../shared/data/dermoscopy (docs/artefacts.md): the first two admit candidates, the third decides.
HASH_DISTANCE = 10  # of 64 bits
EMBEDDING_SIMILARITY = 0.32  # cosine of whitened lite0 features
CORRELATION = 0.8  # of the textures of two images laid over each other

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, i < j, in ascending order of (i, j). All three arrays have length P."""

    i: NDArray[np.int64]
    j: NDArray[np.int64]
    distance: NDArray[np.float64]  # differing bits, or 1 - cosine similarity, or 1 - correlation: as the maker says

    def __len__(self) -> int:
        return len(self.i)


# --- Perceptual hash


def perceptual_hashes(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint64]:
    """pHash of RGB images [H, W, 3] of any sizes: uint64 [N], one bit for each of 64 low frequencies.

    Luminance at 32 x 32 px, type-II DCT, the signs of the coefficients of frequencies 1 to 8 in both directions: the
    hash of Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010), section 3.2.1, with
    two changes. The threshold is zero instead of the median, so that mirroring an image flips known bits (`mirrored`).
    And local contrast is normalised first: otherwise any two small dark lesions on plain skin have nearly the same hash.
    """
    return np.array([_hash(image) for image in images], dtype=np.uint64)


def _hash(image: NDArray[np.uint8]) -> int:
    grey = _luminance(image, 32)
    detail = grey - ndimage.gaussian_filter(grey, 8)
    detail /= np.sqrt(ndimage.gaussian_filter(detail**2, 6)) + 3
    low = fft.dctn(detail, type=2)[1:9, 1:9]
    return int(np.packbits(low > 0).view(">u8")[0])


def mirrored(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64 [N] -> [N, 4]: the hashes of the images as they are, mirrored left-right, top-bottom, and in both ways.

    Mirroring a signal changes the signs of its odd DCT-II coefficients and nothing else, so no image is needed.
    """
    odd = np.broadcast_to(np.arange(1, 9) % 2 == 1, (8, 8))
    masks = [np.zeros((8, 8), bool), odd, odd.T, odd ^ odd.T]
    return hashes[:, None] ^ np.array([np.packbits(mask).view(">u8")[0] for mask in masks], dtype=np.uint64)


def hash_pairs(hashes: NDArray[np.uint64], max_distance: int = HASH_DISTANCE, *, mirrors: bool = False) -> Pairs:
    """All pairs of hashes [N] that differ in at most `max_distance` of 64 bits; distance is their number.

    `mirrors`: also find images that are each other's mirror image, or turned by 180 degrees (the least distance of
    the four positions counts).
    """
    if not 0 <= max_distance <= 64:
        raise ValueError(f"max_distance {max_distance} is not between 0 and 64 bits")
    others = mirrored(hashes) if mirrors else hashes[:, None]

    def distances(start: int, stop: int) -> NDArray[np.uint8]:
        nearest = np.full((stop - start, len(hashes) - start), 64, dtype=np.uint8)
        for position in range(others.shape[1]):
            differing = hashes[start:stop, None] ^ others[None, start:, position]
            np.minimum(nearest, np.bitwise_count(differing), out=nearest)
        return nearest

    return _pairs_in_blocks(len(hashes), distances, max_distance, block=256)


# --- Embedding


def embedding_pairs(features: Floats, min_similarity: float = EMBEDDING_SIMILARITY, *, components: int = 512) -> Pairs:
    """All pairs of features [N, dim] with a cosine similarity of at least `min_similarity`; distance is 1 - similarity.

    Features are whitened first over their `components` strongest principal components (at most N / 10; 0 leaves them
    as they are): it takes away what all dermoscopic images share (Jégou & Chum, "Negative evidences and co-occurences
    in image retrieval", ECCV 2012, section 4).
    """
    x = _whitened(features, min(components, len(features) // 10))
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def distances(start: int, stop: int) -> Floats:
        cosine: Floats = unit[start:stop] @ unit[start:].T
        return np.clip(1 - cosine, 0, 2)

    return _pairs_in_blocks(len(unit), distances, 1 - min_similarity, block=1024)


def _whitened(features: Floats, components: int) -> Floats:
    if components < 2:
        return features
    centred = features - features.mean(axis=0)
    # By the covariance, so that 40,000 images cost a [dim, dim] matrix and not an SVD of all features.
    variances, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64) / len(features))
    kept = slice(-min(components, features.shape[1]), None)
    scale = axes[:, kept] / np.sqrt(np.maximum(variances[kept], 1e-9 * variances[-1]))
    whitened: Floats = centred @ scale.astype(np.float32)
    return whitened


# --- Confirmation: lay one image over the other

_COARSE, _FINE = 48, 128  # pixels a side
_SCALES = np.exp(np.linspace(-np.log(1.7), np.log(1.7), 11))
_TURNS = np.deg2rad(np.arange(-40, 41, 8))


def confirmed(
    pairs: Pairs,
    load: Callable[[int], NDArray[np.uint8]],
    min_correlation: float = CORRELATION,
    *,
    mirrors: bool = False,
    progress: bool = True,
) -> Pairs:
    """The pairs whose images match when laid over each other; distance is 1 - correlation.

    load(k) gives image k as uint8 [H, W, 3], of any size. `mirrors`: also try the second image mirrored and turned by
    180 degrees, at four times the cost.
    """
    textures = lru_cache(maxsize=2048)(lambda k: _textures(load(k)))
    flips = [(1, 1), (1, -1), (-1, 1), (-1, -1)] if mirrors else [(1, 1)]

    def compare(ends: tuple[int, int]) -> float:
        (a, a_fine), (b, b_fine) = textures(ends[0]), textures(ends[1])
        return max(_correlation((a, a_fine), (b[::y, ::x], b_fine[::y, ::x])) for y, x in flips)

    ends = list(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True))
    with ThreadPoolExecutor() as pool:  # the transforms release the interpreter lock
        compared = tqdm(pool.map(compare, ends), "comparing pairs", len(ends), disable=not progress, unit="pair")
        matches = np.array(list(compared))
    keep = matches >= min_correlation
    return Pairs(pairs.i[keep], pairs.j[keep], 1 - matches[keep])


def correlation(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """How well two RGB images [H, W, 3] match when laid over each other: normalised cross-correlation, at most 1.

    A central disc of either image is looked for in the other one: shifted by up to a quarter of the side, turned by up
    to 40 degrees, scaled by up to 1.7; first at 48 px, then, around the best positions, at 128 px. What is compared is
    texture with its local contrast normalised, so that two dark blobs on plain skin do not match. Mirror images do not.
    """
    return _correlation(_textures(a), _textures(b))


def _textures(image: NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """The image's band-passed luminance over its local deviation, float32 [48, 48] and [128, 128]."""
    return _texture(_luminance(image, _COARSE), 0.8, 4, 6, 4), _texture(_luminance(image, _FINE), 1.2, 6, 12, 3)


def _texture(grey: NDArray[np.float64], fine: float, coarse: float, window: float, floor: float) -> Floats:
    band = ndimage.gaussian_filter(grey, fine) - ndimage.gaussian_filter(grey, coarse)
    normalised: Floats = (band / (np.sqrt(ndimage.gaussian_filter(band**2, window)) + floor)).astype(np.float32)
    return normalised


def _correlation(a: tuple[Floats, Floats], b: tuple[Floats, Floats]) -> float:
    grid = [(scale, turn) for scale in _SCALES for turn in _TURNS]
    forth, back = _best_shifts(a[0], b[0], grid), _best_shifts(b[0], a[0], grid)
    # The disc of the closer view lies inside the wider one: that direction matches better.
    template, image, coarse = (a[1], b[1], forth) if forth.max() >= back.max() else (b[1], a[1], back)
    if coarse.max() < 0.65:  # true pairs reach 0.73 and more; most strangers need not be looked at closely
        return min(float(coarse.max()), 0.5)
    near = [grid[k] for k in np.argsort(-coarse)[:4]]
    offsets = [(scale, np.deg2rad(turn)) for scale in (0.97, 1, 1.03) for turn in (-3, 0, 3)]
    return float(_best_shifts(template, image, [(s * ds, t + dt) for s, t in near for ds, dt in offsets]).max())


def _best_shifts(template: Floats, image: Floats, poses: list[tuple[float, float]]) -> Floats:
    """[len(poses)]: for every (scale, turn) of the image, the highest correlation over all shifts of the disc.

    Normalised cross-correlation under a mask, by FFT (Padfield, IEEE Trans. Image Process. 21 (2012), eq. 8).
    """
    side = len(image)
    mask = _disc(side)
    area = mask.sum()
    template = mask * (template - (template * mask).sum() / area)
    posed = np.stack([_posed(image, scale, turn) for scale, turn in poses])
    size = (fft.next_fast_len(side * 3 // 2),) * 2  # shifts beyond the quarter may wrap round: they are not looked at

    def correlated(spectrum: NDArray[np.complex64], kernel: Floats) -> Floats:
        full: Floats = fft.irfft2(spectrum * np.conj(fft.rfft2(kernel, size)), size)
        return full

    spectrum = fft.rfft2(posed, size)
    sums, squares = correlated(spectrum, mask), correlated(fft.rfft2(posed**2, size), mask)
    floor = 0.1 * area * (posed**2).mean(axis=(1, 2), keepdims=True) + 1e-6  # plain regions must not divide by nothing
    spread = np.sqrt(np.maximum(squares - sums**2 / area, floor) * ((template**2).sum() + 1e-6))
    match = correlated(spectrum, template) / spread
    reach = side // 4
    match = np.concatenate([match[:, : reach + 1], match[:, -reach:]], axis=1)
    match = np.concatenate([match[:, :, : reach + 1], match[:, :, -reach:]], axis=2)
    best: Floats = match.max(axis=(1, 2))
    return best


@lru_cache
def _disc(side: int) -> Floats:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    disc: Floats = (np.hypot(y, x) < 0.4 * side).astype(np.float32)
    return disc


def _posed(image: Floats, scale: float, turn: float) -> Floats:
    """The image turned and scaled about its centre, zero outside."""
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    centre = np.full(2, (len(image) - 1) / 2)
    posed: Floats = ndimage.affine_transform(image, matrix, centre - matrix @ centre, order=1)
    return posed


# --- Pairs


def union(*found: Pairs) -> Pairs:
    """Pairs that any of several searches found, each once, with the distance of the first search that has it."""
    i, j, distance = (np.concatenate([getattr(pairs, name) for pairs in found]) for name in ("i", "j", "distance"))
    _, first = np.unique(np.stack([i, j]), axis=1, return_index=True)
    return Pairs(i[first], j[first], distance[first])


def groups(pairs: Pairs) -> list[list[int]]:
    """Connected components of the pairs: each a sorted list of at least two images, in order of their first."""
    members, ends = np.unique(np.concatenate([pairs.i, pairs.j]), return_inverse=True)
    size = (len(members), len(members))
    graph = coo_array((np.ones(len(pairs)), (ends[: len(pairs)], ends[len(pairs) :])), shape=size)
    number, component = connected_components(graph, directed=False)
    found: list[list[int]] = [[] for _ in range(number)]
    for member, of in zip(members.tolist(), component.tolist(), strict=True):
        found[of].append(member)
    return sorted(found)


def _pairs_in_blocks(
    number: int, distances: Callable[[int, int], NDArray[np.uint8] | Floats], limit: float, block: int
) -> Pairs:
    """Pairs with distance <= limit. distances(start, stop) -> [stop - start, number - start]: these against all later."""
    i, j, distance = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for start in range(0, number, block):
        near = distances(start, min(start + block, number))
        rows, columns = np.nonzero(near <= limit)
        rows, columns = rows[columns > rows], columns[columns > rows]
        i.append(rows + start)
        j.append(columns + start)
        distance.append(near[rows, columns].astype(np.float64))
    return Pairs(np.concatenate(i), np.concatenate(j), np.concatenate(distance))


def _luminance(image: NDArray[np.uint8], side: int) -> NDArray[np.float64]:
    """[side, side]: areas are averaged when shrinking, so that a shift by a pixel changes little."""
    grey = Image.fromarray(image).convert("L")
    method = Image.Resampling.BOX if min(grey.size) >= side else Image.Resampling.BICUBIC
    return np.asarray(grey.resize((side, side), method), dtype=np.float64)
