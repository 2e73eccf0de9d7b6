"""Density and coverage (Naeem et al., "Reliable Fidelity and Diversity Metrics", arXiv 2002.09797)."""

from __future__ import annotations

import numpy as np

from dermis.metrics.neighbourhoods import DENSITY_K, PRECISION_K, compare_neighbourhoods
from dermis.metrics.neighbours import Features


def density_coverage(real: Features, generated: Features, k: int = DENSITY_K) -> tuple[float, float]:
    """Compute density and coverage of generated features [M, dim] for real ones [N, dim] (equations 4 and 5).

        density  = 1/(kM) sum_j sum_i 1[ |y_j - x_i| <= NND_k(x_i) ]
        coverage = 1/N    sum_i       1[ some |y_j - x_i| <= NND_k(x_i) ]

    x real, y generated, NND_k(x_i) the distance from x_i to its k-th nearest other real image. Density counts the
    real neighbourhoods around a generated image, so an outlier among the real images changes little; it can exceed 1.
    Coverage is in [0, 1]. It is measured by real neighbourhoods, so outliers among the generated images change nothing.
    For equal distributions the expectations are 1 and `expected_coverage(N, M, k)`, whatever the distribution.
    """
    neighbourhoods = compare_neighbourhoods(real, generated, k_precision=min(k, PRECISION_K), k_density=k)
    return neighbourhoods.density, neighbourhoods.coverage


def expected_coverage(real: int, generated: int, k: int = DENSITY_K) -> float:
    """Compute the mean coverage of N real and M generated images of one continuous distribution (lemma 2).

    x_i is not covered if its k nearest among the other N - 1 + M images are all real. The probability is
    (N-1)...(N-k) / ((N+M-1)...(N+M-k)).
    """
    i = np.arange(1, k + 1)
    return float(1 - np.prod((real - i) / (real + generated - i)))
