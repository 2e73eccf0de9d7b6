"""Detection of changed copies: training images that were mirrored, cropped, recoloured, painted over or joined.

detector = CopyDetector("bundles/demo")
detector.scores(images) >= COPY  # uint8 [N, R, R, 3]

The network gives a descriptor of the image and of each of its halves (`dermis.authenticity.copy_network`), and
`dermis.authenticity.copy_references` compares them with those of the training images. This is done in two passes:

1. Every image is described once, and the margin of the whole image is compared with a threshold. An image that was joined
   from two has a straight seam, at which neighbouring pixels differ more than elsewhere. About 5 % of other real images are
   candidates by one of the two.
2. Only the candidates are described in all eight orientations, and the mean descriptors are compared: whole and halves
   together, and, if there is a seam, each half by itself and the two parts that the seam separates, enlarged to whole images.
   The thresholds are such that 1 % of other real images reach any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.copy_references import (
    LEFT_RIGHT,
    MIN_REFERENCES,
    UPPER_LOWER,
    CopySearch,
    References,
    normalised,
    unpacked,
)
from dermis.authenticity.index import Floats
from dermis.authenticity.transformations import resized
from dermis.authenticity.verdict import FALSE_ALARMS
from dermis.bundle import find_part
from dermis.bundle.copies import COPIES_PART, LEAST_THRESHOLD, REFERENCES, WEIGHTS, Thresholds, open_copies_folder
from dermis.cpus import available_cpus
from dermis.errors import BundleError
from dermis.imaging import Images
from dermis.tensor_files import read_array

if TYPE_CHECKING:
    from dermis.authenticity.copy_network import CopyNetwork
    from dermis.bundle import Bundle

Describe = Callable[[Images], Floats]
"""Square images uint8 [N, R, R, 3] -> descriptors float32 [N, regions, dim]."""

CANDIDATES = 0.05
"""Share of other real images that the second pass examines."""
_FIRST_SHARES = (0.6, 0.4)  # of the candidates, by the whole image and by the seam
_SHARES = (0.75, 0.15, 0.1)  # of the false alarms, by whole and halves together, by a half, and by an enlarged part
_CAUTION = 0.9  # of the permitted false alarms: with other images there can be more than with those of the calibration
_SEAM_RANGE = (0.2, 0.8)  # of the side, in which seams are searched
_SEAM_WINDOW = 16  # a seam is compared with the lines at this part of the side on both sides of it
_SCORE_DECIMALS = 3
_BATCH = 32
_GROUP = 4  # images that one core describes together


def _tracked(mirrored: bool, turns: int) -> list[int]:
    """Return the region of a turned image in which the upper, lower, left and right half of the original are."""
    regions = []
    for row, column in ((slice(2), slice(4)), (slice(2, 4), slice(4)), (slice(4), slice(2)), (slice(4), slice(2, 4))):
        image = np.zeros((4, 4, 1), np.uint8)
        image[row, column] = 1
        view = oriented(image[None], mirrored, turns)[0, :, :, 0]
        covered = (view[:2].all(), view[2:].all(), view[:, :2].all(), view[:, 2:].all())
        regions.append(1 + int(np.argmax(covered)))
    return regions


def oriented(images: Images, mirrored: bool, turns: int) -> Images:
    """Turn images [N, H, W, C] by quarter turns, then mirror them."""
    turned = np.rot90(images, turns, axes=(1, 2))
    return np.ascontiguousarray(turned[:, :, ::-1] if mirrored else turned)


ORIENTATIONS = tuple((mirrored, turns, _tracked(mirrored, turns)) for turns in range(4) for mirrored in (False, True))


def mean_descriptors(describe: Describe, images: Images) -> References:
    """Return the mean descriptors of images uint8 [N, R, R, 3] over the eight orientations."""
    total = sum(
        (describe(oriented(images, mirrored, turns))[:, [0, *regions]] for mirrored, turns, regions in ORIENTATIONS),
        start=np.float32(0),
    )
    whole, halves = split(np.asarray(total, np.float32))
    return References(normalised(whole), normalised(halves))


def split(descriptors: Floats) -> tuple[Floats, Floats]:
    """Split descriptors [N, 5, dim] into those of whole images [N, dim] and of halves [N, 4, dim / 2], all of length 1."""
    dim = descriptors.shape[2]
    return normalised(descriptors[:, 0]), normalised(descriptors[:, 1:, : dim // 2])


def first_margins(describe: Describe, search: CopySearch, images: Images) -> Floats:
    """Return the margins [N, 2] of the first pass: of the whole image, and how much its best seam stands out."""
    starts = range(0, len(images), _BATCH)
    whole = np.concatenate([split(describe(images[start : start + _BATCH]))[0] for start in starts])
    seams = np.concatenate([find_seams(images[start : start + _BATCH])[0] for start in starts])
    return np.stack([search.whole_margins(whole), seams], axis=1)


def second_margins(describe: Describe, search: CopySearch, images: Images) -> Floats:
    """Return the margins [N, 3] of the second pass.

    They are those of whole and halves together, of the better half of the two on both sides of the best seam, and of the better
    one of the two parts that the seam separates, enlarged.
    """
    rows = []
    for start in range(0, len(images), _BATCH):
        batch = images[start : start + _BATCH]
        mean = mean_descriptors(describe, batch)
        _, places, horizontal = find_seams(batch)
        parts = [
            part
            for image, place, across in zip(batch, places.tolist(), horizontal.tolist(), strict=True)
            for part in enlarged_parts(image, place, across)
        ]
        sides = np.where(horizontal[:, None], UPPER_LOWER, LEFT_RIGHT)
        halves = np.take_along_axis(mean.halves, sides[:, :, None], axis=1).reshape(2 * len(batch), -1)
        margins = (search.half_margins(halves), search.whole_margins(split(describe(np.stack(parts)))[0]))
        joint = search.joint_margins(mean.whole, mean.halves)
        rows.append(np.stack([joint, *(each.reshape(-1, 2).max(axis=1) for each in margins)], axis=1))
    return np.concatenate(rows)


def find_seams(images: Images) -> tuple[Floats, NDArray[np.int64], NDArray[np.bool_]]:
    """Find the line at which an image was most probably joined from two.

    Args:
        images: uint8 [N, S, S, 3].

    Returns:
        Three arrays [N]: the mean difference of the pixels on both sides of the line, divided by the median of those of lines
        near it; the last row or column before the line; whether the line is horizontal.
    """
    side = images.shape[1]
    window = max(2, side // _SEAM_WINDOW)
    near = np.array([offset for offset in range(-window, window + 1) if abs(offset) > 1])
    places = np.arange(max(window, int(_SEAM_RANGE[0] * side)), min(side - 1 - window, int(_SEAM_RANGE[1] * side)))
    ratios = []
    for before, after in ((images[:, :-1], images[:, 1:]), (images[:, :, :-1], images[:, :, 1:])):
        difference = np.maximum(before, after) - np.minimum(before, after)
        largest = np.maximum(np.maximum(difference[..., 0], difference[..., 1]), difference[..., 2])
        profile = largest.mean(axis=2 if before.shape[1] < side else 1, dtype=np.float32)
        ratios.append((profile[:, places] + 0.5) / (np.median(profile[:, places[:, None] + near], axis=2) + 0.5))
    joined = np.concatenate(ratios, axis=1)
    best = joined.argmax(axis=1)
    return joined.max(axis=1).astype(np.float32), places[best % len(places)], best < len(places)


def enlarged_parts(image: Images, place: int, horizontal: bool) -> tuple[Images, Images]:
    """Cut an image uint8 [S, S, 3] after a row (horizontal) or column, and enlarge both parts to its size."""
    side = len(image)
    cut = place + 1
    parts = (image[:cut], image[cut:]) if horizontal else (image[:, :cut], image[:, cut:])
    return resized(parts[0], (side, side)), resized(parts[1], (side, side))


def calibrate(first: Floats, second: Floats, false_alarms: float = FALSE_ALARMS) -> Thresholds:
    """Choose thresholds so that this share of other images is called a copy.

    Args:
        first: Margins [N, 2] of the first pass, of real images that are not among the training images.
        second: Margins [N, 3] of the second pass, of the same images.
        false_alarms: Share of other images that may have a score of at least 1.
    """
    for_first = _thresholds(first, _FIRST_SHARES, CANDIDATES * false_alarms / FALSE_ALARMS)
    candidates = (first / for_first).max(axis=1) >= 1
    used = np.where(candidates[:, None], _used(first, second, for_first), 0)
    for_second = _thresholds(used, _SHARES, _CAUTION * false_alarms)
    for_second *= 1 + 10.0**-_SCORE_DECIMALS  # scores are rounded
    return Thresholds(
        (float(for_first[0]), float(for_first[1])),
        (float(for_second[0]), float(for_second[1]), float(for_second[2])),
    )


def scores_of(describe: Describe, search: CopySearch, thresholds: Thresholds, images: Images) -> Floats:
    """Return the scores [N] of square images uint8 [N, R, R, 3], N at least 1, rounded to three decimals.

    The score of a candidate is its largest margin in units of the threshold. That of another image is the same of the first
    pass, and below 1.
    """
    for_first, for_second = np.array(thresholds.first), np.array(thresholds.second)
    first = first_margins(describe, search, images)
    relative = (first / for_first).max(axis=1)
    candidates = np.flatnonzero(relative >= 1)
    scores = np.minimum(relative, 1 - 10.0**-_SCORE_DECIMALS)
    if len(candidates):
        used = _used(first[candidates], second_margins(describe, search, images[candidates]), for_first)
        scores[candidates] = (used / for_second).max(axis=1)
    rounded: Floats = np.round(scores, _SCORE_DECIMALS).astype(np.float32)
    return rounded


def _used(first: Floats, second: Floats, for_first: NDArray[np.float64]) -> Floats:
    """Return the margins of the second pass, with 0 for those of halves and parts of images that have no seam."""
    used = second.copy()
    used[first[:, 1] < for_first[1], 1:] = 0
    return used


def _thresholds(margins: Floats, shares: Sequence[float], rate: float) -> NDArray[np.float64]:
    """Return thresholds [K] of margins [N, K] so that `rate` of the images reach any, and `rate` times a share about each.

    The quantile is that of Harrell and Davis (1982), a weighted mean of several images, because 1 % of the images are few.
    """
    from scipy.stats.mstats import hdquantiles  # the gateway does not need it

    each = [np.quantile(column, 1 - rate * share) for column, share in zip(margins.T, shares, strict=True)]
    thresholds = np.maximum(np.array(each), LEAST_THRESHOLD)
    scale = hdquantiles((margins / thresholds).max(axis=1), [1 - rate])[0]
    scaled: NDArray[np.float64] = np.maximum(thresholds * float(scale), LEAST_THRESHOLD)
    return scaled


def describer(network: CopyNetwork, size: int, *, device: str = "cpu", threads: int | None = None) -> Describe:
    """Make the function that computes descriptors, with OpenVINO on a CPU if it is installed, in bfloat16 if it is native.

    Args:
        network: The network.
        size: Side in px to which images are resized.
        device: "auto", "cpu" or a CUDA device.
        threads: CPU cores to use; None for all that this process can use.
    """
    import torch

    from dermis.authenticity.copy_network import REGIONS
    from dermis.devices import resolve_device
    from dermis.features import bicubic, resize_matrix, torch_extract
    from dermis.features_openvino import Extract, OpenvinoFeatures
    from dermis.openvino_images import fastest_precision, have_openvino

    target = resolve_device(device)
    network = network.to(target).eval()
    half = torch.full((3, 1, 1), 127.5)
    extract: Extract = torch_extract(
        lambda images: network(bicubic(images, (size, size)).clamp(0, 255) / 127.5 - 1), target
    )
    if target.type == "cpu" and have_openvino():
        matrix = partial(resize_matrix, bicubic)
        # Rounding to bfloat16 turns a descriptor by much less than a change of the image does.
        precision = fastest_precision()
        extract = OpenvinoFeatures(
            network, (size, size), matrix, half, half, extract, threads=threads, precision=precision, group=_GROUP
        )
    shape = (len(REGIONS), network.projection.out_features)
    return lambda images: extract(images).reshape(len(images), *shape)


class CopyDetector:
    """A loaded copy detector. Safe to call from several threads. The score of an image does not depend on other images.

    Args:
        source: A bundle, or the folder or fsspec URL of a bundle or of a copy detector.
        device: "auto", "cpu" or a CUDA device.
        threads: CPU cores to use; None for all that this process can use.

    Raises:
        BundleError: There is no copy detector, or it is damaged.
    """

    def __init__(self, source: Bundle | str | Path, *, device: str = "auto", threads: int | None = None) -> None:
        from dermis.authenticity.copy_network import network_from

        where = find_copies(source)
        folder, self.description, _ = open_copies_folder(where)
        known = None if isinstance(source, str | Path) else source.copies
        if known is not None and known.digest != self.description.digest:
            raise BundleError(f"{where}: was changed since the bundle was opened; try again")
        weights = folder.read(WEIGHTS, self.description.files[WEIGHTS])
        network = network_from(weights, self.description.dim, f"{where}/{WEIGHTS}")
        references = folder.read(REFERENCES, self.description.files[REFERENCES])
        shape = (self.description.references, self.description.dim * 3 // 2)
        stored: NDArray[np.uint8] = read_array(references, f"{where}/{REFERENCES}", shape, ("|u1",))
        if self.description.references < MIN_REFERENCES:
            raise BundleError(
                f"{where}: has {self.description.references} references; at least {MIN_REFERENCES} are needed"
            )
        self._describe = describer(network, self.description.size, device=device, threads=threads)
        self._search = CopySearch(unpacked(stored, self.description.dim), threads or available_cpus())

    @property
    def identity(self) -> Mapping[str, str]:
        """The detector: scores depend on it, the libraries, the images and the kind of machine."""
        return {"copies": self.description.digest}

    def scores(self, images: Images) -> Floats:
        """Compute scores float32 [N] of square images uint8 [N, R, R, 3]; an image is a copy from 1.0 on."""
        if not len(images):
            return np.empty(0, np.float32)
        return scores_of(self._describe, self._search, self.description.thresholds, images)


def find_copies(source: Bundle | str | Path) -> str:
    """Return the folder of the copy detector of a bundle, or of one outside of a bundle.

    Raises:
        BundleError: The bundle has no copy detector.
    """
    return find_part(source, COPIES_PART, "has no copy detector; train one: dermis train copy-detector")
