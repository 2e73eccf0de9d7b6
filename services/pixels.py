"""The format between gateway and what looks at images, classifier and index: a row for each image in, a result for each out.

A row is the digest of the classifier or index and the pixels at its size, filled up with zeros to the length that all rows
of a deployment have, so that rows of different callers and classifiers may share a batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.index import Nearest
from dermis.bundle import Bundle

if TYPE_CHECKING:
    from dermis.authenticity.checker import Checker
    from dermis.classifier.onnx_session import Classifier

Classify = Callable[[Bundle, NDArray[np.uint8]], Awaitable[NDArray[np.float32]]]
"""(bundle with a classifier, uint8 [N, S, S, 3]) -> logits [N]."""
FindNearest = Callable[[Bundle, NDArray[np.uint8]], Awaitable[Nearest]]
"""(bundle with an index, uint8 [N, R, R, 3] at the index's resolution) -> nearest training images."""

_DIGEST = 64


def row_bytes(sides: Iterable[int]) -> int:
    """Length of a row that holds an image of any of these sides in px."""
    return _DIGEST + max((side**2 * 3 for side in sides), default=0)


def pack(digest: str, inputs: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """Rows uint8 [N, length] of inputs uint8 [N, S, S, 3] for the classifier or index of this digest."""
    rows = np.zeros((len(inputs), length), np.uint8)
    rows[:, :_DIGEST] = np.frombuffer(digest.encode("ascii"), np.uint8)
    flat = inputs.reshape(len(inputs), -1)
    rows[:, _DIGEST : _DIGEST + flat.shape[1]] = flat
    return rows


def run(classifiers: Mapping[str, Classifier], rows: NDArray[np.uint8]) -> list[float | str]:
    """Logits of `rows`, in their order; in place of one there may be the reason why it cannot be had."""
    results: list[float | str] = [""] * len(rows)
    for digest, places in _places(rows).items():
        classifier = classifiers.get(digest)
        found: Sequence[float | str]
        if classifier is None:
            found = [_missing("classifier", digest)] * len(places)
        else:
            found = classifier.logits(_images(rows[places], classifier.description.input.size)).tolist()
        for place, item in zip(places, found, strict=True):
            results[place] = item
    return results


def find_nearest(checkers: Mapping[str, Checker], rows: NDArray[np.uint8]) -> list[NDArray[np.float32] | str]:
    """Of each row float32 [2 + dim]: distance, radius and embedding (`dermis.authenticity.index.Nearest`), or a reason.

    Which training image is nearest stays here.
    """
    results: list[NDArray[np.float32] | str] = [""] * len(rows)
    for digest, places in _places(rows).items():
        checker = checkers.get(digest)
        if checker is None:
            for place in places:
                results[place] = _missing("index", digest)
            continue
        found = checker.nearest(_images(rows[places], checker.description.resolution))
        for place, *row in zip(places, found.distances, found.radii, found.embeddings, strict=True):
            results[place] = np.concatenate([row[0][None], row[1][None], row[2]])
    return results


def _places(rows: NDArray[np.uint8]) -> dict[str, list[int]]:
    """The places of the rows of each digest."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row[:_DIGEST].tobytes().decode("ascii"), []).append(place)
    return places


def _images(rows: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return rows[:, _DIGEST : _DIGEST + side**2 * 3].reshape(len(rows), side, side, 3)


def _missing(kind: str, digest: str) -> str:
    return f"the service has no {kind} {digest[:12]}; restart the service to load it"
