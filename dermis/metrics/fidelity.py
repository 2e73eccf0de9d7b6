"""FID, KID, precision and recall of features, by torch-fidelity."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dermis.vision import import_vision

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


def frechet_distance(real: NDArray[np.float32], generated: NDArray[np.float32]) -> float:
    """FID of features [N, dim] and [M, dim] (Heusel et al., arXiv 1706.08500), by torch-fidelity in float64.

    |m_r - m_g|^2 + tr(C_r + C_g - 2 (C_r C_g)^(1/2)) of the means and covariances. Biased upwards, the more so the fewer
    images there are: compare it at equal numbers only.
    """
    fid = import_vision("torch_fidelity.metric_fid")
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(x.astype(np.float64))) for x in (real, generated)]
    return float(fid.fid_statistics_to_metric(*statistics, verbose=False)[fid.KEY_METRIC_FID])


def kernel_distance(
    real: NDArray[np.float32], generated: NDArray[np.float32], subsets: int = KID_SUBSETS
) -> tuple[float, float]:
    """KID of features (Bińkowski et al., arXiv 1801.01401), by torch-fidelity: mean and deviation over subsets.

    The unbiased MMD^2 with the kernel (x.y / dim + 1)^3. Subsets hold 1,000 images, or all of the smaller set.
    """
    kid = import_vision("torch_fidelity.metric_kid")
    size = min(len(real), len(generated), KID_SUBSET_SIZE)
    result = kid.kid_features_to_metric(
        torch.from_numpy(real),
        torch.from_numpy(generated),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=0,
        verbose=False,
    )
    return float(result[kid.KEY_METRIC_KID_MEAN]), float(result[kid.KEY_METRIC_KID_STD])


def precision_recall(real: NDArray[np.float32], generated: NDArray[np.float32], k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2), by torch-fidelity.

    Precision is the share of generated features [M, dim] inside the balls of radius NND_k about the real ones [N, dim],
    recall the share of real ones inside such balls about the generated ones. Radii shrink with the size of a set:
    compare them at equal numbers only, best with N = M. In float64, as copies lie on the very edge of rounding.
    """
    prc = import_vision("torch_fidelity.metric_prc")
    result = prc.prc_features_to_metric(
        torch.from_numpy(generated.astype(np.float64)),
        torch.from_numpy(real.astype(np.float64)),
        prc_neighborhood=k,
        prc_batch_size=1000,
        save_cpu_ram=True,
        verbose=False,
    )
    return float(result[prc.KEY_METRIC_PRECISION]), float(result[prc.KEY_METRIC_RECALL])
