"""Named directions of w, and directions.safetensors, the file of a bundle that stores them.

The file has one unit vector float32 [w_dim] for each direction. Its metadata has the other fields as JSON.
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
Method = Literal["sefa", "ganspace", "class-means", "hyperplane", "random"]
_METADATA = "directions"

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Direction:
    """A unit vector of w, the layers that it applies to, and how much w varies along it."""

    name: str
    vector: Vector
    """float32 [w_dim], of length 1."""
    layers: tuple[int, int]
    """First and last + 1 of the style vectors that it changes, from the coarsest; (0, num_ws) for all."""
    scale: float
    """Standard deviation of w along the vector: the step of an edit with strength 1."""
    method: Method
    facts: Mapping[str, float | str] = field(default_factory=dict)
    """Measurements from the fit, for instance the share of the variance."""


def encode_directions(directions: Sequence[Direction]) -> bytes:
    """Return the content of directions.safetensors.

    Raises:
        BundleError: Two directions have the same name.
    """
    import safetensors.numpy

    names = [direction.name for direction in directions]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise BundleError(f"directions: {min(repeated)} occurs more than once; names must be unique")
    rows = [
        {"name": d.name, "layers": list(d.layers), "scale": d.scale, "method": d.method, "facts": dict(d.facts)}
        for d in directions
    ]
    data: bytes = safetensors.numpy.save(
        {d.name: np.ascontiguousarray(d.vector) for d in directions},
        metadata={_METADATA: json.dumps(rows, allow_nan=False, separators=(",", ":"))},
    )
    return data


def decode_directions(data: bytes, where: str, *, w_dim: int, num_ws: int) -> tuple[Direction, ...]:
    """Read the directions of a file, in the order of the file.

    Args:
        data: Content of the file.
        where: Name of the file for errors.
        w_dim: Dimensions of the generator's w.
        num_ws: Number of the generator's style vectors.

    Raises:
        BundleError: The file is malformed, or its directions do not fit the generator.
    """
    vectors, header = read_vectors(data, where), read_header(data, where)
    if _METADATA not in header.metadata:
        raise BundleError(f"{where}: holds no directions; fit them again")
    try:
        rows = _Rows.model_validate({"rows": parse_json(header.metadata[_METADATA].encode())}).rows
        directions = tuple(_direction(row, vectors, w_dim, num_ws) for row in rows)
    except ValidationError as error:
        first = error.errors()[0]
        field = escape(".".join(map(str, first["loc"][1:])))
        raise BundleError(f"{where}: {field}: {first['msg']}; fit the directions again") from None
    except ValueError as error:
        raise BundleError(f"{where}: holds no directions of this generator ({error}); fit them again") from None
    if len(directions) != len(vectors) or len({direction.name for direction in directions}) != len(directions):
        raise BundleError(f"{where}: vectors and descriptions differ; fit the directions again")
    return directions


class _Row(BaseModel):
    """The fields of a direction without its vector."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    layers: list[int] = Field(min_length=2, max_length=2)
    scale: float = Field(gt=0)
    method: Method
    facts: dict[str, float | str]


class _Rows(BaseModel):
    rows: list[_Row]


def _direction(row: _Row, vectors: Mapping[str, NDArray[Any]], w_dim: int, num_ws: int) -> Direction:
    """Join a row with its vector. Raises ValueError if they do not fit the generator."""
    vector, (first, last) = vectors.get(row.name), row.layers
    if vector is None:
        raise ValueError(f"{row.name} has no vector")
    if vector.dtype != np.float32 or vector.shape != (w_dim,) or not abs(float(np.linalg.norm(vector)) - 1) <= 1e-3:
        raise ValueError(f"{row.name} is not a unit vector of {w_dim} float32 numbers")
    if not 0 <= first < last <= num_ws:
        raise ValueError(f"{row.name}: layers {first} to {last} of {num_ws}")
    return Direction(row.name, vector, (first, last), row.scale, row.method, row.facts)
