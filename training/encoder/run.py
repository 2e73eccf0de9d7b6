"""One run from a bundle and real images to a measured encoder's folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from dermis import __version__
from dermis.bundle import Bundle, load_generator
from dermis.bundle.encoder import EncoderDescription, write_encoder_folder
from dermis.devices import describe_hardware, resolve_device
from dermis.errors import TrainingError
from dermis.networks import Generator
from dermis.projection.encoder import GENERATOR, EncoderNetwork, network_from
from dermis.projection.perceptual import Perceptual, perceptual
from training.data.images import ImageDataset
from training.encoder.config import EncoderConfig
from training.encoder.loop import Progress, draw, latents, new_network, train

FOLDER = "encoder"
MEASURED = 256  # images of each kind
_UNSEEN = 3  # stream of latents that training does not draw


@dataclass(frozen=True)
class Trained:
    """A run that came to its end."""

    folder: Path
    description: EncoderDescription
    progress: Progress


def train_encoder(
    bundle: Bundle,
    config: EncoderConfig,
    out: Path,
    *,
    real: ImageDataset | None = None,
    held_out: ImageDataset | None = None,
    device: str = "auto",
    resume: bool = False,
    progress_bar: bool = True,
) -> Trained | None:
    """Train and measure an encoder for a bundle's generator; None if the user stopped it.

    `out` gets what `train` writes and the folder `encoder`, which is replaced. real: images to learn from beside generated
    ones; held_out: others, to measure on; both at the generator's resolution. Raises TrainingError.
    """
    for name, images in (("images", real), ("held-out", held_out)):
        if images is not None and images.resolution != bundle.generator.img_resolution:
            raise TrainingError(f"{name}: {images.resolution} px images for a generator of another resolution")
    if real is not None and held_out is not None and (both := set(real.contents) & set(held_out.contents)):
        raise TrainingError(f"held-out: {len(both)} of its files are in --images too; hold other images out")
    target = resolve_device(device)
    generator = load_generator(bundle).to(target)
    network = new_network(generator, config)
    facts = {"generator": bundle.files[GENERATOR].sha256, "images": real.sha256 if real else None}
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    pixels = None if real is None else real.images
    progress = train(
        generator, network, pixels, config, out, identity=identity, resume=resume, progress_bar=progress_bar
    )
    if progress.stopped:
        return None
    described = EncoderDescription(
        backbone=config.backbone,
        size=config.size,
        components=len(network.basis),
        num_ws=generator.num_ws,
        w_dim=generator.config.w_dim,
        generator=bundle.files[GENERATOR].sha256,
        provenance={
            "bundle": bundle.name,
            "images": None if real is None else {"count": len(real.ids), "sha256": real.sha256},
            "configuration": asdict(config),
            "hours": round(progress.seconds / 3600, 3),
            "hardware": describe_hardware(target),
            "code_version": __version__,
        },
    )
    weights = safetensors.torch.save(
        {name: value.detach().cpu().half().contiguous() for name, value in network.state_dict().items()}
    )
    stored = network_from(weights, described, "encoder.safetensors").to(target).eval()
    metrics = _measure(generator, stored, held_out, config)
    described = EncoderDescription(**{**vars(described), "metrics": metrics})
    folder = out / FOLDER
    return Trained(folder, write_encoder_folder(folder, described, weights, replace=folder.exists()), progress)


@torch.inference_mode()
def _measure(
    generator: Generator, network: EncoderNetwork, held_out: ImageDataset | None, config: EncoderConfig
) -> Mapping[str, Any]:
    """Mean distance and pixel error of encoded images, drawn again, and of the mean image in their place."""
    device = generator.mapping.w_avg.device
    distance = perceptual(config.distance, device)
    w = torch.from_numpy(latents(generator, range(MEASURED), config.seed, stream=_UNSEEN)).to(device)
    ours = [draw(generator, part[:, None].expand(-1, generator.num_ws, -1), None) for part in torch.split(w, 32)]
    found = {"distance": config.distance, "generated": _compare(generator, network, torch.cat(ours), distance)}
    if held_out is not None:
        chosen = np.unique(np.linspace(0, len(held_out.ids) - 1, MEASURED).round().astype(int))
        images: NDArray[np.uint8] = held_out.images[chosen]
        real = torch.tensor(images, device=device).permute(0, 3, 1, 2).float()
        found["held_out"] = _compare(generator, network, real, distance)
    return found


def _compare(
    generator: Generator, network: EncoderNetwork, images: torch.Tensor, distance: Perceptual
) -> dict[str, float]:
    sums = np.zeros(4)
    for part in torch.split(images.clamp(0, 255), 32):
        wanted = distance.embed(part)
        centre = network.mean.expand(len(part), generator.num_ws, -1)
        for place, ws in enumerate((network(part), centre)):
            again = draw(generator, ws, None)
            sums[2 * place] += (distance.embed(again) - wanted).square().sum().item()
            sums[2 * place + 1] += (again.clamp(0, 255) - part).square().mean(dim=(1, 2, 3)).sqrt().sum().item()
    names = ("encoded", "encoded_pixel_error", "mean_start", "mean_start_pixel_error")
    return {
        "images": len(images),
        **{name: round(value / len(images), 4) for name, value in zip(names, sums, strict=True)},
    }
