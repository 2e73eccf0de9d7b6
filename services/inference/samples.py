"""The format between the generator and its client: one row per sample in, one uint8 image per sample out.

A row contains everything that its image depends on, so that rows of different callers can be in one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dermis.dataset.request import MAX_EDITS
from dermis.directions.edit import Edit, bundle_offset
from dermis.network_config import NoiseMode

if TYPE_CHECKING:
    from dermis.synthesizer import Synthesizer

NOISE_MODES: tuple[NoiseMode, ...] = ("const", "random", "none")

EDIT = np.dtype(
    [
        ("direction", "<u2"),  # number in the file of the bundle, plus 1; 0 means no edit, and no further ones
        ("strength", "<f8"),
        ("first", "<i2"),  # -1: the layers of the direction
        ("last", "<i2"),
    ]
)

SAMPLE = np.dtype(
    [
        ("model", "S64"),  # digest of the bundle; its name could mean another bundle in another process
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


@dataclass(frozen=True)
class Options:
    """The options that all samples of a call share.

    Attributes:
        digest: Digest of the bundle.
        truncation_psi: Truncation.
        truncation_cutoff: Number of layers that are truncated; None means all.
        noise_mode: The noise of the generator.
        edits: Edits of the latents.
        directions: Names of the directions of the bundle, in the order of its file; required if there are edits.
    """

    digest: str
    truncation_psi: float = 1.0
    truncation_cutoff: int | None = None
    noise_mode: NoiseMode = "random"
    edits: Sequence[Edit] = ()
    directions: Sequence[str] = ()


def pack_rows(options: Options, seeds: int | Sequence[int], indices: Sequence[int], labels: Sequence[int]) -> Samples:
    """Make the rows of a call.

    Args:
        options: The options of all samples.
        seeds: One seed for all samples, or one for each.
        indices: Index of each sample.
        labels: Class number of each sample.

    Raises:
        ValueError: If a direction is unknown.
    """
    rows = np.zeros(len(indices), SAMPLE)
    rows["model"] = options.digest.encode("ascii")
    rows["seed"] = seeds
    rows["index"] = indices
    rows["label"] = labels
    rows["truncation_psi"] = options.truncation_psi
    rows["truncation_cutoff"] = -1 if options.truncation_cutoff is None else options.truncation_cutoff
    rows["noise_mode"] = NOISE_MODES.index(options.noise_mode)
    for position, edit in enumerate(options.edits):
        number = options.directions.index(edit.direction) + 1
        rows["edits"][:, position] = np.array((number, edit.strength, *(edit.layers or (-1, -1))), EDIT)
    return rows


def to_bytes(rows: Samples) -> NDArray[np.uint8]:
    """Rows as uint8 [N, SAMPLE.itemsize], as they are sent."""
    return rows.view(np.uint8).reshape(len(rows), SAMPLE.itemsize)


def from_bytes(data: NDArray[np.uint8]) -> Samples:
    """The inverse of `to_bytes`."""
    return np.ascontiguousarray(data, dtype=np.uint8).view(SAMPLE).reshape(len(data))


def generate_rows(synthesizers: Mapping[str, Synthesizer], rows: Samples) -> list[Image | str]:
    """Generate the images of rows. Rows with equal options run together.

    Args:
        synthesizers: The loaded generators by digest of the bundle.
        rows: Rows of `pack_rows`.

    Returns:
        An image per row, or a text with the reason why there is none: the rows of other callers in the batch must not fail.
    """
    results: list[Any] = [None] * len(rows)
    for positions in _groups(rows):
        first = rows[positions[0]]
        digest = bytes(first["model"]).decode("ascii")
        synthesizer = synthesizers.get(digest)
        if synthesizer is None:
            images: Any = [missing_message(digest)] * len(positions)
        else:
            cutoff = int(first["truncation_cutoff"])
            images = synthesizer.images(
                rows["seed"][positions].tolist(),
                rows["index"][positions].tolist(),
                rows["label"][positions].tolist(),
                truncation_psi=float(first["truncation_psi"]),
                truncation_cutoff=None if cutoff < 0 else cutoff,
                noise_mode=NOISE_MODES[int(first["noise_mode"])],
                offset=_offset(synthesizer, first["edits"]),
            )
        for position, image in zip(positions, images, strict=True):
            results[position] = image
    return results


def missing_message(digest: str) -> str:
    """The reason why the generator cannot use the bundle with this digest."""
    return f"the generator has no model with digest {digest[:12]}; restart the service to load it"


def _offset(synthesizer: Synthesizer, rows: NDArray[Any]) -> NDArray[np.float32] | None:
    """The sum of the edits of a row, which is added to its latent; None if it has no edits."""
    bundle = synthesizer.bundle
    edits = [
        Edit(bundle.directions[int(number) - 1].name, float(strength), None if first < 0 else (int(first), int(last)))
        for number, strength, first, last in rows.tolist()
        if number > 0
    ]
    if not edits:
        return None
    return bundle_offset(bundle, edits)


def _groups(rows: Samples) -> list[list[int]]:
    """Positions of the rows that differ only in seed, index and label."""
    groups: dict[bytes, list[int]] = {}
    shared = rows.copy()
    for name in ("seed", "index", "label"):
        shared[name] = 0
    for position in range(len(rows)):
        groups.setdefault(shared[position].tobytes(), []).append(position)
    return list(groups.values())
