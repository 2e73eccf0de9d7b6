"""Metrics that compare generated images with real ones by features [N, dim] of both, and metrics of classifiers.

    fidelity        Fréchet distance (FID), KID, precision and recall
    kernels         KID's and Gaussian kernels (MMD, CMMD), and squared discrepancies with them
    intervals       bootstrap confidence intervals of Fréchet and kernel distances
    path_length     perceptual path length of a generator
    perceptual      the distances for path lengths
    alpha           alpha-precision, beta-recall, authenticity
    density         density and coverage
    likelihood      feature likelihood divergence (FLD) and its generalisation gap
    memorisation    test whether generated images are nearer to training images than to held-out ones
    membership      test whether an attacker can distinguish training from held-out images
    neighbourhoods  precision, recall, density and coverage of two sets from one pass over their distances
    neighbours      exact nearest-neighbour search in blocks, which the metrics of distances use
    classification  metrics of a classifier's probabilities, with intervals

Features come from `dermis.features`. A number is always reported with the space in which it was computed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dermis.metrics.fidelity import frechet_distance, kernel_distance

__all__ = ["frechet_distance", "kernel_distance"]


def __getattr__(name: str) -> Any:
    """Import a distance when it is used: it needs torch, and the gateway uses modules of this package without torch."""
    if name in __all__:
        from dermis.metrics import fidelity

        return getattr(fidelity, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
