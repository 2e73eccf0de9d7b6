"""Image-space filtering, noise and cutout (arXiv 2006.06676, appendix B).

The filter amplifies or weakens four octaves. They come from the sym2 wavelet (Daubechies, Ten Lectures on Wavelets):
its low-pass filter is orthonormal, so the autocorrelation L(z) and its mirror image L(-z) sum to 1, and so do the four bands
    L(z) L(z^2) L(z^4),   L(z) L(z^2) (1 - L(z^4)),   L(z) (1 - L(z^2)),   1 - L(z)
(up to pi/8, pi/4, pi/2 and pi). All are symmetric, so nothing is shifted, and equal gains do not change the image.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.gan.augment.config import AugmentConfig

SYM2_AUTOCORRELATION = np.array([-1, 0, 9, 16, 9, 0, -1]) / 32
BAND_POWER = (10 / 13, 1 / 13, 1 / 13, 1 / 13)  # share of each band in the power of an image with a 1/f spectrum


def random_gains(n: int, p: float, config: AugmentConfig) -> Tensor:
    """Amplitude gains [N, 4] of the bands, lowest first. float32 on the CPU.

    Each band is chosen independently, and the four gains are then rescaled so that the expected power stays the same.
    """
    chosen = torch.rand(n, len(BAND_POWER)) < p * config.filter
    gain = torch.exp2(torch.randn(n, len(BAND_POWER)) * config.filter_std)
    gain = torch.where(chosen, gain, torch.ones_like(gain))
    # Changing band i alone changes the power from 1 to 1 - power_i + power_i gain_i^2.
    power = torch.tensor(BAND_POWER) * (gain.square() - 1) + 1
    return gain * power.prod(dim=1, keepdim=True).rsqrt()


def amplify_bands(images: Tensor, gains: Tensor) -> Tensor:
    """Filter images [N, C, R, R], reflected at their borders, along both axes with band gains [N, 4].

    A filter of R samples with reflected borders is an R x R matrix, so two batched products filter all images.
    """
    bands = _band_matrices(images.shape[-1], images.dtype, images.device)
    gains = gains.to(images.dtype).to(images.device, non_blocking=True)
    along: Tensor = torch.tensordot(gains, bands, dims=1)[:, None]  # [N, 1, R, R]
    return along @ images @ along.transpose(2, 3)


@lru_cache(maxsize=8)
def _band_matrices(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The filters of the four bands as matrices [4, size, size] with reflected borders."""
    taps = band_taps()
    reach = taps.shape[1] // 2
    position = np.arange(size)[:, None] + np.arange(-reach, reach + 1)
    source = np.abs(
        (position + size - 1) % (2 * size - 2) - (size - 1)
    )  # reflected without repeating the border sample
    matrices = np.zeros((len(taps), size, size))
    for matrix, band in zip(matrices, taps, strict=True):
        np.add.at(matrix, (np.arange(size)[:, None], source), band)
    return torch.tensor(matrices, dtype=dtype, device=device)


def band_taps() -> NDArray[np.float64]:
    """Impulse responses [4, 43] of the bands, lowest first, centred."""
    bands: list[NDArray[np.float64]] = []
    below = np.ones(1)
    for level in range(len(BAND_POWER) - 1):
        spread = np.zeros(6 * 2**level + 1)
        spread[:: 2**level] = SYM2_AUTOCORRELATION
        lower = np.convolve(below, spread)
        bands.append(_centred(below, len(lower)) - lower)
        below = lower
    bands.append(below)
    return np.stack([_centred(band, len(below)) for band in reversed(bands)])


def _centred(taps: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    return np.pad(taps, (length - len(taps)) // 2)


def add_noise(images: Tensor, p: float, config: AugmentConfig) -> Tensor:
    """Add white Gaussian noise to images [N, C, H, W], with one half-normal sigma for each image."""
    n = images.shape[0]
    sigma = torch.randn(n).abs() * config.noise_std * (torch.rand(n) < p * config.noise)
    sigma = sigma.to(images.dtype).to(images.device, non_blocking=True)
    return images + torch.randn_like(images) * sigma[:, None, None, None]


def cut_out(images: Tensor, p: float, config: AugmentConfig) -> Tensor:
    """Set a square of each image [N, C, H, W] to 0. Its centre is uniform over the image, so the border can cut it off."""
    n, _, height, width = images.shape
    centre = torch.rand(2, n, 1)
    chosen = torch.rand(n, 1) < p * config.cutout
    inside_y, inside_x = (
        (((torch.arange(side) + 0.5) / side - c).abs() < config.cutout_size / 2) & chosen
        for side, c in zip((height, width), centre, strict=True)
    )
    keep = ~(inside_y[:, :, None] & inside_x[:, None, :])
    kept: Tensor = images * keep[:, None].to(images.device, non_blocking=True)
    return kept
