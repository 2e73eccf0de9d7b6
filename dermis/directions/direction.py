"""A named direction in w, and the file of a bundle that keeps them.

directions.safetensors holds one unit vector float32 [w_dim] a direction; its metadata holds the rest as JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dermis.errors import BundleError

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,63}"
Method = Literal["sefa", "ganspace", "class-means", "hyperplane"]
_METADATA = "directions"

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Direction:
    """A unit vector of w, the layers that it is for, and how far w usually goes along it."""

    name: str
    vector: Vector
    """float32 [w_dim], of length 1."""
    layers: tuple[int, int]
    """First and last + 1 of the style vectors that it moves, from the coarsest; (0, num_ws) for all."""
    scale: float
    """Standard deviation of w along the vector: what a strength of 1 moves by."""
    method: Method
    facts: Mapping[str, float | str] = field(default_factory=dict)
    """What was measured when it was found, for instance the share of the variance."""


def oriented(vector: NDArray[np.floating[Any]]) -> Vector:
    """The unit vector, turned so that its largest component is positive: eigenvectors have no sign of their own."""
    exact = np.asarray(vector, dtype=np.float64)
    exact = exact / np.linalg.norm(exact)
    turned: Vector = (exact * np.sign(exact[np.argmax(np.abs(exact))])).astype(np.float32)
    return turned


def to_bytes(directions: Sequence[Direction]) -> bytes:
    """directions.safetensors. BundleError if two have one name."""
    import safetensors.numpy

    names = [direction.name for direction in directions]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BundleError(f"directions: {min(twice)} is there twice; give each a name of its own")
    told = [
        {"name": d.name, "layers": list(d.layers), "scale": d.scale, "method": d.method, "facts": dict(d.facts)}
        for d in directions
    ]
    data: bytes = safetensors.numpy.save(
        {d.name: np.ascontiguousarray(d.vector) for d in directions},
        metadata={_METADATA: json.dumps(told, allow_nan=False, separators=(",", ":"))},
    )
    return data


def from_bytes(data: bytes, where: str, *, w_dim: int, num_ws: int) -> tuple[Direction, ...]:
    """The directions of a file, in its order. BundleError, naming `where`, if they are none of such a generator."""
    import safetensors
    import safetensors.numpy

    try:
        vectors = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
        found = tuple(_direction(row, vectors, w_dim, num_ws) for row in told)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{where}: holds no directions of this generator ({error}); fit them again") from None
    if len(found) != len(vectors) or len({direction.name for direction in found}) != len(found):
        raise BundleError(f"{where}: vectors and descriptions differ; fit the directions again")
    return found


def _direction(row: Mapping[str, Any], vectors: Mapping[str, NDArray[Any]], w_dim: int, num_ws: int) -> Direction:
    """ValueError or KeyError if something does not hold."""
    name, (first, last), vector = row["name"], row["layers"], vectors[row["name"]]
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(f"the name {name!r} does not match {NAME_PATTERN}")
    if vector.dtype != np.float32 or vector.shape != (w_dim,) or abs(float(np.linalg.norm(vector)) - 1) > 1e-3:
        raise ValueError(f"{name} is no unit vector of {w_dim} float32 numbers")
    if not 0 <= first < last <= num_ws:
        raise ValueError(f"{name}: layers {first} to {last} of {num_ws}")
    if row["method"] not in get_args(Method) or not (math.isfinite(row["scale"]) and row["scale"] > 0):
        raise ValueError(f"{name}: unknown method or a scale that is not above 0")
    return Direction(name, vector, (int(first), int(last)), float(row["scale"]), row["method"], dict(row["facts"]))
