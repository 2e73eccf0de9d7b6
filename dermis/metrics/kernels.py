"""Maximum mean discrepancy (MMD) with a kernel, for many weightings of two sets in one pass over the kernel.

KID is the squared MMD with the kernel (x.y / dim + 1)^3. CMMD (Jayasumana et al., arXiv 2401.09603) is the squared MMD
with a Gaussian kernel of bandwidth 10 on CLIP embeddings of unit length. In other spaces that bandwidth
means nothing, and the median distance of two real images is used (the median heuristic, Gretton et al. 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dermis.authenticity.baseline import typical_distance

Floats = NDArray[np.float32]
Kernel = Callable[[Floats, Floats], Floats]
"""Features [N, dim] and [M, dim] -> kernel values [N, M]."""

ROWS = 512
CMMD_BANDWIDTH = 10.0


def polynomial(a: Floats, b: Floats) -> Floats:
    """Compute (x.y / dim + 1)^3, the kernel of KID."""
    value: Floats = a @ b.T
    value /= np.float32(a.shape[1])
    value += np.float32(1)
    cube = value * value
    cube *= value
    return cube


@dataclass(frozen=True)
class Gaussian:
    """The kernel exp(-|x - y|^2 / (2 bandwidth^2)) of features less `centre`, or of unit length.

    Distances do not depend on the centre, but their rounding in float32 does, because features are positive in most spaces.
    """

    bandwidth: float
    centre: Floats | None
    """Subtracted by `prepare`. If None, `prepare` scales features to unit length instead."""

    def prepare(self, features: NDArray[np.floating]) -> Floats:
        """Prepare features for the kernel."""
        if self.centre is not None:
            return np.asarray(features - self.centre, np.float32)
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        return np.asarray(features / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)

    def __call__(self, a: Floats, b: Floats) -> Floats:
        squared: Floats = a @ b.T
        squared *= np.float32(-2)
        squared += np.square(a).sum(axis=1)[:, None]
        squared += np.square(b).sum(axis=1)
        np.maximum(squared, 0, out=squared)
        squared *= np.float32(-0.5 / self.bandwidth**2)
        return np.exp(squared, out=squared)


def cmmd_kernel() -> Gaussian:
    """Return the kernel of CMMD: bandwidth 10, on embeddings of unit length."""
    return Gaussian(CMMD_BANDWIDTH, None)


def median_kernel(real: NDArray[np.float32]) -> Gaussian | None:
    """Return a Gaussian kernel whose bandwidth is the median distance of real features [N, dim]; None if all are equal."""
    bandwidth = typical_distance(real)
    return Gaussian(bandwidth, real.mean(axis=0, dtype=np.float64).astype(np.float32)) if bandwidth > 0 else None


def squared_discrepancies(x: Floats, y: Floats, w: Floats, v: Floats, kernel: Kernel) -> NDArray[np.float64]:
    """Compute the unbiased MMD^2 [R] of weighted sets: x [N, dim] with each row of w [R, N], y [M, dim] with that of v [R, M].

    A weight is the number of times that an image is in a set. Pairs of an image with itself are left out.
    """
    # A constant in the kernel does not change the MMD, but without it float32 sums lose fewer digits.
    offset = np.float32(kernel(x[:ROWS], y[:ROWS]).mean())
    within = _mean_kernel(x, x, w, w, kernel, offset, own=True) + _mean_kernel(y, y, v, v, kernel, offset, own=True)
    return within - 2 * _mean_kernel(x, y, w, v, kernel, offset, own=False)


def _mean_kernel(
    a: Floats, b: Floats, w: Floats, v: Floats, kernel: Kernel, offset: np.float32, *, own: bool
) -> NDArray[np.float64]:
    """Compute means of the kernel less `offset` over i, j with each row of weights w [R, N], v [R, M].

    If `own`, b is the set a with the same weights. Pairs with i = j are left out then, and only one of the equal pairs (i, j)
    and (j, i) is computed.
    """
    total = np.zeros(len(w))
    for start in range(0, len(a), ROWS):
        rows = slice(start, start + ROWS)
        columns = slice(start, None) if own else slice(None)
        values = kernel(a[rows], b[columns])
        values -= offset
        if own:
            np.fill_diagonal(values, 0)
            values[:, len(values) :] *= 2
        total += np.einsum("rj,rj->r", w[:, rows], v[:, columns] @ values.T, dtype=np.float64)
    sums: NDArray[np.float64] = w.sum(axis=1, dtype=np.float64) * v.sum(axis=1, dtype=np.float64)
    if own:
        sums -= np.square(w, dtype=np.float64).sum(axis=1)
    return total / sums
