"""Colour transforms, composed into one affine map of RGB in homogeneous coordinates (arXiv 2006.06676, appendix B).

Grey, the direction (1, 1, 1) / sqrt(3), is the axis of luma: hue and saturation keep it, the flip reverses it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.gan.augment.config import AugmentConfig


def random_colour(n: int, p: float, config: AugmentConfig) -> Tensor | None:
    """Compose the chosen transforms into matrices [N, 4, 4] on (r, g, b, 1), float32 on the CPU; None if all are off."""
    identity = torch.eye(4).expand(n, 4, 4)
    unit, luma = torch.eye(3), torch.full((3, 3), 1 / 3)  # luma projects on grey
    matrix = identity

    def apply(transform: Tensor, weight: float) -> None:
        nonlocal matrix
        chosen = (torch.rand(n) < p * weight)[:, None, None]
        matrix = torch.where(chosen, transform, identity) @ matrix

    if config.brightness:
        shift = torch.randn(n, 1) * config.brightness_std
        apply(_affine(unit.expand(n, 3, 3), shift.expand(n, 3)), config.brightness)
    if config.contrast:
        gain = torch.exp2(torch.randn(n, 1, 1) * config.contrast_std)
        apply(_affine(gain * unit), config.contrast)
    if config.lumaflip:
        flipped = torch.randint(2, (n, 1, 1))
        apply(_affine(unit - 2 * flipped * luma), config.lumaflip)
    if config.hue:
        theta = (torch.rand(n, 1, 1) * 2 - 1) * math.pi * config.hue_max
        apply(_affine(_turn_hue(theta)), config.hue)
    if config.saturation:
        gain = torch.exp2(torch.randn(n, 1, 1) * config.saturation_std)
        apply(_affine(luma + gain * (unit - luma)), config.saturation)
    return None if matrix is identity else matrix


def apply_colour(images: Tensor, matrix: Tensor) -> Tensor:
    """Map every pixel of images [N, 3, H, W] through the affine matrices [N, 4, 4]."""
    if images.shape[1] != 3:
        raise ValueError(f"colour transforms take RGB images, not {images.shape[1]} channels")
    matrix = matrix.to(images.dtype).to(images.device, non_blocking=True)
    return torch.baddbmm(matrix[:, :3, 3:], matrix[:, :3, :3], images.flatten(2)).view_as(images)


def _affine(linear: Tensor, shift: Tensor | None = None) -> Tensor:
    """Linear part [N, 3, 3] and shift [N, 3] (none: 0) as [N, 4, 4]."""
    n = linear.shape[0]
    matrix = torch.eye(4).repeat(n, 1, 1)
    matrix[:, :3, :3] = linear
    if shift is not None:
        matrix[:, :3, 3] = shift
    return matrix


def _turn_hue(theta: Tensor) -> Tensor:
    """Rotations [N, 3, 3] by theta [N, 1, 1] radians around the grey axis (Rodrigues)."""
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    luma = torch.full((3, 3), 1 / 3)
    return luma + theta.cos() * (torch.eye(3) - luma) + theta.sin() * cross
