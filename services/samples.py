"""The format between gateway and generator: one row for each sample in, one uint8 image for each sample out.

A row says everything that its image depends on, so that rows of different callers may share a batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.dataset.request import NoiseMode

if TYPE_CHECKING:
    from dermis.synthesizer import Synthesizer

NOISE_MODES: tuple[NoiseMode, ...] = ("const", "random", "none")

SAMPLE = np.dtype(
    [
        ("model", "S64"),  # digest of the bundle: a name could mean another bundle to another process
        ("seed", "<i8"),
        ("index", "<i8"),
        ("label", "<i4"),
        ("truncation_psi", "<f8"),
        ("truncation_cutoff", "<i4"),  # -1: all layers
        ("noise_mode", "u1"),  # index into NOISE_MODES
    ]
)

Samples = NDArray[Any]  # [N] of dtype SAMPLE
Image = NDArray[np.uint8]  # [H, W, 3]
Generate = Callable[[Samples], Awaitable[list[Image]]]


@dataclass(frozen=True)
class Options:
    """What the samples of one call have in common."""

    digest: str
    truncation_psi: float = 1.0
    truncation_cutoff: int | None = None
    noise_mode: str = "const"


def pack(options: Options, seeds: int | Sequence[int], indices: Sequence[int], labels: Sequence[int]) -> Samples:
    """Rows of one call. `seeds` is one seed for all samples or one for each."""
    rows = np.empty(len(indices), SAMPLE)
    rows["model"] = options.digest.encode("ascii")
    rows["seed"] = seeds
    rows["index"] = indices
    rows["label"] = labels
    rows["truncation_psi"] = options.truncation_psi
    rows["truncation_cutoff"] = -1 if options.truncation_cutoff is None else options.truncation_cutoff
    rows["noise_mode"] = NOISE_MODES.index(options.noise_mode)
    return rows


def to_bytes(rows: Samples) -> NDArray[np.uint8]:
    """Rows as uint8 [N, SAMPLE.itemsize], the form in which they travel."""
    return rows.view(np.uint8).reshape(len(rows), SAMPLE.itemsize)


def from_bytes(data: NDArray[np.uint8]) -> Samples:
    """The inverse of `to_bytes`."""
    return np.ascontiguousarray(data, dtype=np.uint8).view(SAMPLE).reshape(len(data))


def run(synthesizers: Mapping[str, Synthesizer], rows: Samples) -> list[Image | str]:
    """Images of `rows`, in their order; rows with equal options run together.

    In place of an image there may be the reason why it cannot be had: other callers' rows of the batch are not to suffer.
    """
    images: list[Any] = [None] * len(rows)
    for places in _groups(rows):
        first = rows[places[0]]
        digest = bytes(first["model"]).decode("ascii")
        synthesizer = synthesizers.get(digest)
        if synthesizer is None:
            made: Any = [f"the generator has no model with digest {digest[:12]}; restart the service to load it"] * len(
                places
            )
        else:
            cutoff = int(first["truncation_cutoff"])
            made = synthesizer.images(
                rows["seed"][places].tolist(),
                rows["index"][places].tolist(),
                rows["label"][places].tolist(),
                truncation_psi=float(first["truncation_psi"]),
                truncation_cutoff=None if cutoff < 0 else cutoff,
                noise_mode=NOISE_MODES[int(first["noise_mode"])],
            )
        for place, image in zip(places, made, strict=True):
            images[place] = image
    return images


def _groups(rows: Samples) -> list[list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows[["model", "truncation_psi", "truncation_cutoff", "noise_mode"]].tolist()):
        groups.setdefault(row, []).append(place)
    return list(groups.values())
