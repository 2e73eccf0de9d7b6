"""StyleGAN2 generator and discriminator, one file, top to bottom.

Written from Karras et al., "Analyzing and Improving the Image Quality of StyleGAN" (arXiv 1912.04958) and
"Training Generative Adversarial Networks with Limited Data" (arXiv 2006.06676). Parameters and buffers have the
names of the official StyleGAN2-ADA state dicts, so that official weights can be loaded unchanged. Outputs agree with those
of the official networks to 1e-4 (`tests/dermis/test_networks.py`).

Shapes: N batch, C channels, H = W = resolution. Images are float [N, img_channels, H, W] in about [-1, 1].

Two parts differ from the paper in form, but not in value. Weight modulation is applied to the activations (scaled by the
style before the convolution, and by the demodulation coefficient after it), so that one ordinary convolution computes the
whole batch and compiles well. The low-pass filter of a resampling is a depthwise convolution instead of a custom kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Exported here as well, because building a network needs its configuration.
from dermis.network_config import DiscriminatorConfig as DiscriminatorConfig  # noqa: PLC0414
from dermis.network_config import GeneratorConfig as GeneratorConfig  # noqa: PLC0414
from dermis.network_config import NoiseMode as NoiseMode  # noqa: PLC0414
from dermis.network_config import channels_at

FIR_TAPS = (1.0, 3.0, 3.0, 1.0)
LAYOUT = torch.channels_last  # memory layout of feature maps in which convolutions are fastest, on CPUs and GPUs
LRELU_SLOPE = 0.2
SQRT2 = math.sqrt(2.0)


def _resolutions(img_resolution: int) -> list[int]:
    return [2**i for i in range(2, int(math.log2(img_resolution)) + 1)]


def _first_fp16_resolution(config: GeneratorConfig | DiscriminatorConfig) -> float:
    """Return the resolution from which blocks run in float16, at least 8 px (the official rule)."""
    if config.num_fp16_res == 0:
        return math.inf
    return max(config.img_resolution * 2.0 ** (1 - config.num_fp16_res), 8.0)


# -- filters, activation, equalised layers


def fir_filter(taps: Sequence[float] = FIR_TAPS) -> Tensor:
    """Return the separable low-pass filter as a kernel [k, k] with sum 1."""
    line = torch.tensor(taps, dtype=torch.float32)
    kernel = torch.outer(line, line)
    return kernel / kernel.sum()


class _Filter(torch.autograd.Function):
    """Depthwise convolution of x [N, C, H, W] with one constant kernel [k, k], as conv2d does it (a correlation).

    Its gradient is the same operation with the flipped kernel, to any order. torch's second gradient of a depthwise
    convolution computes the channels one by one, which took half the time of the R1 penalty.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.padding = padding
        weight = kernel.to(x.dtype)[None, None].expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, weight, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kernel,) = ctx.saved_tensors
        x: Tensor = _Filter.apply(grad, kernel.flip(0, 1), kernel.shape[0] - 1 - ctx.padding)  # type: ignore[no-untyped-call]
        return x, None, None


def fir2d(x: Tensor, f: Tensor, padding: int, gain: float = 1.0) -> Tensor:
    """Pad [N, C, H, W] with zeros on each side and convolve each channel with f."""
    filtered: Tensor = _Filter.apply(x, f.flip(0, 1) * gain, padding)  # type: ignore[no-untyped-call]
    return filtered


