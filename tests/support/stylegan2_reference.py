"""StyleGAN2's networks as the papers define them, in float64, from a state dict: the reference for other implementations.

Karras et al., arXiv 1912.04958 (weight modulation, equations 1 to 3; skip generator, residual discriminator) and 1710.10196
(mini-batch standard deviation). Nothing is shared with `dermis.networks`, and nothing is rearranged for speed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def generator(
    state: State, z: Tensor, c: Tensor, clamp: float | None, lr_multiplier: float = 0.01, psi: float = 1.0
) -> Tensor:
    """Images [N, 3, R, R] with the constant noise."""
    state = {key: value.double() for key, value in state.items()}
    w = mapping(_below(state, "mapping"), z, c, lr_multiplier)
    w = state["mapping.w_avg"] + psi * (w - state["mapping.w_avg"])
    return synthesis(_below(state, "synthesis"), w, clamp)


def mapping(state: State, z: Tensor | None, c: Tensor, lr_multiplier: float) -> Tensor:
    parts = [] if z is None else [_unit(z.double())]
    if "embed.weight" in state:
        parts.append(_unit(_dense(_below(state, "embed"), c.double())))
    x = torch.cat(parts, dim=1)
    layer = 0
    while f"fc{layer}.weight" in state:
        x = _leaky(_dense(_below(state, f"fc{layer}"), x, lr_multiplier), None)
        layer += 1
    return x


def synthesis(state: State, w: Tensor, clamp: float | None) -> Tensor:
    x = state["b4.const"].expand(len(w), -1, -1, -1)
    image, resolution = torch.zeros(len(w), 3, 2, 2, dtype=torch.float64), 4  # nothing, to begin with
    while f"b{resolution}.conv1.weight" in state:
        block = _below(state, f"b{resolution}")
        if resolution > 4:
            x = _styled(_below(block, "conv0"), x, w, up=True, clamp=clamp)
        x = _styled(_below(block, "conv1"), x, w, up=False, clamp=clamp)
        colours = _below(block, "torgb")
        styles = _dense(_below(colours, "affine"), w) / x.shape[1] ** 0.5
        weight = colours["weight"][None] * styles[:, None, :, None, None]
        rgb = _per_sample(x, weight) + colours["bias"][:, None, None]
        rgb = rgb if clamp is None else rgb.clamp(-clamp, clamp)
        image = _upsample(image) + rgb
        resolution *= 2
    return image


def discriminator(
    state: State, image: Tensor, c: Tensor, clamp: float | None, group: int, lr_multiplier: float = 0.01
) -> Tensor:
    """Logits [N, 1]."""
    state = {key: value.double() for key, value in state.items()}
    x, resolution = image.double(), image.shape[-1]
    half = 0.5**0.5
    while resolution > 4:
        block = _below(state, f"b{resolution}")
        if "fromrgb.weight" in block:
            x = _leaky(_convolve(_below(block, "fromrgb"), x), clamp)
        skip = _convolve(_below(block, "skip"), _filter(x, 1)[:, :, ::2, ::2]) * half
        y = _leaky(_convolve(_below(block, "conv0"), x), clamp)
        y = _convolve(_below(block, "conv1"), _filter(y, 2), stride=2, padding=0)
        x = skip + _leaky(y, clamp) * half
        resolution //= 2
    last = _below(state, "b4")
    n, channels, height, width = x.shape
    y = x.reshape(group, n // group, channels, height, width)
    deviation = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    x = torch.cat([x, deviation.repeat(group)[:, None, None, None].expand(-1, 1, height, width)], dim=1)
    x = _leaky(_convolve(_below(last, "conv"), x), clamp)
    x = _dense(_below(last, "out"), _leaky(_dense(_below(last, "fc"), x.flatten(1)), None))
    if "mapping.embed.weight" in state:
        label = mapping(_below(state, "mapping"), None, c, lr_multiplier)
        x = (x * label).sum(1, keepdim=True) / label.shape[1] ** 0.5
    return x


def _below(state: State, name: str) -> State:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def _leaky(x: Tensor, clamp: float | None) -> Tensor:
    x = torch.where(x > 0, x, 0.2 * x) * 2**0.5
    return x if clamp is None else x.clamp(-clamp, clamp)


def _dense(state: State, x: Tensor, lr_multiplier: float = 1.0) -> Tensor:
    weight = state["weight"] * lr_multiplier / state["weight"].shape[1] ** 0.5
    return x @ weight.T + state["bias"] * lr_multiplier


def _convolve(state: State, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = state["weight"] / state["weight"][0].numel() ** 0.5
    padding = weight.shape[2] // 2 if padding is None else padding
    return F.conv2d(x, weight, state.get("bias"), stride=stride, padding=padding)


def _styled(state: State, x: Tensor, w: Tensor, up: bool, clamp: float | None) -> Tensor:
    styles = _dense(_below(state, "affine"), w)
    weight = state["weight"][None] * styles[:, None, :, None, None]  # equation 1
    weight = weight / (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()  # equation 3
    if up:
        x = F.pad(_insert_zeros(x)[:, :, :-1, :-1], (2, 2, 2, 2))
        x = _filter(_per_sample(x, weight.flip(3, 4), padding=0), 1) * 4
    else:
        x = _per_sample(x, weight)
    x = x + state["noise_const"] * state["noise_strength"] + state["bias"][:, None, None]
    return _leaky(x, clamp)


def _per_sample(x: Tensor, weight: Tensor, padding: int | None = None) -> Tensor:
    """Each image [C, H, W] with its own weights [out, C, k, k]."""
    padding = weight.shape[-1] // 2 if padding is None else padding
    return torch.cat([F.conv2d(one[None], own, padding=padding) for one, own in zip(x, weight, strict=True)])


def _insert_zeros(x: Tensor) -> Tensor:
    y = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    y[:, :, ::2, ::2] = x
    return y


def _filter(x: Tensor, *padding: int) -> Tensor:
    """Zeros on each side (one number), or before and behind (two), then the filter [1, 3, 3, 1] of unit sum."""
    before, behind = padding[0], padding[-1]
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (before, behind, before, behind)), kernel, groups=x.shape[1])


def _upsample(image: Tensor) -> Tensor:
    return _filter(_insert_zeros(image), 2, 1) * 4
