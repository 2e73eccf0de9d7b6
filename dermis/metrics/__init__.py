"""How far generated images are from real ones, as numbers computed from features [N, dim] of both.

    fidelity      FID, KID, precision and recall: by torch-fidelity
    intervals     bootstrap confidence intervals of FID and KID
    path_length   perceptual path length of a generator; perceptual: the distances it is measured with
    alpha         alpha-precision, beta-recall, authenticity
    density       density and coverage
    memorisation  are generated images nearer to training images than to held-out ones?
    neighbours    the blocked nearest-neighbour search beneath the last three

Features come from `dermis.features`; a number is always named with the space that it was computed in.
"""

from dermis.metrics.fidelity import frechet_distance, kernel_distance

__all__ = ["frechet_distance", "kernel_distance"]
