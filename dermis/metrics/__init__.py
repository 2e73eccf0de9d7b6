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

from dermis.metrics.fidelity import frechet_distance, kernel_distance

__all__ = ["frechet_distance", "kernel_distance"]
