"""Moving latents along directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dermis.bundle.directions import Direction
from dermis.errors import RequestError

if TYPE_CHECKING:
    from dermis.bundle import Bundle

MAX_STRENGTH = 20.0


@dataclass(frozen=True)
class Edit:
    """One move: a direction's name, how many of its standard deviations, and other layers than its own if given."""

    direction: str
    strength: float
    layers: tuple[int, int] | None = None


def offset_of(
    edits: Sequence[Edit], directions: Mapping[str, Direction], *, num_ws: int, w_dim: int
) -> NDArray[np.float32]:
    """What the edits add to any latent, float32 [num_ws, w_dim], summed in their order.

    offset[first:last] += strength * scale * vector for each. RequestError if a direction is unknown, a strength is not finite
    or above 20, or layers are outside the generator's.
    """
    offset = np.zeros((num_ws, w_dim), np.float32)
    for place, edit in enumerate(edits):
        direction = directions.get(edit.direction)
        if direction is None:
            known = ", ".join(sorted(directions)) or "none; run dermis directions fit"
            raise RequestError(f"edits[{place}].direction", f"{edit.direction!r} is unknown; this model has {known}")
        if not abs(edit.strength) <= MAX_STRENGTH:
            raise RequestError(f"edits[{place}].strength", f"must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
        first, last = edit.layers or direction.layers
        if not 0 <= first < last <= num_ws:
            raise RequestError(
                f"edits[{place}].layers", f"{first} to {last} are none of this generator's {num_ws} style vectors"
            )
        offset[first:last] += np.float32(edit.strength * direction.scale) * direction.vector
    return offset


def bundle_offset(bundle: Bundle, edits: Sequence[Edit]) -> NDArray[np.float32]:
    """`offset_of` with a bundle's directions and sizes."""
    config = bundle.generator
    known = {direction.name: direction for direction in bundle.directions}
    return offset_of(edits, known, num_ws=config.num_ws, w_dim=config.w_dim)


def apply_edits(
    ws: NDArray[np.float32], edits: Sequence[Edit], directions: Mapping[str, Direction]
) -> NDArray[np.float32]:
    """ws [N, num_ws, w_dim] after the edits; a copy. RequestError as in `offset_of`."""
    _, num_ws, w_dim = ws.shape
    return np.asarray(ws, np.float32) + offset_of(edits, directions, num_ws=num_ws, w_dim=w_dim)


def strip(
    w: NDArray[np.float32],
    direction: Direction,
    strengths: Sequence[float],
    *,
    base: Sequence[Edit] = (),
    directions: Mapping[str, Direction] | None = None,
) -> NDArray[np.float32]:
    """ws [len(strengths), num_ws, w_dim]: one latent [num_ws, w_dim] at each strength along a direction, after `base`."""
    known = {**(directions or {}), direction.name: direction}
    rows = [apply_edits(w[None], [*base, Edit(direction.name, strength)], known) for strength in strengths]
    return np.concatenate(rows)
