"""What a projection gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.imaging import Images
from dermis.projection.schedule import Space, Start


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
