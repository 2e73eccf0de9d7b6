"""One run: from a bundle and real images to the folder of a measured encoder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from dermis import __version__
from dermis.bundle import Bundle, load_generator, trained_on
from dermis.bundle.encoder import EncoderDescription, write_encoder_folder
from dermis.devices import describe_hardware, resolve_device
from dermis.errors import TrainingError
from dermis.networks import Generator
from dermis.projection.encoder import GENERATOR, EncoderNetwork, network_from
from dermis.projection.perceptual import Perceptual, perceptual
from training.data.images import ImageDataset
from training.encoder.config import EncoderConfig
from training.encoder.loop import EncoderProgress, latents, new_network, synthesize, train
from training.evaluation.holdout import check_holdout

FOLDER = "encoder"
MEASURED_IMAGES = 256  # number of generated, and of held-out images to measure on
_UNSEEN = 3  # stream of latents that training does not use


@dataclass(frozen=True)
class TrainedEncoder:
    """The result of a finished run."""

    folder: Path
    description: EncoderDescription
    progress: EncoderProgress


def train_encoder(
    bundle: Bundle,
    config: EncoderConfig,
    out: Path,
    *,
    real: ImageDataset | None = None,
    held_out: ImageDataset | None = None,
    device: str = "auto",
    resume: bool = False,
    loggers: Sequence[str] = (),
    progress_bar: bool = True,
) -> TrainedEncoder | None:
    """Train and measure an encoder for the generator of a bundle.

    Args:
        bundle: The bundle.
        config: Hyper-parameters.
        out: Folder of the run. It gets the files of `train`, and the folder `encoder`, which is replaced.
        real: Real training images at the generator's resolution. Generated images are always used.
        held_out: Other real images at this resolution, to measure on.
        device: Device of the networks.
        resume: Continue the run that is in `out`.
        loggers: Where curves go besides log.jsonl (`training.loggers`).
        progress_bar: Show a progress bar.

    Returns:
        The result; None if the user stopped the training.

    Raises:
        TrainingError: The images cannot be used, or the training failed.
        DataError: The held-out images, or images of the same patients, were trained on.
    """
    for name, images in (("images", real), ("held-out", held_out)):
        if images is not None and images.resolution != bundle.generator.img_resolution:
            raise TrainingError(f"{name}: {images.resolution} px images for a generator of another resolution")
    if real is not None and held_out is not None:
        check_holdout(real, held_out, trained_on(bundle.provenance), option="--held-out", data_option="--images")
    target = resolve_device(device)
    generator = load_generator(bundle).to(target)
    network = new_network(generator, config)
    digests = {"generator": bundle.files[GENERATOR].sha256, "images": real.sha256 if real else None}
    identity = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    pixels = None if real is None else real.images
    progress = train(
        generator,
        network,
        pixels,
        config,
        out,
        identity=identity,
        resume=resume,
        loggers=loggers,
        progress_bar=progress_bar,
    )
    if progress.stopped:
        return None
    description = EncoderDescription(
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
    stored = network_from(weights, description, "encoder.safetensors").to(target).eval()
    metrics = _measure(generator, stored, held_out, config)
    description = EncoderDescription(**{**vars(description), "metrics": metrics})
    folder = out / FOLDER
    description = write_encoder_folder(folder, description, weights, replace=folder.exists())
    return TrainedEncoder(folder, description, progress)


@torch.inference_mode()
def _measure(
    generator: Generator, network: EncoderNetwork, held_out: ImageDataset | None, config: EncoderConfig
) -> Mapping[str, Any]:
    """Mean distance and pixel error between images and their reconstructions from the encoder and from the mean latent."""
    device = generator.mapping.w_avg.device
    distance = perceptual(config.distance, device)
    w = torch.from_numpy(latents(generator, range(MEASURED_IMAGES), config.seed, stream=_UNSEEN)).to(device)
    images = [
        synthesize(generator, part[:, None].expand(-1, generator.num_ws, -1), None) for part in torch.split(w, 32)
    ]
    metrics = {"distance": config.distance, "generated": _compare(generator, network, torch.cat(images), distance)}
    if held_out is not None:
        chosen = np.unique(np.linspace(0, len(held_out.ids) - 1, MEASURED_IMAGES).round().astype(int))
        pixels: NDArray[np.uint8] = held_out.images[chosen]
        real = torch.tensor(pixels, device=device).permute(0, 3, 1, 2).float()
        metrics["held_out"] = _compare(generator, network, real, distance)
    return metrics


def _compare(
    generator: Generator, network: EncoderNetwork, images: torch.Tensor, distance: Perceptual
) -> dict[str, float]:
    sums = np.zeros(4)
    for part in torch.split(images.clamp(0, 255), 32):
        target = distance.embed(part)
        centre = network.mean.expand(len(part), generator.num_ws, -1)
        for row, ws in enumerate((network(part), centre)):
            image = synthesize(generator, ws, None)
            sums[2 * row] += (distance.embed(image) - target).square().sum().item()
            sums[2 * row + 1] += (image.clamp(0, 255) - part).square().mean(dim=(1, 2, 3)).sqrt().sum().item()
    names = ("encoded", "encoded_pixel_error", "mean_start", "mean_start_pixel_error")
    return {
        "images": len(images),
        **{name: round(value / len(images), 4) for name, value in zip(names, sums, strict=True)},
    }
