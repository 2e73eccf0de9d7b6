"""Distances between sets of real and generated images in a feature space."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.vision import import_vision


def frechet_distance(real: NDArray[np.float32], generated: NDArray[np.float32]) -> float:
    """FID of features [N, dim] and [M, dim] (Heusel et al., arXiv 1706.08500), by torch-fidelity in float64."""
    fid = import_vision("torch_fidelity.metric_fid")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (real, generated)]
    return float(fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID])


def kernel_distance(
    real: NDArray[np.float32], generated: NDArray[np.float32], subsets: int = 100
) -> tuple[float, float]:
    """KID of features (Bińkowski et al., arXiv 1801.01401), by torch-fidelity: mean and deviation over subsets.

    Subsets hold 1,000 images, or all of the smaller set.
    """
    kid = import_vision("torch_fidelity.metric_kid")
    size = min(len(real), len(generated), 1000)
    result = kid.kid_features_to_metric(
        torch.from_numpy(real),
        torch.from_numpy(generated),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=0,
        verbose=False,
    )
    return float(result[kid.KEY_METRIC_KID_MEAN]), float(result[kid.KEY_METRIC_KID_STD])
