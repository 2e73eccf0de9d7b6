"""Find near-duplicates: copies of one image and repeated photographs of one lesion.

Near-duplicates across training and validation make every score too good, and a generator that is trained on copies learns to
repeat them. Perceptual hashes find copies, and embeddings find other views of a lesion. Both also propose pairs of different
lesions that look similar, so `confirmed` aligns the two images of a pair and keeps those that match. All pairs are compared, in
blocks: 40,000 images need about 1 GB, and no N x N matrix is made.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from dermis.perceptual_hash import luminance, mirrored

# Set by eye on a collection of dermoscopy (docs/artefacts.md): the first two select candidates, the third decides.
HASH_DISTANCE = 10  # maximum number of differing bits, of 64
EMBEDDING_SIMILARITY = 0.32  # minimum cosine of whitened lite0 features
CORRELATION = 0.8  # minimum correlation of the textures of two aligned images

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Pairs:
    """Pairs of images, i < j, in ascending order of (i, j). All arrays have the length P."""

    i: NDArray[np.int64]
    j: NDArray[np.int64]
    distance: NDArray[np.float64]  # differing bits, 1 - cosine similarity, or 1 - correlation; see the function

    def __len__(self) -> int:
        return len(self.i)


# --- Perceptual hash


def hash_pairs(hashes: NDArray[np.uint64], max_distance: int = HASH_DISTANCE, *, mirrors: bool = False) -> Pairs:
    """Find all pairs of similar hashes.

    Args:
        hashes: uint64 [N].
        max_distance: Largest number of differing bits, of 64.
        mirrors: Whether to find images that are mirrored or turned by 180 degrees, too. The smallest distance of the four
            positions is used.

    Returns:
        The pairs; their distance is the number of differing bits.
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
    """Find all pairs of similar features.

    Features are whitened first, which removes what all dermoscopic images have in common (Jégou & Chum, "Negative evidences and
    co-occurences in image retrieval", ECCV 2012, section 4).

    Args:
        features: [N, dim].
        min_similarity: Smallest cosine similarity of whitened features.
        components: Number of principal components for whitening, at most N / 10; 0 for no whitening.

    Returns:
        The pairs; their distance is 1 - similarity.
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
    # From the covariance, a [dim, dim] matrix, instead of an SVD of all features.
    variances, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64) / len(features))
    kept = slice(-min(components, features.shape[1]), None)
    scale = axes[:, kept] / np.sqrt(np.maximum(variances[kept], 1e-9 * variances[-1]))
    whitened: Floats = centred @ scale.astype(np.float32)
    return whitened


# --- Confirmation: align two images

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
    """Keep the pairs whose images match when aligned.

    Args:
        pairs: Proposed pairs.
        load: Loads image k as uint8 [H, W, 3] of any size.
        min_correlation: Smallest correlation of the aligned images.
        mirrors: Whether to try the second image mirrored and turned by 180 degrees, too, at four times the cost.
        progress: Whether to show a progress bar.

    Returns:
        The pairs that match; their distance is 1 - correlation.
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
    """Normalised cross-correlation of two RGB images [H, W, 3] when aligned, at most 1.

    A central disc of each image is searched for in the other one: shifted by up to a quarter of the side, turned by up to 40
    degrees, scaled by up to 1.7; first at 48 px and then, around the best positions, at 128 px. Textures with normalised local
    contrast are compared, so that two dark spots on plain skin do not match. Mirror images do not match either.
    """
    return _correlation(_textures(a), _textures(b))


def _textures(image: NDArray[np.uint8]) -> tuple[Floats, Floats]:
    """Band-passed luminance of an image over its local deviation, float32 [48, 48] and [128, 128]."""
    return _texture(luminance(image, _COARSE), 0.8, 4, 6, 4), _texture(luminance(image, _FINE), 1.2, 6, 12, 3)


def _texture(grey: NDArray[np.float64], fine: float, coarse: float, window: float, floor: float) -> Floats:
    band = ndimage.gaussian_filter(grey, fine) - ndimage.gaussian_filter(grey, coarse)
    normalised: Floats = (band / (np.sqrt(ndimage.gaussian_filter(band**2, window)) + floor)).astype(np.float32)
    return normalised


