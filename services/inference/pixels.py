"""The format between the classifier or the index and their clients: one row per image in, one result per image out.

A row is the digest of the classifier or index, the options of the comparison, the pixels at the model's size, and zeros. All
rows of a deployment have the same length, so that rows of different callers and models can be in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dermis.authenticity.checker import Checker
    from dermis.classifier.onnx_session import Classifier

_DIGEST = 64
_OPTIONS = np.dtype([("exact_below", "<f8"), ("detect_copies", "u1")])
_HEADER = _DIGEST + _OPTIONS.itemsize


@dataclass(frozen=True)
class Comparison:
    """Options of a comparison with training images; see `dermis.authenticity.checker.Checker.nearest`."""

    exact_below: float = math.inf
    detect_copies: bool = True


def row_bytes(sides: Iterable[int]) -> int:
    """Length of a row that has space for an image of each of these sides in px."""
    return _HEADER + max((side**2 * 3 for side in sides), default=0)


def pack_rows(
    digest: str, inputs: NDArray[np.uint8], length: int, comparison: Comparison | None = None
) -> NDArray[np.uint8]:
    """Make rows.

    Args:
        digest: Digest of the classifier or index.
        inputs: uint8 [N, S, S, 3].
        length: Length of a row, see `row_bytes`.
        comparison: Options of a comparison; a classifier has none.

    Returns:
        uint8 [N, length].
    """
    rows = np.zeros((len(inputs), length), np.uint8)
    rows[:, :_DIGEST] = np.frombuffer(digest.encode("ascii"), np.uint8)
    flat = inputs.reshape(len(inputs), -1)
    rows[:, _HEADER : _HEADER + flat.shape[1]] = flat
    if comparison is not None:
        options = np.array((comparison.exact_below, comparison.detect_copies), _OPTIONS)
        rows[:, _DIGEST:_HEADER] = np.frombuffer(options.tobytes(), np.uint8)
    return rows


def classify_rows(classifiers: Mapping[str, Classifier], rows: NDArray[np.uint8]) -> list[float | str]:
    """Classify the images of rows.

    Args:
        classifiers: The loaded classifiers by digest.
        rows: Rows of `pack_rows`.

    Returns:
        A logit per row, or a text with the reason why there is none.
    """
    results: list[float | str] = [""] * len(rows)
    for (digest, _), positions in _positions(rows).items():
        classifier = classifiers.get(digest)
        logits: Sequence[float | str]
        if classifier is None:
            logits = [missing_message("classifier", digest)] * len(positions)
        else:
            logits = classifier.logits(_images(rows[positions], classifier.description.input.size)).tolist()
        for position, logit in zip(positions, logits, strict=True):
            results[position] = logit
    return results


def find_nearest(checkers: Mapping[str, Checker], rows: NDArray[np.uint8]) -> list[NDArray[np.float32] | str]:
    """Compare the images of rows with training images.

    Args:
        checkers: The loaded indexes by digest.
        rows: Rows of `pack_rows`.

    Returns:
        float32 [3 + dim] per row: distance, radius, score of the copy detector (NaN without one) and embedding
        (`dermis.authenticity.index.Nearest`), or a text with the reason why there is none. The number of the nearest training
        image is not returned.
    """
    results: list[NDArray[np.float32] | str] = [""] * len(rows)
    for (digest, comparison), positions in _positions(rows).items():
        checker = checkers.get(digest)
        if checker is None:
            for position in positions:
                results[position] = missing_message("index", digest)
            continue
        images = _images(rows[positions], checker.description.resolution)
        nearest = checker.nearest(images, exact_below=comparison.exact_below, detect_copies=comparison.detect_copies)
        scores = np.full(len(positions), np.nan, np.float32) if nearest.copy_scores is None else nearest.copy_scores
        columns = np.stack([nearest.distances, nearest.radii, scores], axis=1)
        for position, row in zip(positions, np.concatenate([columns, nearest.embeddings], axis=1), strict=True):
            results[position] = row
    return results


def missing_message(kind: str, digest: str) -> str:
    """The reason why a service cannot use the classifier or index with this digest."""
    return f"the service has no {kind} {digest[:12]}; restart the service to load it"


def _positions(rows: NDArray[np.uint8]) -> dict[tuple[str, Comparison], list[int]]:
    """The positions of the rows with each digest and options."""
    positions: dict[tuple[str, Comparison], list[int]] = {}
    for position, row in enumerate(rows):
        options = np.frombuffer(row[_DIGEST:_HEADER].tobytes(), _OPTIONS)[0]
        comparison = Comparison(float(options["exact_below"]), bool(options["detect_copies"]))
        positions.setdefault((row[:_DIGEST].tobytes().decode("ascii"), comparison), []).append(position)
    return positions


def _images(rows: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return rows[:, _HEADER : _HEADER + side**2 * 3].reshape(len(rows), side, side, 3)
