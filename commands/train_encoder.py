"""`dermis train encoder`: an encoder for a bundle's generator, from which projections start."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from training.data.isic import ImageDataset


def train_encoder(
    bundle: Annotated[Path, typer.Option(help="Bundle whose generator's latents it learns.")],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, and the folder `encoder`.")],
    images: Annotated[
        Path | None, typer.Option(help="Real images to learn from: anything that `dermis data` reads.")
    ] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV of --images, if it is not its metadata.csv.")] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="CSV of other images of --images (or a folder), to measure on.")
    ] = None,
    attach: Annotated[bool, typer.Option("--attach", help="Put it into the bundle, which gets a new digest.")] = False,
    backbone: Annotated[str, typer.Option(help="small, or timm:MODEL (random weights).")] = "small",
    size: Annotated[int, typer.Option(help="Pixels to which the encoder brings images.")] = 64,
    components: Annotated[int, typer.Option(help="Principal components of w that it gives.")] = 64,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 3000,
    warm_up: Annotated[int, typer.Option(help="Steps that regress generated images' latents alone.")] = 600,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its highest.")] = 1e-3,
    distance: Annotated[str, typer.Option(help="Perceptual distance: vgg16 (downloads weights) or lite0.")] = "vgg16",
    real_share: Annotated[float, typer.Option(help="Share of real images in a batch after the warm-up.")] = 0.75,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[Path, typer.Option(help="Where decoded images are kept.")] = Path(".dermis/cache"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
) -> None:
    """Train an encoder: real image to latent in one pass, near enough for a short optimisation to go on from.

    Ctrl-C saves; --resume goes on.
    """
    from dermis.bundle import amend_bundle, open_bundle
    from dermis.errors import RequestError
    from training.data.isic import load_isic
    from training.encoder.config import EncoderConfig
    from training.encoder.run import train_encoder as run

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
        raise RequestError("--held-out", "goes with --images, the images to learn from")
    real = None if images is None else load(images, metadata)
    others = None
    if held_out is not None and images is not None:
        others = load(held_out, None) if held_out.is_dir() else load(images, held_out)
    result = run(opened, config, out, real=real, held_out=others, device=device, resume=resume)
    if result is None:
        typer.echo("stopped and saved; the same command with --resume goes on", err=True)
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
        typer.echo(f"{bundle}: {amended.name}@{amended.digest}")
