"""Edit latents along directions."""

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
    """A move of a latent along a direction.

    Attributes:
        direction: Name of the direction.
        strength: Number of standard deviations of w along the direction.
        layers: First and last + 1 of the style vectors to move; None for those of the direction.
    """

    direction: str
    strength: float
    layers: tuple[int, int] | None = None


def offset_of(
    edits: Sequence[Edit], directions: Mapping[str, Direction], *, num_ws: int, w_dim: int
) -> NDArray[np.float32]:
    """Compute what edits add to a latent: the sum of strength * scale * vector over the edits, in their order.

    Args:
        edits: The edits.
        directions: The directions by name.
        num_ws: Number of the generator's style vectors.
        w_dim: Dimensions of its w.

    Returns:
        float32 [num_ws, w_dim].

    Raises:
        RequestError: A direction is unknown, a strength is not finite or beyond 20, or layers are outside the generator's.
    """
    offset = np.zeros((num_ws, w_dim), np.float32)
    for position, edit in enumerate(edits):
        direction = directions.get(edit.direction)
        if direction is None:
            known = ", ".join(sorted(directions)) or "none; run dermis directions fit"
            raise RequestError(f"edits[{position}].direction", f"{edit.direction!r} is unknown; this model has {known}")
        if not abs(edit.strength) <= MAX_STRENGTH:
            raise RequestError(f"edits[{position}].strength", f"must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}")
        first, last = edit.layers or direction.layers
        if not 0 <= first < last <= num_ws:
            raise RequestError(
                f"edits[{position}].layers", f"{first} to {last} is outside this generator's {num_ws} style vectors"
            )
        offset[first:last] += np.float32(edit.strength * direction.scale) * direction.vector
    return offset


def bundle_offset(bundle: Bundle, edits: Sequence[Edit]) -> NDArray[np.float32]:
    """Compute `offset_of` with the directions and sizes of a bundle.

    Raises:
        RequestError: As `offset_of`.
    """
    config = bundle.generator
    known = {direction.name: direction for direction in bundle.directions}
    return offset_of(edits, known, num_ws=config.num_ws, w_dim=config.w_dim)


def apply_edits(
    ws: NDArray[np.float32], edits: Sequence[Edit], directions: Mapping[str, Direction]
) -> NDArray[np.float32]:
    """Return a copy of ws [N, num_ws, w_dim] with the edits applied.

    Raises:
        RequestError: As `offset_of`.
    """
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
    """Move one latent along a direction by several strengths.

    Args:
        w: The latent, float32 [num_ws, w_dim].
        direction: The direction.
        strengths: The strengths.
        base: Edits that are applied first.
        directions: The directions of `base`, by name.

    Returns:
        float32 [len(strengths), num_ws, w_dim].
    """
    known = {**(directions or {}), direction.name: direction}
    rows = [apply_edits(w[None], [*base, Edit(direction.name, strength)], known) for strength in strengths]
    return np.concatenate(rows)
