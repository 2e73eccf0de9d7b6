"""Alpha-precision, beta-recall and authenticity (Alaa et al., "How Faithful is your Synthetic Data?", ICML 2022).

arXiv 2102.08921, sections 3 and 4. The paper first embeds the data into a hypersphere by a network trained for it. Here the
feature space is used as it is: the alpha-support is a ball around the mean, and numbers do not depend on the seed of an
embedding. Compare them only with numbers of the same feature space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.baseline import typical_distance
from dermis.authenticity.verdict import SAME_SHARE
from dermis.metrics.neighbourhoods import DENSITY_K, Neighbourhoods, compare_neighbourhoods
from dermis.metrics.neighbours import Features, distinct_radii, nearest, radii

LEVELS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Curve:
    """P_alpha or R_beta at the levels 0, 0.01, ... 1. For equal distributions P_alpha is the diagonal, R_beta nearly so."""

    levels: NDArray[np.float64]
    values: NDArray[np.float64]

    @property
    def integrated(self) -> float:
        """1 - 2 * integral over [0, 1] of |value(level) - level|: 1 on the diagonal, 0 at the worst (section 3.1)."""
        return float(1 - 2 * np.trapezoid(np.abs(self.values - self.levels), self.levels))


def alpha_precision(real: Features, generated: Features) -> Curve:
    """Compute P_alpha: the share of generated features [M, dim] in the smallest ball with a share alpha of the real ones.

    P_alpha = P( |y - c_r| <= r_alpha ), with c_r the mean of the real features [N, dim] and r_alpha the alpha-quantile of
    |x - c_r|. Below the diagonal, generated images are too far from the mean, unlike real ones. Above it, they are too
    typical, as truncation makes them.
    """
    centre = real.mean(axis=0, dtype=np.float64)
    limits = np.quantile(_from(centre, real), LEVELS, method="inverted_cdf")
    return Curve(LEVELS, _share_within(_from(centre, generated), limits))


def beta_recall(
    real: Features, generated: Features, k: int = DENSITY_K, neighbourhoods: Neighbourhoods | None = None
) -> Curve:
    """Compute R_beta: the share of real features [N, dim] that a share beta of the generated ones [M, dim] represents.

    R_beta = P( |x - y*| <= NND_k(x) and |y* - c_g| <= r_beta ), with y* the generated image nearest to x, NND_k(x) the
    distance from x to its k-th nearest other real image, c_g the mean of the generated features and r_beta the
    beta-quantile of |y - c_g|. With k = 1 even the true distribution reaches only R_1 = 1/2; with 5 it reaches 1 - 2^-5,
    so 5 is the default. In many dimensions, images near the mean are the nearest neighbours of many others, which raises
    the curve of the true distribution above the diagonal as well: compare it with that of held-out real images.

    Args:
        real: Features [N, dim] of real images.
        generated: Features [M, dim] of generated images.
        k: Neighbour that sets the radius of a real image.
        neighbourhoods: The neighbourhoods of these sets with this k, if they have been computed already.
    """
    if neighbourhoods is None:
        neighbourhoods = compare_neighbourhoods(real, generated, k_precision=1, k_density=k)
    from_centre = _from(generated.mean(axis=0, dtype=np.float64), generated)
    limits = np.quantile(from_centre, LEVELS, method="inverted_cdf")
    reached = neighbourhoods.nearest_distance <= neighbourhoods.real_radii
    return Curve(LEVELS, _share_within(np.where(reached, from_centre[neighbourhoods.nearest_index], np.inf), limits))


def authentic(
    training: Features, generated: Features, *, same: float = 0.0, known_radii: NDArray[np.float64] | None = None
) -> NDArray[np.bool_]:
    """Find generated features [M, dim] that are not noisy copies of training features [N, dim] (section 3.2).

    y is authentic if d(y, x*) > d(x*, X without x*), x* being the training image nearest to y: if some training image is
    closer to x* than y is. Authenticity is the mean. It is not 1 for a generator that does not copy: an independent
    sample of the same distribution is authentic in 1/3 of the cases in one dimension (closed form), and in more cases in
    more dimensions. So compare it with the authenticity of held-out real images.

    Args:
        training: Features [N, dim] of training images.
        generated: Features [M, dim] of generated images.
        same: Training images at most so far apart count as one image (`same_distance`). Without this, every copy would be
            authentic if each training image was in the set twice. The paper does not do it, so the default is 0.
        known_radii: Distance [N] of each training image to its nearest neighbour, if it has been computed already.

    Returns:
        bool [M].
    """
    distance, index = nearest(generated, training)
    own = known_radii
    if own is None:
        own = distinct_radii(training, same)[0] if same else radii(training, 1)
    return np.asarray(distance[:, 0] > own[index[:, 0]])


def same_distance(features: Features) -> float:
    """Return the distance up to which two features of [N, dim] count as one image, as in `dermis.authenticity.baseline`."""
    return SAME_SHARE * typical_distance(features)


def _from(centre: NDArray[np.float64], features: Features) -> NDArray[np.float64]:
    return np.asarray(np.linalg.norm(features - centre, axis=1))


def _share_within(distances: NDArray[np.float64], limits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.searchsorted(np.sort(distances), limits, side="right") / len(distances)
