"""How far generated images are from real ones, as numbers computed from features [N, dim] of both.

    fidelity        Fréchet distance (FID), KID, precision and recall
    kernels         KID's and Gaussian kernels (MMD, CMMD), and squared discrepancies with them
    intervals       bootstrap confidence intervals of Fréchet and kernel distances
    path_length     perceptual path length of a generator; perceptual: the distances it is measured with
    alpha           alpha-precision, beta-recall, authenticity
    density         density and coverage
    likelihood      feature likelihood divergence (FLD) and its generalisation gap
    memorisation    are generated images nearer to training images than to held-out ones?
    membership      can an attacker tell training from held-out images?
    neighbourhoods  precision, recall, density and coverage of two sets from one pass over their distances
    neighbours      the blocked nearest-neighbour search beneath all that compare distances

Features come from `dermis.features`; a number is always named with the space that it was computed in.
"""

from dermis.metrics.fidelity import frechet_distance, kernel_distance

__all__ = ["frechet_distance", "kernel_distance"]