def upsample2d(x: Tensor, f: Tensor) -> Tensor:
    """Double the resolution: insert zeros, then apply the filter with gain 4, which keeps the mean."""
    weight = (f * 4.0).to(x.dtype)[None, None].expand(x.shape[1], 1, -1, -1)
    return F.conv_transpose2d(x, weight, stride=2, padding=f.shape[0] // 2 - 1, groups=x.shape[1])


def normalize_2nd_moment(x: Tensor) -> Tensor:
    """Scale every row of [N, C] to unit mean square."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def _lrelu(x: Tensor, clamp: float | None = None) -> Tensor:
    """Apply leaky ReLU to an already scaled x and clamp it to +-clamp.

    The gain sqrt(2), which keeps the variance, is part of the weights and biases before it (leaky ReLU is positively
    homogeneous). This saves a pass over every feature map.
    """
    return _clamp(F.leaky_relu(x, LRELU_SLOPE), clamp)


def _clamp(x: Tensor, bound: float | None) -> Tensor:
    """Clamp x to +-bound. The gradient of hardtanh needs one pass over the feature map, that of clamp four."""
    return x if bound is None else F.hardtanh(x, -bound, bound)


class FullyConnectedLayer(nn.Module):
    """Linear layer with equalised learning rate. [N, in] -> [N, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Literal["linear", "lrelu"] = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.act_gain = SQRT2 if activation == "lrelu" else 1.0

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * (self.weight_gain * self.act_gain)
        bias = self.bias.to(x.dtype) * (self.bias_gain * self.act_gain)
        x = F.linear(x, weight, bias)
        return _lrelu(x) if self.activation == "lrelu" else x


class Conv2dLayer(nn.Module):
    """Equalised convolution, optional filtered 2x down-sampling. [N, in, H, W] -> [N, out, H', W']."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: Literal["linear", "lrelu"] = "linear",
        down: int = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.down, self.conv_clamp = activation, down, conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1.0 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = SQRT2 if activation == "lrelu" else 1.0
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("resample_filter", fir_filter())

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        weight = (self.weight * (self.weight_gain * self.act_gain * gain)).to(x.dtype)
        bias = None if self.bias is None else (self.bias * (self.act_gain * gain)).to(x.dtype)
        if self.down == 1:
            x = F.conv2d(x, weight, bias, padding=self.padding)
        else:  # the dense convolution decimates, not the filter: strided depthwise gradients are many times slower
            x = F.conv2d(fir2d(x, self.resample_filter, padding=self.padding + 1), weight, bias, stride=2)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        if self.activation == "lrelu":
            return _lrelu(x, clamp)
        return _clamp(x, clamp)


# -- mapping


class MappingNetwork(nn.Module):
    """z [N, z_dim] and label c [N, c_dim] -> ws [N, num_ws, w_dim] (or [N, w_dim] if num_ws is None).

    Truncation (StyleGAN, arXiv 1812.04948, section B) moves the first `truncation_cutoff` style vectors (None:
    all) towards the running mean `w_avg`: w_avg + truncation_psi (w - w_avg).
    """

    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.995,
    ) -> None:
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.num_ws, self.num_layers, self.w_avg_beta = num_ws, num_layers, w_avg_beta
        embed_features = (w_dim if embed_features is None else embed_features) if c_dim > 0 else 0
        layer_features = w_dim if layer_features is None else layer_features
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        features = [z_dim + embed_features, *[layer_features] * (num_layers - 1), w_dim]
        for i in range(num_layers):
            fc = FullyConnectedLayer(features[i], features[i + 1], "lrelu", lr_multiplier=lr_multiplier)
            self.add_module(f"fc{i}", fc)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: Tensor | None,
        c: Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        update_w_avg: bool = False,
    ) -> Tensor:
        parts = []
        if self.z_dim > 0:
            assert z is not None
            parts.append(normalize_2nd_moment(z.float()))
        if self.c_dim > 0:
            assert c is not None
            parts.append(normalize_2nd_moment(self.embed(c.float())))
        w = torch.cat(parts, dim=1)
        for i in range(self.num_layers):
            w = getattr(self, f"fc{i}")(w)
        if update_w_avg and self.w_avg_beta is not None:
            with torch.no_grad():
                self.w_avg.copy_(w.detach().mean(dim=0).lerp(self.w_avg, self.w_avg_beta))
        if self.num_ws is None:
            return w
        ws = w.unsqueeze(1).repeat(1, self.num_ws, 1)
        return self.truncate(ws, truncation_psi, truncation_cutoff)

    def truncate(self, ws: Tensor, truncation_psi: float, truncation_cutoff: int | None = None) -> Tensor:
        """Move the first truncation_cutoff style vectors of ws [N, num_ws, w_dim] towards w_avg."""
        if truncation_psi == 1.0:
            return ws
        cutoff = ws.shape[1] if truncation_cutoff is None else truncation_cutoff
        return torch.cat([self.w_avg.lerp(ws[:, :cutoff], truncation_psi), ws[:, cutoff:]], dim=1)


# -- synthesis


def modulated_conv2d(
    x: Tensor, weight: Tensor, styles: Tensor, f: Tensor, demodulate: bool = True, up: int = 1, gain: float = 1.0
) -> Tensor:
    """Convolve with per-sample weights w_ijk = s_i w_ijk, demodulated to unit norm (StyleGAN2, equations 1 to 3).

    x [N, in, H, W], weight [out, in, k, k], styles [N, in] -> [N, out, up H, up W]. With up = 2 a transposed
    convolution of stride 2 is followed by the low-pass filter f with gain 4. Demodulated outputs are scaled by `gain`.
    """
    if x.dtype == torch.float16 and demodulate:
        # Demodulation cancels a common scale, so both factors are normalised to stay far from float16's limits.
        weight = weight / (weight.norm(float("inf"), dim=(1, 2, 3), keepdim=True) * math.sqrt(weight[0].numel()))
        styles = styles / styles.norm(float("inf"), dim=1, keepdim=True)
    coefficients = None
    if demodulate:
        energy = styles.float().square() @ weight.float().square().sum(dim=(2, 3)).t()
        coefficients = ((energy + 1e-8).rsqrt() * gain).to(x.dtype)[:, :, None, None]
    x = x * styles.to(x.dtype)[:, :, None, None]
    weight = weight.to(x.dtype)
    if up == 1:
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    else:
        x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        x = fir2d(x, f, padding=1, gain=4.0)
    return x if coefficients is None else x * coefficients


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, optional 2x up-sampling, noise, bias, leaky ReLU."""

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: int = 1,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.up, self.conv_clamp = resolution, up, conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", fir_filter())

    def draw_noise(self, mode: NoiseMode, n: int) -> Tensor | None:
        """Return noise maps [n or 1, 1, R, R], or None for mode "none"."""
        if mode == "random":
            return torch.randn(n, 1, self.resolution, self.resolution, device=self.noise_const.device)
        return self.noise_const[None, None] if mode == "const" else None

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        styles = self.affine(w)
        x = modulated_conv2d(x, self.weight, styles, self.resample_filter, up=self.up, gain=SQRT2)
        if noise is not None:
            x = x + (noise * (self.noise_strength * SQRT2)).to(x.dtype)
        x = x + (self.bias * SQRT2).to(x.dtype)[:, None, None]
        return _lrelu(x, self.conv_clamp)


class ToRGBLayer(nn.Module):
    """Modulated 1x1 convolution to image channels, without demodulation."""

    def __init__(self, in_channels: int, img_channels: int, w_dim: int, conv_clamp: float | None = None) -> None:
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.weight_gain = 1.0 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        styles = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, styles, f=x, demodulate=False)
        x = x + self.bias.to(x.dtype)[:, None, None]
        return _clamp(x, self.conv_clamp)


class SynthesisBlock(nn.Module):
    """All layers of one resolution of the 'skip' generator: features [N, C, H, W] and the running RGB image."""

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, resolution: int, config: GeneratorConfig) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.use_fp16 = resolution >= _first_fp16_resolution(config)
        self.num_conv = 1 if in_channels == 0 else 2
        clamp = config.conv_clamp
        self.register_buffer("resample_filter", fir_filter())
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, config.w_dim, resolution, 2, clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, config.w_dim, resolution, 1, clamp)
        self.torgb = ToRGBLayer(out_channels, config.img_channels, config.w_dim, clamp)

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The convolutions, in order."""
        return [self.conv1] if self.in_channels == 0 else [self.conv0, self.conv1]

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        ws: Tensor,
        noise: Sequence[Tensor | None],
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        if x is None:
            x = self.const.unsqueeze(0).expand(ws.shape[0], -1, -1, -1)
            x = x.contiguous(memory_format=LAYOUT)
        else:
            x = x.to(_block_dtype(self.use_fp16, ws.device, dtype))
        for i, layer in enumerate(self.layers):
            x = layer(x, ws[:, i], noise[i])
        assert x is not None
        rgb = self.torgb(x, ws[:, self.num_conv]).float()
        img = rgb if img is None else upsample2d(img, self.resample_filter) + rgb
        return x, img


def _block_dtype(use_fp16: bool, device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """Return the arithmetic of a block: `dtype` if it is given, float16 if configured and on CUDA, otherwise float32."""
    if dtype is not None:
        return dtype
    return torch.float16 if use_fp16 and device.type == "cuda" else torch.float32


class SynthesisNetwork(nn.Module):
    """ws [N, num_ws, w_dim] -> float32 image [N, img_channels, H, W].

    `dtype` overrides the arithmetic of the blocks from 8 px on (torch.float32 for full precision, torch.bfloat16 for
    fast computation on a CPU); None follows the configuration. The 4 px block is always float32.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.block_resolutions = _resolutions(config.img_resolution)
        self.num_ws = config.num_ws
        in_channels = 0
        for resolution in self.block_resolutions:
            out_channels = channels_at(config, resolution)
            self.add_module(f"b{resolution}", SynthesisBlock(in_channels, out_channels, resolution, config))
            in_channels = out_channels

    @property
    def blocks(self) -> list[SynthesisBlock]:
        """The blocks, from 4 px to the image."""
        return [getattr(self, f"b{resolution}") for resolution in self.block_resolutions]

    def draw_noise(self, mode: NoiseMode, n: int) -> list[Tensor | None]:
        """Return the noise maps of a batch of n, one for each layer, from 4 px upwards."""
        return [layer.draw_noise(mode, n) for block in self.blocks for layer in block.layers]

    def forward(
        self,
        ws: Tensor,
        noise_mode: NoiseMode = "random",
        dtype: torch.dtype | None = None,
        noise: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Generate images. `noise` are maps in the form of `draw_noise`; None draws them by `noise_mode`."""
        ws = ws.float()
        noise = self.draw_noise(noise_mode, len(ws)) if noise is None else noise
        x: Tensor | None = None
        img: Tensor | None = None
        first = 0
        for block in self.blocks:
            last = first + block.num_conv
            # The RGB layer shares its style vector with the first convolution of the next block.
            x, img = block(x, img, ws[:, first : last + 1], noise[first:last], dtype)
            first = last
        assert img is not None
        return img


class Generator(nn.Module):
    """z [N, z_dim], c [N, c_dim] -> image [N, img_channels, H, W]."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.num_ws = config.num_ws
        self.synthesis = SynthesisNetwork(config)
        self.mapping = MappingNetwork(
            config.z_dim,
            config.c_dim,
            config.w_dim,
            config.num_ws,
            config.mapping_layers,
            config.embed_features,
            config.layer_features,
            config.mapping_lr_multiplier,
            config.w_avg_beta,
        )

    def forward(
        self,
        z: Tensor,
        c: Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "random",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        img: Tensor = self.synthesis(ws, noise_mode, dtype)
        return img


# -- discriminator


class DiscriminatorBlock(nn.Module):
    """Residual block: two 3x3 convolutions and a 1x1 skip connection, each of which halves the resolution."""

    resample_filter: Tensor

    def __init__(self, in_channels: int, resolution: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        tmp_channels, out_channels = channels_at(config, resolution), channels_at(config, resolution // 2)
        clamp = config.conv_clamp
        self.in_channels = in_channels
        self.use_fp16 = resolution >= _first_fp16_resolution(config)
        self.register_buffer("resample_filter", fir_filter())
        if in_channels == 0:
            self.fromrgb = Conv2dLayer(config.img_channels, tmp_channels, 1, activation="lrelu", conv_clamp=clamp)
        self.conv0 = Conv2dLayer(tmp_channels, tmp_channels, 3, activation="lrelu", conv_clamp=clamp)
        self.conv1 = Conv2dLayer(tmp_channels, out_channels, 3, activation="lrelu", down=2, conv_clamp=clamp)
        self.skip = Conv2dLayer(tmp_channels, out_channels, 1, bias=False, down=2)

    def forward(self, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        x = x.to(_block_dtype(self.use_fp16, x.device, dtype))
        if self.in_channels == 0:
            x = self.fromrgb(x.contiguous(memory_format=LAYOUT))
        skip: Tensor = self.skip(x, gain=math.sqrt(0.5))
        x = self.conv1(self.conv0(x), gain=math.sqrt(0.5))
        return skip + x


def minibatch_std(x: Tensor, group_size: int | None, num_channels: int) -> Tensor:
    """Append num_channels maps of the groups' mean standard deviation (ProGAN, arXiv 1710.10196, section 3).

    x [N, C, H, W] -> [N, C + num_channels, H, W]. N must be a multiple of min(group_size, N). Group members are
    N / group_size apart, as in the official networks.
    """
    n, c, h, w = x.shape
    group = n if group_size is None else min(group_size, n)
    if n % group:
        raise ValueError(f"batch size {n} is not a multiple of the mini-batch standard deviation group {group}")
    y = x.reshape(group, n // group, num_channels, c // num_channels, h, w)
    y = ((y - y.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean(dim=(2, 3, 4))
    y = y.reshape(-1, num_channels, 1, 1).repeat(group, 1, h, w)
    return torch.cat([x, y], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """4 px features [N, C, 4, 4] -> logits [N, 1], projected on the label's cmap [N, cmap_dim] if conditional."""

    def __init__(self, cmap_dim: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels = channels_at(config, 4)
        self.cmap_dim = cmap_dim
        self.mbstd_group_size, self.mbstd_num_channels = config.mbstd_group_size, config.mbstd_num_channels
        in_channels = channels + config.mbstd_num_channels
        self.conv = Conv2dLayer(in_channels, channels, 3, activation="lrelu", conv_clamp=config.conv_clamp)
        self.fc = FullyConnectedLayer(channels * 16, channels, "lrelu")
        self.out = FullyConnectedLayer(channels, 1 if cmap_dim == 0 else cmap_dim)

    def forward(self, x: Tensor, cmap: Tensor | None) -> Tensor:
        x = x.float()
        if self.mbstd_num_channels > 0:
            x = minibatch_std(x, self.mbstd_group_size, self.mbstd_num_channels)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if cmap is not None:  # projection discriminator, arXiv 1802.05637
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


class Discriminator(nn.Module):
    """image [N, img_channels, H, W] and label c [N, c_dim] -> logits [N, 1]; see `SynthesisNetwork` for `dtype`."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.block_resolutions = _resolutions(config.img_resolution)[:0:-1]  # from the image down to 8 px
        cmap_dim = channels_at(config, 4) if config.cmap_dim is None else config.cmap_dim
        cmap_dim = cmap_dim if config.c_dim > 0 else 0
        in_channels = 0
        for resolution in self.block_resolutions:
            self.add_module(f"b{resolution}", DiscriminatorBlock(in_channels, resolution, config))
            in_channels = channels_at(config, resolution // 2)
        if config.c_dim > 0:
            self.mapping = MappingNetwork(
                0,
                config.c_dim,
                cmap_dim,
                None,
                config.mapping_layers,
                config.embed_features,
                config.layer_features,
                config.mapping_lr_multiplier,
                None,
            )
        self.b4 = DiscriminatorEpilogue(cmap_dim, config)

    def forward(self, img: Tensor, c: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        x = img
        for resolution in self.block_resolutions:
            x = getattr(self, f"b{resolution}")(x, dtype)
        cmap = self.mapping(None, c) if self.config.c_dim > 0 else None
        logits: Tensor = self.b4(x, cmap)
        return logits


def one_hot(labels: Sequence[int] | np.ndarray, c_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Encode class numbers [N] as c, float32 [N, c_dim] ([N, 0] for an unconditional network)."""
    index = torch.as_tensor(np.asarray(labels, dtype=np.int64), device=device)
    if c_dim == 0:
        return torch.zeros(len(index), 0, device=device)
    return F.one_hot(index, c_dim).float()
