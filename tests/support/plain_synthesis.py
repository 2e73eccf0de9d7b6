"""Random generators, and their images computed by the plain network, one at a time."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from dermis.bundle import Bundle
from dermis.latents import noise_for, z_for
from dermis.networks import Generator, GeneratorConfig, NoiseMode, one_hot
from dermis.synthesizer.network import noise_resolutions, to_uint8

Image = npt.NDArray[np.uint8]
CONFIGS = {
    "conditional": GeneratorConfig(32, c_dim=3, z_dim=16, w_dim=24, mapping_layers=2, channel_base=512),
    "unconditional": GeneratorConfig(8, z_dim=16, w_dim=16, mapping_layers=1, channel_base=128, channel_max=16),
    "grey": GeneratorConfig(16, z_dim=16, w_dim=16, img_channels=1, channel_base=128, channel_max=16),
    "clamped": GeneratorConfig(64, c_dim=2, z_dim=16, w_dim=16, channel_base=512, num_fp16_res=3, conv_clamp=0.5),
}


@cache
def make_generator(name: str) -> Generator:
    """A random network whose noise, biases and mean style vector matter, with images that fill the range."""
    torch.manual_seed(0)
    generator = Generator(CONFIGS[name]).eval().requires_grad_(False)
    for key, value in generator.named_parameters():
        if key.endswith("noise_strength"):
            value.fill_(0.2)
        elif key.endswith("bias") and "affine" not in key:
            value.normal_(std=0.2)
        elif key.endswith("torgb.weight"):
            value.mul_(0.3)
    generator.mapping.w_avg.normal_()
    return generator


def make_bundle(generator: Generator) -> Bundle:
    names = tuple(f"class{i}" for i in range(generator.config.c_dim))
    return Bundle("", "test", "0" * 64, generator.config, None, names, {}, {}, "", {})


def reference(
    name: str,
    index: int,
    label: int,
    noise_mode: NoiseMode = "random",
    truncation_psi: float = 1.0,
    truncation_cutoff: int | None = None,
) -> Image:
    """Sample (7, index) by the plain float32 network."""
    generator = make_generator(name)
    if noise_mode == "random":
        generator = copy.deepcopy(generator)
        layers = [layer for block in generator.synthesis.blocks for layer in block.layers]
        for layer, noise in zip(layers, noise_for(7, index, noise_resolutions(generator)), strict=True):
            layer.noise_const.copy_(torch.from_numpy(noise))
        noise_mode = "const"
    c = one_hot([label], generator.config.c_dim)
    z = torch.from_numpy(z_for(7, [index], generator.config.z_dim))
    with torch.inference_mode():
        ws = generator.mapping(z, c, truncation_psi, truncation_cutoff)
        image: Image = to_uint8(generator.synthesis(ws, noise_mode, torch.float32)).numpy()[0]
        return image
