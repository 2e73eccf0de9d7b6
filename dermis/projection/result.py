"""What a projection gives, and the file that keeps it.

A file is safetensors: `ws` float32 [num_ws, w_dim], `image` uint8 [R, R, 3], `noise.0` ... float32 [R, R] where noise maps were
searched, and the rest as JSON in its metadata.
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
_FACTS = ("distance", "distance_name", "pixel_error", "steps", "start", "space")


@dataclass(frozen=True)
class Projection:
    """A latent, its image, and how near that is to the one that was projected."""

    ws: NDArray[np.float32]
    """[num_ws, w_dim]; all rows equal in the space w."""
    noise: tuple[NDArray[np.float32], ...] | None
    """Noise maps [R, R], one a layer from the coarsest; None if the generator's own were kept."""
    image: Images
    """uint8 [R, R, 3]: what the generator draws of them."""
    distance: float
    distance_name: str
    """The space of `distance`, a name of `dermis.projection.perceptual`."""
    pixel_error: float
    """Root mean squared difference of pixels, in 0..255."""
    steps: int
    start: Start
    space: Space
    frames: Images | None = None
    """uint8 [N, R, R, 3] of the way there, where they were asked for; not kept in files."""


def facts_of(projection: Projection) -> dict[str, Any]:
    """All but the arrays, for JSON and tables."""
    return {name: getattr(projection, name) for name in _FACTS}


def to_bytes(projection: Projection, origin: Mapping[str, str]) -> bytes:
    """The file. `origin`: what it was made of and with, strings that `read_origin` gives back."""
    import safetensors.numpy

    arrays: dict[str, NDArray[Any]] = {"ws": projection.ws, "image": projection.image}
    for number, noise in enumerate(projection.noise or ()):
        arrays[f"noise.{number}"] = noise
    told = json.dumps({**facts_of(projection), "origin": dict(origin)}, allow_nan=False, sort_keys=True)
    data: bytes = safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata={_METADATA: told}
    )
    return data


def from_bytes(data: bytes, where: str) -> tuple[Projection, dict[str, str]]:
    """The projection of a file, and its origin. DataError, naming `where`, if it is damaged or none of ours."""
    import safetensors
    import safetensors.numpy

    try:
        arrays = safetensors.numpy.load(data)
        length = int.from_bytes(data[:8], "little")
        told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA])
        noise = tuple(arrays[f"noise.{number}"] for number in range(len(arrays) - 2))
        found = Projection(
            ws=arrays["ws"], noise=noise or None, image=arrays["image"], **{name: told[name] for name in _FACTS}
        )
        origin = {str(key): str(value) for key, value in told["origin"].items()}
        whole = (
            found.ws.ndim == 2
            and found.ws.dtype == np.float32
            and bool(np.isfinite(found.ws).all())
            and found.image.ndim == 3
            and found.image.dtype == np.uint8
            and found.start in get_args(Start)
            and found.space in get_args(Space)
        )
        if not whole:
            raise ValueError("its arrays are of another kind")
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: is no whole projection ({escape(error)}); project the image again") from None
    return found, origin
