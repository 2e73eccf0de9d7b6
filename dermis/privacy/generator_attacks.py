"""Membership inference from the generator: by how well it reproduces an image, and by its discriminator.

projection     The generator may reproduce training images better than others (Hayes et al., arXiv 1705.07663, and Chen et
               al., arXiv 1909.03935, describe such attacks). An image is encoded by the bundle's encoder and generated
               again; the score is
               -log of the mean squared error of the pixels. Optionally some images are optimised further from there. The
               encoder was trained on the training images as well; what it discloses counts, as it is part of the bundle.
discriminator  A discriminator that has memorised gives higher logits to training images (Hayes et al.). The score is the
               mean logit of an image with its class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dermis.errors import BundleError
from dermis.imaging import Images
from dermis.networks import one_hot
from dermis.privacy.attacks import Scores

if TYPE_CHECKING:
    from dermis.bundle import Bundle

BATCH = 16
_FLOOR = 1e-6  # of the squared error in -1..1: below the rounding to 8 bits

Logits = Callable[[Tensor, Tensor | None], Tensor]
"""Images float [N, 3, R, R] in -1..1 and classes [N, c_dim], None without classes -> logits [N, k]."""


def projection_scores(
    bundle: Bundle, images: Images, *, device: str = "auto", on_batch: Callable[[int], object] = lambda _: None
) -> Scores:
    """Compute the scores of images uint8 [N, R, R, 3] by the encoder of the bundle.

    Args:
        bundle: The bundle.
        images: The images.
        device: Device of the networks.
        on_batch: Called with the number of images of each batch.

    Raises:
        BundleError: The bundle has no encoder.
    """
    from dermis.bundle import load_generator
    from dermis.devices import resolve_device
    from dermis.projection.encoder import load_encoder

    encoder = load_encoder(bundle, device=device)
    if encoder is None:
        raise BundleError(f"{bundle.location}: has no encoder; train one with dermis train encoder")
    place = resolve_device(device)
    generator = load_generator(bundle).to(place)
    values = []
    for start in range(0, len(images), BATCH):
        batch = np.ascontiguousarray(images[start : start + BATCH])
        with torch.inference_mode():
            ws = torch.from_numpy(encoder(batch)).to(place)
            again = generator.synthesis(ws, noise_mode="none").float().cpu().numpy()
        original = batch.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
        values.append(np.square(again.clip(-1, 1) - original).mean(axis=(1, 2, 3)))
        on_batch(len(batch))
    return Scores("projection", "generator", "pixels", -np.log(np.concatenate(values).astype(np.float64) + _FLOOR))


def optimised_scores(
    bundle: Bundle,
    images: Images,
    *,
    steps: int,
    distance: str,
    device: str = "auto",
    on_image: Callable[[int], object] = lambda _: None,
) -> Scores:
    """Compute the scores of images uint8 [N, R, R, 3] by a short optimisation of their latents.

    Args:
        bundle: The bundle. Without an encoder the optimisation starts from the mean latent.
        images: The images.
        steps: Steps of the optimisation.
        distance: Name of the perceptual distance.
        device: Device of the networks.
        on_image: Called with 1 after each image.
    """
    from dermis.projection.encoder import load_encoder
    from dermis.projection.projector import ImageProjector, Target
    from dermis.projection.schedule import FAST

    encoder = load_encoder(bundle, device=device)
    projector = ImageProjector(bundle, distance=distance, device=device, encode=encoder)
    schedule = replace(FAST, steps=steps, start="mean" if encoder is None else "encoder")
    distances = np.empty(len(images))
    targets = (Target(np.ascontiguousarray(image)) for image in images)
    for position, result in projector.project(targets, schedule):
        distances[position] = result.distance
        on_image(1)
    return Scores("optimised projection", "generator", distance, -np.log(distances + _FLOOR))


def discriminator_scores(
    logits: Logits,
    images: Images,
    labels: Sequence[int],
    c_dim: int,
    *,
    device: torch.device,
    on_batch: Callable[[int], object] = lambda _: None,
) -> Scores:
    """Compute the scores of images uint8 [N, R, R, 3] by a discriminator.

    Images are given to it one at a time, so that a standard deviation over the batch is that of one image.

    Args:
        logits: The discriminator.
        images: The images.
        labels: Class number of each image.
        c_dim: Number of classes of the discriminator, 0 for none.
        device: Its device.
        on_batch: Called with 1 after each image.
    """
    values = []
    for image, label in zip(images, labels, strict=True):
        x = torch.tensor(image, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            values.append(float(logits(x, one_hot([label], c_dim, device) if c_dim else None).mean()))
        on_batch(1)
    return Scores("discriminator", "generator", "logit", np.array(values))
