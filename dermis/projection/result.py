"""The result of a projection, and its file.

The file is safetensors: `ws` float32 [num_ws, w_dim], `image` uint8 [R, R, 3], `noise.0` ... float32 [R, R] if noise maps were
optimised, and the other fields as JSON in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from dermis.errors import DataError, escape
from dermis.imaging import Images
from dermis.projection.schedule import Space, Start

_METADATA = "projection"
_FIELDS = ("distance", "distance_name", "pixel_error", "steps", "start", "space")


@dataclass(frozen=True)
class Projection:
    """A latent, its image, and the distance of that image to the projected one."""

    ws: NDArray[np.float32]
    """[num_ws, w_dim]; all rows are equal in the space w."""
    noise: tuple[NDArray[np.float32], ...] | None
    """Noise map [R, R] of each layer from the coarsest; None if those of the generator were kept."""
    image: Images
    """uint8 [R, R, 3]: the image of this latent and noise."""
    distance: float
    distance_name: str
    """The space of `distance`, a name of `dermis.projection.perceptual`."""
    pixel_error: float
    """Root mean squared difference of pixels, in 0..255."""
    steps: int
    start: Start
    space: Space
    frames: Images | None = None
    """uint8 [N, R, R, 3]: images during the optimisation, if requested; not stored in files."""


def fields_of(projection: Projection) -> dict[str, Any]:
    """Return all fields but the arrays, for JSON and tables."""
    return {name: getattr(projection, name) for name in _FIELDS}


def to_bytes(projection: Projection, origin: Mapping[str, str]) -> bytes:
    """Encode a projection as a file.

    Args:
        projection: The projection.
        origin: Image, bundle and options that it was made from. `from_bytes` returns it.
    """
    import safetensors.numpy

    arrays: dict[str, NDArray[Any]] = {"ws": projection.ws, "image": projection.image}
    for number, noise in enumerate(projection.noise or ()):
        arrays[f"noise.{number}"] = noise
    fields = json.dumps({**fields_of(projection), "origin": dict(origin)}, allow_nan=False, sort_keys=True)
    data: bytes = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata={_METADATA: fields}
    )
    return data


def from_bytes(data: bytes, where: str) -> tuple[Projection, dict[str, str]]:
    """Read a projection and its origin from the bytes of a file.

    Raises:
        DataError: The file is damaged, or not a projection. The message begins with `where`.
    """
    import safetensors
    import safetensors.numpy

    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
        noise = tuple(arrays[f"noise.{number}"] for number in range(len(arrays) - 2))
        projection = Projection(
            ws=arrays["ws"], noise=noise or None, image=arrays["image"], **{name: fields[name] for name in _FIELDS}
        )
        origin = {str(key): str(value) for key, value in fields["origin"].items()}
        whole = (
            projection.ws.ndim == 2
            and projection.ws.dtype == np.float32
            and bool(np.isfinite(projection.ws).all())
            and projection.image.ndim == 3
            and projection.image.dtype == np.uint8
            and projection.start in get_args(Start)
            and projection.space in get_args(Space)
        )
        if not whole:
            raise ValueError("its arrays are of another kind")
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: is not a complete projection ({escape(error)}); project the image again") from None
    return projection, origin
