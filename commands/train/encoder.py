"""`dermis train encoder`: an encoder for a bundle's generator, from which projections can start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from commands.console import warn_of_removed_audit
from commands.options import (
    CACHE,
    CacheOption,
    ClassColumnOption,
    DeviceOption,
    LogOption,
    MetadataOption,
    ResumeOption,
    TrainingSeedOption,
)

if TYPE_CHECKING:
    from training.data.images import ImageDataset


def train_encoder(
    bundle: Annotated[Path, typer.Option(help="Bundle with the generator.")],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, and the folder `encoder`.")],
    images: Annotated[
        Path | None, typer.Option(help="Real training images: a folder, zip or CSV that `dermis data` can read.")
    ] = None,
    metadata: MetadataOption = None,
    held_out: Annotated[
        Path | None, typer.Option(help="Images to measure with: a CSV of other images of --images, or a folder.")
    ] = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="Put the encoder into the bundle, which gets a new digest.")
    ] = False,
    backbone: Annotated[str, typer.Option(help="small, or timm:MODEL (random weights).")] = "small",
    size: Annotated[int, typer.Option(help="Side in pixels of the encoder's input.")] = 64,
    components: Annotated[int, typer.Option(help="Principal components of w that the encoder predicts.")] = 64,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 3000,
    warm_up: Annotated[
        int, typer.Option(help="First steps, which only regress the latents of generated images.")
    ] = 600,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Maximum learning rate of AdamW.")] = 1e-3,
    distance: Annotated[
        Literal["vgg16", "lite0"], typer.Option(help="Perceptual distance: vgg16 (downloads weights) or lite0.")
    ] = "vgg16",
    real_share: Annotated[float, typer.Option(help="Share of real images in a batch after --warm-up.")] = 0.75,
    seed: TrainingSeedOption = 0,
    class_column: ClassColumnOption = None,
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
    resume: ResumeOption = False,
    log: LogOption = None,
) -> None:
    """Train an encoder that computes a latent of a real image in one pass, from which a short optimisation can start.

    Ctrl-C saves; --resume continues.
    """
    from dermis.bundle import amend_bundle, open_bundle
    from dermis.errors import RequestError
    from training.data.isic import load_isic
    from training.encoder.config import EncoderConfig
    from training.encoder.run import train_encoder as run
    from training.loggers import check_loggers

    loggers = check_loggers(log or ())
    config = EncoderConfig(
        backbone=backbone,
        size=size,
        components=components,
        steps=steps,
        warm_up=warm_up,
        batch=batch,
        learning_rate=learning_rate,
        distance=distance,
        real_share=real_share,
        seed=seed,
    )
    opened = open_bundle(bundle)
    resolution = opened.generator.img_resolution

    def load(folder: Path, csv: Path | None) -> ImageDataset:
        return load_isic(folder, resolution, class_column=class_column, metadata=csv, cache=cache)

    if held_out is not None and images is None:
        raise RequestError("--held-out", "needs --images, the training images")
    real = None if images is None else load(images, metadata)
    held_out_images = None
    if held_out is not None and images is not None:
        held_out_images = load(held_out, None) if held_out.is_dir() else load(images, held_out)
    result = run(
        opened, config, out, real=real, held_out=held_out_images, device=device, resume=resume, loggers=loggers
    )
    if result is None:
        typer.echo("stopped and saved; run the same command with --resume to continue", err=True)
        raise typer.Exit(130)
    for name in ("generated", "held_out"):
        if name in result.description.metrics:
            row = result.description.metrics[name]
            typer.echo(
                f"{row['images']} {name.replace('_', '-')} images: {distance} distance {row['encoded']:.3f} "
                f"(the mean image {row['mean_start']:.3f}), pixel error {row['encoded_pixel_error']:.1f} of 255 "
                f"({row['mean_start_pixel_error']:.1f})"
            )
    typer.echo(f"{result.folder}: {result.progress.step:,} steps in {result.progress.seconds / 60:.0f} min")
    if attach:
        amended = amend_bundle(opened, parts={"encoder": result.folder})
        warn_of_removed_audit(opened, "encoder")
        typer.echo(f"{bundle}: {amended.name}@{amended.digest}")
