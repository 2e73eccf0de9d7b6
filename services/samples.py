"""The format between gateway and generator: one row for each sample in, one uint8 image for each sample out.

A row says everything that its image depends on, so that rows of different callers may share a batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.dataset.request import MAX_EDITS
from dermis.directions.edit import Edit, bundle_offset
from dermis.network_config import NoiseMode

if TYPE_CHECKING:
    from dermis.bundle import Bundle
    from dermis.synthesizer import Synthesizer

NOISE_MODES: tuple[NoiseMode, ...] = ("const", "random", "none")

EDIT = np.dtype(
    [
        ("direction", "<u2"),  # number in the bundle's file, plus 1; 0: no edit, and none after it
        ("strength", "<f8"),
        ("first", "<i2"),  # -1: the direction's own layers
        ("last", "<i2"),
    ]
)

SAMPLE = np.dtype(
    [
        ("model", "S64"),  # digest of the bundle: a name could mean another bundle to another process
        ("seed", "<i8"),
        ("index", "<i8"),
        ("label", "<i4"),
        ("truncation_psi", "<f8"),
        ("truncation_cutoff", "<i4"),  # -1: all layers
        ("noise_mode", "u1"),  # index into NOISE_MODES
        ("edits", EDIT, MAX_EDITS),
    ]
)

Samples = NDArray[Any]  # [N] of dtype SAMPLE
Image = NDArray[np.uint8]  # [H, W, 3]
Generate = Callable[[Samples], Awaitable[list[Image]]]
Draw = Callable[["Bundle", NDArray[np.float32], str], Awaitable[list[Image]]]
"""(bundle, ws [N, num_ws, w_dim], noise mode) -> images."""


@dataclass(frozen=True)
class Options:
    """What the samples of one call have in common."""

    digest: str
    truncation_psi: float = 1.0
    truncation_cutoff: int | None = None
    noise_mode: NoiseMode = "random"
    edits: Sequence[Edit] = ()
    directions: Sequence[str] = ()
    """Names of the bundle's directions, in the order of its file. Needed where there are edits."""


def pack(options: Options, seeds: int | Sequence[int], indices: Sequence[int], labels: Sequence[int]) -> Samples:
    """Rows of one call. `seeds` is one seed for all samples or one for each. ValueError if a direction is unknown."""
    rows = np.zeros(len(indices), SAMPLE)
    rows["model"] = options.digest.encode("ascii")
    rows["seed"] = seeds
    rows["index"] = indices
    rows["label"] = labels
    rows["truncation_psi"] = options.truncation_psi
    rows["truncation_cutoff"] = -1 if options.truncation_cutoff is None else options.truncation_cutoff
    rows["noise_mode"] = NOISE_MODES.index(options.noise_mode)
    for place, edit in enumerate(options.edits):
        number = options.directions.index(edit.direction) + 1
        rows["edits"][:, place] = np.array((number, edit.strength, *(edit.layers or (-1, -1))), EDIT)
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
                offset=_offset(synthesizer, first["edits"]),
            )
        for place, image in zip(places, made, strict=True):
            images[place] = image
    return images


def _offset(synthesizer: Synthesizer, edits: NDArray[Any]) -> NDArray[np.float32] | None:
    """What the edits of a row add to its latent; None if it has none."""
    bundle = synthesizer.bundle
    wanted = [
        Edit(bundle.directions[int(number) - 1].name, float(strength), None if first < 0 else (int(first), int(last)))
        for number, strength, first, last in edits.tolist()
        if number > 0
    ]
    if not wanted:
        return None
    return bundle_offset(bundle, wanted)


def _groups(rows: Samples) -> list[list[int]]:
    """Places of the rows that differ in nothing but seed, index and label."""
    groups: dict[bytes, list[int]] = {}
    shared = rows.copy()
    for name in ("seed", "index", "label"):
        shared[name] = 0
    for place in range(len(rows)):
        groups.setdefault(shared[place].tobytes(), []).append(place)
    return list(groups.values())
