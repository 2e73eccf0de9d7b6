"""Moving latents along directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.directions.direction import Direction
from dermis.errors import RequestError

MAX_STRENGTH = 20.0


@dataclass(frozen=True)
class Edit:
    """One move: a direction's name, how many of its standard deviations, and other layers than its own if given."""

    direction: str
    strength: float
    layers: tuple[int, int] | None = None


def apply_edits(
    ws: NDArray[np.float32], edits: Sequence[Edit], directions: Mapping[str, Direction]
) -> NDArray[np.float32]:
    """ws [N, num_ws, w_dim] after the edits, in order; a copy.

    ws[:, first:last] += strength * scale * vector for each. RequestError if a direction is unknown, a strength is not
    finite or above 20, or layers are outside the generator's.
    """
    moved = np.array(ws, dtype=np.float32, copy=True)
    for place, edit in enumerate(edits):
        direction = directions.get(edit.direction)
        if direction is None:
            known = ", ".join(sorted(directions)) or "none; run dermis directions fit"
            raise RequestError(f"edits[{place}].direction", f"{edit.direction!r} is unknown; this bundle has {known}")
        if not abs(edit.strength) <= MAX_STRENGTH:
            raise RequestError(f"edits[{place}].strength", f"must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
        first, last = edit.layers or direction.layers
        if not 0 <= first < last <= moved.shape[1]:
            raise RequestError(
                f"edits[{place}].layers",
                f"{first} to {last} are none of this generator's {moved.shape[1]} style vectors",
            )
        moved[:, first:last] += np.float32(edit.strength * direction.scale) * direction.vector
    return moved


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
