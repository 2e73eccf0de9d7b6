"""The generator for inference: the same values as `dermis.networks`, in a form that compilers optimise well.

Three differences from `SynthesisNetwork`. Everything that depends on the style vectors alone (the layers' affine maps
and demodulation coefficients) is computed first, in float32, so that the large graph sees only per-channel scales.
Constant gains are folded into weights, biases and the low-pass filter. And noise is an input, one vector for all
layers, so that one compiled graph serves every noise mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dermis.networks import LRELU_SLOPE, SQRT2, Generator, SynthesisLayer, ToRGBLayer


def noise_resolutions(generator: Generator) -> list[int]:
    """Return the height of every layer's noise map, in the order of the noise vector: 4, 8, 8, 16, 16, ..."""
    return [layer.resolution for block in generator.synthesis.blocks for layer in block.layers]


def constant_noise(generator: Generator) -> Tensor:
    """Return the noise vector [1, sum of R^2] from the generator's buffers, for noise_mode "const"."""
    layers = (layer for block in generator.synthesis.blocks for layer in block.layers)
    return torch.cat([layer.noise_const.flatten() for layer in layers])[None].float()


class MappingStage(nn.Module):
    """z [N, z_dim], c [N, c_dim] -> w [N, w_dim], not truncated. An unconditional generator ignores c."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.mapping = generator.mapping

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        w: Tensor = self.mapping(z, c)[:, 0]
        return w


class StyleStage(nn.Module):
    """ws [N, num_ws, w_dim] -> all per-channel scales [N, S], in the order in which `ImageStage` uses them."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.affines = nn.ModuleList()
        self.index: list[int] = []  # which style vector each affine map reads
        self.gains: list[float] = []
        self.has_energy: list[bool] = []
        first = 0
        for block in generator.synthesis.blocks:
            for i, layer in enumerate(block.layers):
                self._add(layer, first + i, 1.0)
            first += block.num_conv
            self._add(block.torgb, first, block.torgb.weight_gain)

    def _add(self, layer: SynthesisLayer | ToRGBLayer, index: int, gain: float) -> None:
        demodulated = isinstance(layer, SynthesisLayer)
        if demodulated:  # squared weights [in, out], so that the demodulation is one product
            energy = layer.weight.detach().float().square().sum(dim=(2, 3)).t().contiguous()
            self.register_buffer(f"energy{len(self.index)}", energy)
        self.affines.append(layer.affine)
        self.index.append(index)
        self.gains.append(gain)
        self.has_energy.append(demodulated)

    def forward(self, ws: Tensor) -> Tensor:
        parts = []
        for k, affine in enumerate(self.affines):
            styles = affine(ws[:, self.index[k]])
            parts.append(styles * self.gains[k] if self.gains[k] != 1.0 else styles)
            if self.has_energy[k]:
                parts.append((styles.square() @ getattr(self, f"energy{k}") + 1e-8).rsqrt() * SQRT2)
        return torch.cat(parts, dim=1)


class ImageStage(nn.Module):
    """Scales [N, S] of `StyleStage` and noise [N or 1, sum of R^2] -> uint8 images [N, H, W, img_channels].

    `dtype` is the arithmetic of the convolutions; the RGB image is summed and rounded in float32.
    """

    def __init__(self, generator: Generator, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype
        self.clamp = generator.config.conv_clamp
        self.noise_sizes = [resolution**2 for resolution in noise_resolutions(generator)]
        self.scale_sizes: list[int] = []
        self.strengths: list[float | Tensor] = []
        self.up: list[list[bool]] = []
        blocks = generator.synthesis.blocks
        self.const = _weight(blocks[0].const[None], dtype)
        self.weights, self.biases, self.filters = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.rgb_weights, self.rgb_biases = nn.ParameterList(), nn.ParameterList()
        for block in blocks:
            for layer in block.layers:
                out_channels, in_channels = layer.weight.shape[:2]
                self.scale_sizes += [in_channels, out_channels]
                self.strengths.append(float(layer.noise_strength) * SQRT2)
                up = layer.up == 2
                self.weights.append(_weight(layer.weight.transpose(0, 1) if up else layer.weight, dtype))
                self.biases.append(_weight(layer.bias[:, None, None] * SQRT2, dtype))
                fir = layer.resample_filter.flip(0, 1) * 4.0
                self.filters.append(_weight(fir.expand(out_channels, 1, -1, -1) if up else fir[None, None], dtype))
            self.up.append([layer.up == 2 for layer in block.layers])
            self.scale_sizes.append(block.torgb.weight.shape[1])
            self.rgb_weights.append(_weight(block.torgb.weight, dtype))
            self.rgb_biases.append(_weight(block.torgb.bias[:, None, None], dtype))
        channels = generator.config.img_channels
        image_filter = blocks[0].resample_filter * 4.0
        self.image_filter = _weight(image_filter.expand(channels, 1, -1, -1), torch.float32)

    def forward(self, scales: Tensor, noise: Tensor) -> Tensor:
        parts = iter([part[:, :, None, None] for part in torch.split(scales.to(self.dtype), self.scale_sizes, dim=1)])
        maps = iter(torch.split(noise, self.noise_sizes, dim=1))
        x: Tensor = self.const
        img: Tensor | None = None
        k = 0
        for block, ups in enumerate(self.up):
            for up in ups:
                x = x * next(parts)
                if up:
                    x = F.conv_transpose2d(x, self.weights[k], stride=2)
                    x = F.conv2d(x, self.filters[k], padding=1, groups=x.shape[1])
                else:
                    x = F.conv2d(x, self.weights[k], padding=1)
                resolution = round(self.noise_sizes[k] ** 0.5)
                grain = (next(maps) * self.strengths[k]).to(self.dtype).reshape(-1, 1, resolution, resolution)
                x = F.leaky_relu(x * next(parts) + grain + self.biases[k], LRELU_SLOPE)
                x = x if self.clamp is None else x.clamp(-self.clamp, self.clamp)
                k += 1
            rgb = F.conv2d(x * next(parts), self.rgb_weights[block]) + self.rgb_biases[block]
            rgb = rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)
            if img is not None:
                rgb = rgb.float() + F.conv_transpose2d(
                    img, self.image_filter, stride=2, padding=1, groups=self.image_filter.shape[0]
                )
            img = rgb.float()
        assert img is not None
        return to_uint8(img)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C]: round(clip((x + 1) 127.5, 0, 255))."""
    return ((images.permute(0, 2, 3, 1) + 1.0) * 127.5).clamp(0.0, 255.0).round().to(torch.uint8)


def _weight(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    value = value.detach().to(dtype)
    memory_format = torch.channels_last if value.ndim == 4 else torch.contiguous_format
    return nn.Parameter(value.clone().contiguous(memory_format=memory_format), requires_grad=False)
