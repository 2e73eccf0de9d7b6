"""The format between gateway and classifier: one row for each image in, one logit for each image out.

A row is the classifier's digest and the pixels at its size, filled up with zeros to the length that all rows of a
deployment have, so that rows of different callers and classifiers may share a batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dermis.bundle import Bundle
from dermis.classifier.description import Description

if TYPE_CHECKING:
    from dermis.classifier.onnx_session import Classifier

Classify = Callable[[Bundle, NDArray[np.uint8]], Awaitable[NDArray[np.float32]]]
"""(bundle with a classifier, uint8 [N, S, S, 3]) -> logits [N]."""

_DIGEST = 64


def row_bytes(classifiers: Iterable[Description]) -> int:
    """Length of a row that holds the input of any of these."""
    return _DIGEST + max((described.input.size**2 * 3 for described in classifiers), default=0)


def pack(digest: str, inputs: NDArray[np.uint8], length: int) -> NDArray[np.uint8]:
    """Rows uint8 [N, length] of inputs uint8 [N, S, S, 3] for the classifier of this digest."""
    rows = np.zeros((len(inputs), length), np.uint8)
    rows[:, :_DIGEST] = np.frombuffer(digest.encode("ascii"), np.uint8)
    flat = inputs.reshape(len(inputs), -1)
    rows[:, _DIGEST : _DIGEST + flat.shape[1]] = flat
    return rows


def run(classifiers: Mapping[str, Classifier], rows: NDArray[np.uint8]) -> list[float | str]:
    """Logits of `rows`, in their order; in place of one there may be the reason why it cannot be had."""
    results: list[float | str] = [""] * len(rows)
    places_of: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places_of.setdefault(row[:_DIGEST].tobytes().decode("ascii"), []).append(place)
    for digest, places in places_of.items():
        found: list[float | str]
        classifier = classifiers.get(digest)
        if classifier is None:
            told = f"the classifier service has no classifier {digest[:12]}; restart the service to load it"
            found = [told for _ in places]
        else:
            size = classifier.description.input.size
            inputs = rows[places, _DIGEST : _DIGEST + size**2 * 3].reshape(len(places), size, size, 3)
            found = classifier.logits(inputs).tolist()
        for place, item in zip(places, found, strict=True):
            results[place] = item
    return results
