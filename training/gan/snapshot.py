"""The results of a run: a grid of samples to look at, and a bundle for services to load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dermis import __version__
from dermis.bundle import check_names, write_bundle
from dermis.devices import describe_hardware
from dermis.errors import TrainingError
from dermis.files import write_file
from dermis.image_metadata import ImageOrigin
from dermis.imaging import Images, contact_sheet, encode
from dermis.latents import noise_vectors, z_for
from dermis.networks import Discriminator, Generator, one_hot
from dermis.synthesizer.network import noise_resolutions, to_uint8
from training.data.images import ImageDataset
from training.gan.best import Measurements
from training.gan.card import model_card
from training.gan.config import GanConfig
from training.gan.private.record import privacy_record
from training.gan.state import GanProgress, GanState
from training.precision import float32_convolutions

GRID = 8  # images in a row; also the number of rows unless there are more classes


@dataclass(frozen=True)
class GeneratorOrigin:
    """The part of a bundle's provenance that the user states."""

    name: str
    dataset_name: str
    licence: str
    attribution: str


def write_snapshot(
    dataset: ImageDataset,
    config: GanConfig,
    origin: GeneratorOrigin,
    device: torch.device,
    *,
    with_discriminator: bool = False,
    measurements: Measurements | None = None,
) -> Callable[[Path, GanState], bytes]:
    """Return the callback of `train`: it writes samples-<kimg>.png and, after the first step, `bundle`, and returns the grid.

    Args:
        dataset: Training images.
        config: Hyper-parameters of the run.
        origin: The stated part of the provenance.
        device: Device of the networks.
        with_discriminator: Add the discriminator to the bundle.
        measurements: Measure the snapshots and keep the best one as the folder `best`.

    Raises:
        DermisError: A bundle cannot have this name, or cannot hold this discriminator. Raised here and not by the callback,
            so that it comes before hours of training.
    """
    class_names = dataset.class_names if config.c_dim else ()
    check_names(origin.name, class_names, config.c_dim)
    if with_discriminator and config.projected:
        raise TrainingError(
            "--with-discriminator: a bundle cannot contain a projected discriminator; omit --with-discriminator or --projected"
        )

    if config.dp and measurements is not None:
        raise TrainingError(
            "--metric: with --dp real images must not be measured or used to choose a snapshot during the training; run "
            "`dermis evaluate` afterwards, whose numbers are not covered by epsilon"
        )

    def bundle(folder: Path, state: GanState, picture: bytes, metrics: Mapping[str, Any]) -> None:
        provenance = _provenance(dataset, config, origin, device, state.progress)
        write_bundle(
            folder,
            name=origin.name,
            generator=state.G_ema,
            discriminator=state.D if with_discriminator and isinstance(state.D, Discriminator) else None,
            class_names=class_names,
            provenance=provenance,
            metrics=metrics,
            model_card=model_card(origin.name, provenance, metrics),
            images={"samples.webp": picture},
            weights_dtype="fp16",
            replace=True,
        )

    def write(out: Path, state: GanState) -> bytes:
        progress = state.progress
        grid = contact_sheet(sample_grid(state.G_ema, device), columns=GRID)
        made_by = ImageOrigin(origin.name, licence=origin.licence, attribution=origin.attribution)
        png = encode(grid, origin=made_by)
        write_file(out / f"samples-{progress.nimg // 1000:06d}.png", png)
        picture = encode(grid, "webp", 75, made_by)  # a twentieth of the PNG's size, to keep the bundle small
        if progress.nimg == 0:
            return png
        bundle(out / "bundle", state, picture, {})
        if measurements is not None and measurements.due(out, progress, config.total_kimg):
            metrics, best = measurements.record(out, progress, out / "bundle")
            bundle(out / "bundle", state, picture, metrics)
            if best:
                bundle(out / "best", state, picture, metrics)
        return png

    return write


def sample_grid(G: Generator, device: torch.device) -> Images:
    """The first samples of seed 0 of every class, in rows of `GRID`, as uint8 [n, H, W, 3]. Classes follow each other."""
    classes = max(G.config.c_dim, 1)
    per_class = GRID * max(GRID // classes, 1)
    return np.concatenate(
        [
            draw_samples(
                G, 0, range(start, start + GRID), [label] * GRID, device
            )  # a row at a time, to limit the memory
            for label in range(classes)
            for start in range(0, per_class, GRID)
        ]
    )


@torch.no_grad()
@float32_convolutions()
def draw_samples(
    G: Generator, seed: int, indices: Sequence[int], labels: Sequence[int] | NDArray[np.int64], device: torch.device
) -> Images:
    """Generate samples as a dataset has them: from (seed, index), each with its own noise.

    The network is called directly: a synthesizer compiles it first, which takes too long for a few images.

    Args:
        G: The generator.
        seed: Seed of all samples.
        indices: Index of each sample.
        labels: Class of each sample.
        device: Device of the generator.

    Returns:
        Images uint8 [n, H, W, 3].
    """
    z = torch.from_numpy(z_for(seed, indices, G.config.z_dim)).to(device)
    sizes = noise_resolutions(G)
    vectors = torch.from_numpy(noise_vectors([seed] * len(indices), indices, sum(size**2 for size in sizes))).to(device)
    parts = torch.split(vectors, [size**2 for size in sizes], dim=1)
    noise = [part.reshape(-1, 1, size, size) for part, size in zip(parts, sizes, strict=True)]
    images: Images = (
        to_uint8(G.synthesis(G.mapping(z, one_hot(labels, G.config.c_dim, device)), noise=noise)).cpu().numpy()
    )
    return images


def _provenance(
    dataset: ImageDataset, config: GanConfig, origin: GeneratorOrigin, device: torch.device, progress: GanProgress
) -> dict[str, Any]:
    counts = np.bincount(dataset.labels, minlength=len(dataset.class_names))
    privacy = {"privacy": privacy_record(config, dataset, progress.dp_steps)} if config.dp else {}
    return {
        "dataset": {
            "name": origin.dataset_name,
            "images": len(dataset.labels),
            "classes": {name: int(count) for name, count in zip(dataset.class_names, counts, strict=True)},
            "sha256": dataset.sha256,
        },
        "kimg": progress.nimg / 1000,
        "training": {
            "configuration": config.to_dict(),
            "hardware": describe_hardware(device),
            "hours": round(progress.seconds / 3600, 3),
            "augment_p": progress.stats.get("p", config.augment_p),
            "changes": progress.changes,
            "started_from": progress.started_from,
        },
        "licence": origin.licence,
        "attribution": origin.attribution,
        "code_version": __version__,
        **privacy,
    }
