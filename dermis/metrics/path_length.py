"""Perceptual path length (Karras et al., StyleGAN, arXiv 1812.04948, section 4.1): how smoothly images change with w.

torch-fidelity's PPL follows paths in z, draws classes evenly and compares 8-bit images, in which steps of 1e-4 are lost. So
the paths are computed here, and the perceptual distance is torch-fidelity's (LPIPS on VGG16) or that of a feature space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dermis.latents import z_for
from dermis.networks import Generator, one_hot

Sampling = Literal["end", "full"]
PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of float images [N, 3, H, W] in 0..255 -> distances [N], of second order in a small change."""

EPSILON = 1e-4
KEPT = (1.0, 99.0)  # percentiles outside of which paths are left out, as in the official metric
MAX_SIDE = 256  # larger images are reduced to this size by averaging, as in the official metric


@dataclass(frozen=True)
class PathLength:
    """Mean over the kept paths, and its standard error."""

    mean: float
    standard_error: float
    paths: int


@torch.inference_mode()
def path_lengths(
    generator: Generator,
    distance: PerceptualDistance,
    labels: NDArray[np.int64],
    *,
    sampling: Sampling = "end",
    seed: int = 0,
    epsilon: float = EPSILON,
    batch: int = 16,
    on_batch: Callable[[int], object] = lambda done: None,
) -> NDArray[np.float64]:
    """Compute the lengths [N] of paths in w, one for each class in `labels` [N] (zeros if unconditional). Their mean is PPL.

        d( g(lerp(w1, w2, t)), g(lerp(w1, w2, t + epsilon)) ) / epsilon^2,   w1 = f(z1), w2 = f(z2)

    t is 0 for sampling "end" (as in the StyleGAN2 papers) and uniform in [0, 1] for "full". Both ends of a path have the
    same class and the generator's constant noise. It runs in float32 on the generator's device, because a step of 1e-4 is
    lost in bfloat16 and in TF32.
    """
    config, device = generator.config, generator.mapping.w_avg.device
    t_all = np.zeros(len(labels)) if sampling == "end" else np.random.default_rng(seed).random(len(labels))
    values = []
    for start in range(0, len(labels), batch):
        rows = np.arange(start, min(start + batch, len(labels)))
        c = one_hot(labels[rows].tolist(), config.c_dim, device)
        w1, w2 = (
            generator.mapping(torch.from_numpy(z_for(seed, indices, config.z_dim)).to(device), c)
            for indices in (2 * rows, 2 * rows + 1)
        )
        t = torch.from_numpy(t_all[rows].astype(np.float32)).to(device)[:, None, None]
        ws = torch.cat([w1.lerp(w2, t), w1.lerp(w2, t + epsilon)])
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            first, second = _to_255(generator.synthesis(ws, "const", torch.float32)).chunk(2)
            values.append((distance(first, second) / epsilon**2).double().cpu().numpy())
        on_batch(len(rows))
    return np.concatenate(values)


def path_length(lengths: NDArray[np.float64]) -> PathLength:
    """Compute PPL from lengths [N]: their mean without the lowest and the highest per cent, and its standard error."""
    low = np.percentile(lengths, KEPT[0], method="lower")
    high = np.percentile(lengths, KEPT[1], method="higher")
    kept = lengths[(lengths >= low) & (lengths <= high)]
    return PathLength(float(kept.mean()), float(kept.std() / np.sqrt(len(kept))), len(kept))


def _to_255(images: Tensor) -> Tensor:
    """Convert images [N, C, H, W] in about [-1, 1] to [N, 3, h, w] in about [0, 255], neither clamped nor rounded."""
    side = images.shape[-1]
    if side > MAX_SIDE:
        images = F.avg_pool2d(images, side // MAX_SIDE)
    if images.shape[1] == 1:
        images = images.repeat(1, 3, 1, 1)
    return (images + 1) * 127.5