def _correlation(a: tuple[Floats, Floats], b: tuple[Floats, Floats]) -> float:
    grid = [(scale, turn) for scale in _SCALES for turn in _TURNS]
    forth, back = _best_shifts(a[0], b[0], grid), _best_shifts(b[0], a[0], grid)
    # The disc of the closer view is inside the wider view, so that direction matches better.
    template, image, coarse = (a[1], b[1], forth) if forth.max() >= back.max() else (b[1], a[1], back)
    if coarse.max() < 0.65:  # true pairs reach 0.73; most others are excluded here
        return min(float(coarse.max()), 0.5)
    near = [grid[k] for k in np.argsort(-coarse)[:4]]
    offsets = [(scale, np.deg2rad(turn)) for scale in (0.97, 1, 1.03) for turn in (-3, 0, 3)]
    return float(_best_shifts(template, image, [(s * ds, t + dt) for s, t in near for ds, dt in offsets]).max())


def _best_shifts(template: Floats, image: Floats, poses: list[tuple[float, float]]) -> Floats:
    """Highest correlation over all shifts of the disc, for every pose (scale, turn) of the image: [len(poses)].

    Normalised cross-correlation under a mask, by FFT (Padfield, IEEE Trans. Image Process. 21 (2012), eq. 8).
    """
    side = len(image)
    mask = _disc(side)
    area = mask.sum()
    template = mask * (template - (template * mask).sum() / area)
    posed = np.stack([_posed(image, scale, turn) for scale, turn in poses])
    size = (fft.next_fast_len(side * 3 // 2),) * 2  # larger shifts than a quarter wrap around; they are not used

    def correlated(spectrum: NDArray[np.complex64], kernel: Floats) -> Floats:
        full: Floats = fft.irfft2(spectrum * np.conj(fft.rfft2(kernel, size)), size)
        return full

    spectrum = fft.rfft2(posed, size)
    sums, squares = correlated(spectrum, mask), correlated(fft.rfft2(posed**2, size), mask)
    floor = 0.1 * area * (posed**2).mean(axis=(1, 2), keepdims=True) + 1e-6  # avoids division by 0 in plain regions
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
    """An image turned and scaled about its centre, zero outside."""
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    centre = np.full(2, (len(image) - 1) / 2)
    posed: Floats = ndimage.affine_transform(image, matrix, centre - matrix @ centre, order=1)
    return posed


# --- Pairs


def union(*searches: Pairs) -> Pairs:
    """Pairs of several searches, each once, with the distance of the first search that has it."""
    i, j, distance = (np.concatenate([getattr(pairs, name) for pairs in searches]) for name in ("i", "j", "distance"))
    _, first = np.unique(np.stack([i, j]), axis=1, return_index=True)
    return Pairs(i[first], j[first], distance[first])


def groups(pairs: Pairs) -> list[list[int]]:
    """Connected components of the pairs: sorted lists of at least two images, ordered by their first image."""
    members, ends = np.unique(np.concatenate([pairs.i, pairs.j]), return_inverse=True)
    size = (len(members), len(members))
    graph = coo_array((np.ones(len(pairs)), (ends[: len(pairs)], ends[len(pairs) :])), shape=size)
    number, component = connected_components(graph, directed=False)
    components: list[list[int]] = [[] for _ in range(number)]
    for member, index in zip(members.tolist(), component.tolist(), strict=True):
        components[index].append(member)
    return sorted(components)


def _pairs_in_blocks(
    number: int, distances: Callable[[int, int], NDArray[np.uint8] | Floats], limit: float, block: int
) -> Pairs:
    """Find the pairs with a distance of at most `limit`.

    Args:
        number: Number of images.
        distances: Returns the distances [stop - start, number - start] of images start to stop - 1 to those from start on.
        limit: Largest distance.
        block: Number of images in a call of `distances`.
    """
    i, j, distance = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0)]
    for start in range(0, number, block):
        near = distances(start, min(start + block, number))
        rows, columns = np.nonzero(near <= limit)
        rows, columns = rows[columns > rows], columns[columns > rows]
        i.append(rows + start)
        j.append(columns + start)
        distance.append(near[rows, columns].astype(np.float64))
    return Pairs(np.concatenate(i), np.concatenate(j), np.concatenate(distance))
