"""A tiny bundle with random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from dermis.bundle import Bundle, write_bundle
from dermis.networks import Generator, GeneratorConfig


def make_bundle(
    out: Path,
    *,
    name: str = "tiny",
    seed: int = 0,
    classes: tuple[str, ...] = ("benign", "malignant"),
    noise_strength: float = 0.0,
) -> Bundle:
    """A 16 px bundle whose images differ by class, seed and index; noise changes them if it has a strength."""
    torch.manual_seed(seed)
    config = GeneratorConfig(
        16, c_dim=len(classes), z_dim=16, w_dim=16, mapping_layers=2, channel_base=256, channel_max=16
    )
    generator = Generator(config)
    for block in generator.synthesis.blocks:
        for layer in block.layers:
            torch.nn.init.constant_(layer.noise_strength, noise_strength)
    provenance = {"licence": "CC0-1.0", "attribution": "nobody", "kimg": 0.0}
    return write_bundle(
        out, name=name, generator=generator, class_names=classes, provenance=provenance, model_card="# Tiny\n"
    )
