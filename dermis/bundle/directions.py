"""A named direction in w, and the file of a bundle that keeps them.

directions.safetensors holds one unit vector float32 [w_dim] a direction; its metadata holds the rest as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dermis.errors import BundleError, escape
from dermis.strict_json import parse_json
from dermis.tensor_files import read_header, read_vectors

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
    vectors, header = read_vectors(data, where), read_header(data, where)
    if _METADATA not in header.metadata:
        raise BundleError(f"{where}: holds no directions; fit them again")
    try:
        rows = _Rows.model_validate({"rows": parse_json(header.metadata[_METADATA].encode())}).rows
        found = tuple(_direction(row, vectors, w_dim, num_ws) for row in rows)
    except ValidationError as error:
        first = error.errors()[0]
        field = escape(".".join(map(str, first["loc"][1:])))
        raise BundleError(f"{where}: {field}: {first['msg']}; fit the directions again") from None
    except ValueError as error:
        raise BundleError(f"{where}: holds no directions of this generator ({error}); fit them again") from None
    if len(found) != len(vectors) or len({direction.name for direction in found}) != len(found):
        raise BundleError(f"{where}: vectors and descriptions differ; fit the directions again")
    return found


class _Row(BaseModel):
    """A direction without its vector."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    layers: list[int] = Field(min_length=2, max_length=2)
    scale: float = Field(gt=0)
    method: Method
    facts: dict[str, float | str]


class _Rows(BaseModel):
    rows: list[_Row]


def _direction(row: _Row, vectors: Mapping[str, NDArray[Any]], w_dim: int, num_ws: int) -> Direction:
    """ValueError if something does not hold."""
    vector, (first, last) = vectors.get(row.name), row.layers
    if vector is None:
        raise ValueError(f"{row.name} has no vector")
    if vector.dtype != np.float32 or vector.shape != (w_dim,) or not abs(float(np.linalg.norm(vector)) - 1) <= 1e-3:
        raise ValueError(f"{row.name} is no unit vector of {w_dim} float32 numbers")
    if not 0 <= first < last <= num_ws:
        raise ValueError(f"{row.name}: layers {first} to {last} of {num_ws}")
    return Direction(row.name, vector, (first, last), row.scale, row.method, row.facts)
