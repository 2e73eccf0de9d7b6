"""Blitting and geometry, composed into one affine resampling between a pair of low-pass filters.

Blitting: flips, quarter turns, integer shifts. Geometry: scaling, rotation, anisotropic scaling, fractional shifts
(arXiv 2006.06676, appendix B).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.gan.augment.config import AugmentConfig

# Low-pass filter of the sym6 wavelet (Daubechies, Ten Lectures on Wavelets, table 6.3), normalised to unit sum below.
SYM6 = (
    0.0154041093, 0.0034907121, -0.1179901111, -0.0483117426, 0.4910559419, 0.7876411410,
    0.3379294217, -0.0726375228, -0.0210602925, 0.0447249018, 0.0017677119, -0.0078007083,
)  # fmt: skip


def random_transform(n: int, size: int, p: float, config: AugmentConfig) -> Tensor | None:
    """Compose the chosen transforms into matrices [N, 3, 3], float32 on the CPU; None if all are off.

    They map output to input positions in pixels of an image of side `size`, (x, y, 1) with the centre at 0.
    """
    identity = torch.eye(3).expand(n, 3, 3)
    inverse = identity

    def apply(transform: Tensor, probability: float) -> None:
        nonlocal inverse
        chosen = (torch.rand(n) < probability)[:, None, None]
        inverse = inverse @ torch.where(chosen, transform, identity)

    if config.xflip:
        sign = 1.0 - 2.0 * torch.randint(2, (n,))
        apply(_scaling(sign, torch.ones_like(sign)), p * config.xflip)
    if config.rotate90:
        apply(_rotation(torch.randint(4, (n,)) * (math.pi / 2)), p * config.rotate90)
    if config.xint:
        shift = ((torch.rand(n, 2) * 2 - 1) * config.xint_max * size).round()
        apply(_translation(shift), p * config.xint)
    if config.scale:
        s = torch.exp2(torch.randn(n) * config.scale_std)
        apply(_scaling(1 / s, 1 / s), p * config.scale)
    # Two rotations around the anisotropic scaling; together they turn an image with probability p.
    p_rotate = 1 - math.sqrt(max(1 - p * config.rotate, 0.0))
    if config.rotate:
        apply(_rotation((torch.rand(n) * 2 - 1) * math.pi * config.rotate_max), p_rotate)
    if config.aniso:
        s = torch.exp2(torch.randn(n) * config.aniso_std)
        apply(_scaling(1 / s, s), p * config.aniso)
    if config.rotate:
        apply(_rotation((torch.rand(n) * 2 - 1) * math.pi * config.rotate_max), p_rotate)
    if config.xfrac:
        apply(_translation(torch.randn(n, 2) * config.xfrac_std * size), p * config.xfrac)
    return None if inverse is identity else inverse


def _scaling(sx: Tensor, sy: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([sx, sy, torch.ones_like(sx)], dim=1))


def _rotation(theta: Tensor) -> Tensor:
    zero, one, c, s = torch.zeros_like(theta), torch.ones_like(theta), theta.cos(), theta.sin()
    rows = [torch.stack(row, dim=1) for row in ((c, s, zero), (-s, c, zero), (zero, zero, one))]
    return torch.stack(rows, dim=1)


def _translation(shift: Tensor) -> Tensor:
    matrix = torch.eye(3).repeat(len(shift), 1, 1)
    matrix[:, :2, 2] = -shift
    return matrix


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Resample [N, C, R, R] through [N, 3, 3] (output to input positions in pixels, centre = 0).

    Borders are reflected. Images are over-sampled twice, with the sym6 low-pass filter before and after the bilinear
    look-up, so that neither enlarging nor shrinking aliases.
    """
    size, matrix = images.shape[-1], matrix.to(images.dtype)
    taps = torch.tensor(SYM6, dtype=images.dtype)
    taps = taps / taps.sum()
    # The filter delays by its centroid, 5.1 fine samples. Both uses are compensated, so nothing is shifted.
    delay = float((taps * torch.arange(len(SYM6))).sum())
    margin = _margin(matrix, size)
    taps, matrix = (tensor.to(images.device, non_blocking=True) for tensor in (taps, matrix))
    x = _filter(_zero_insert(_reflect(images, margin)), taps * 2, padding=len(SYM6) // 2)
    fine = x.shape[-1]
    steps = torch.arange(2 * size + len(SYM6) - 2, device=x.device, dtype=x.dtype)
    axis = (steps - delay) / 2 - (size - 1) / 2  # output positions in pixels, centre = 0
    ys, xs = torch.meshgrid(axis, axis, indexing="ij")
    positions = torch.stack([xs, ys, torch.ones_like(xs)], dim=-1).reshape(1, -1, 3)
    source = (positions @ matrix[:, :2].transpose(1, 2)).reshape(-1, len(steps), len(steps), 2)
    index = (source + (size - 1) / 2 + margin) * 2 - (len(SYM6) // 2 - 1) + delay
    x = _Resample.apply(x, (index * 2 + 1) / fine - 1)  # type: ignore[no-untyped-call]
    return _filter(x, taps.flip(0), padding=0)[:, :, ::2, ::2]


def _margin(matrix: Tensor, size: int) -> int:
    """Number of reflected pixels on each side that keeps all look-ups inside the image; at most the image's width."""
    filter_reach = len(SYM6) // 4
    half = size / 2 + filter_reach
    corners = matrix.new_tensor([[-half, -half, 1], [half, -half, 1], [-half, half, 1], [half, half, 1]])
    reach = (corners @ matrix[:, :2].transpose(1, 2)).abs().max().item()
    return int(min(math.ceil(reach - size / 2), size)) + filter_reach + 1


def _reflect(x: Tensor, margin: int) -> Tensor:
    limit = x.shape[-1] - 1
    while margin > 0:
        step = min(margin, limit)
        x = F.pad(x, [step] * 4, mode="reflect")
        margin -= step
    return x


def _zero_insert(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return F.pad(x[:, :, :, None, :, None], [0, 1, 0, 0, 0, 1]).reshape(n, c, 2 * h, 2 * w)


def _filter(x: Tensor, taps: Tensor, padding: int) -> Tensor:
    c = x.shape[1]
    row = taps.flip(0)[None, None, None, :].expand(c, 1, 1, -1)
    x = F.conv2d(x, row, padding=(0, padding), groups=c)
    return F.conv2d(x, row.transpose(2, 3), padding=(padding, 0), groups=c)


class _Resample(torch.autograd.Function):
    """Bilinear look-up whose adjoint can be differentiated, as torch has no second derivative of grid_sample.

    The look-up is linear in x, so the derivative of the adjoint is the look-up. The grid gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return _ResampleAdjoint.apply(grad, grid, ctx.shape), None  # type: ignore[no-untyped-call]


class _ResampleAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        x = grad.new_empty(1).expand(shape)  # the gradient does not depend on x; only the shape is read
        grad_x, _ = torch.ops.aten.grid_sampler_2d_backward(grad, x, grid, 0, 0, False, [True, False])
        return grad_x  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return _Resample.apply(grad, grid), None, None  # type: ignore[no-untyped-call]
