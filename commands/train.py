"""`dermis train ...`: from a folder of images to a run folder and a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

train_app = typer.Typer(no_args_is_help=True, help="Train generators.")


@train_app.command("gan")
def train_gan(
    data: Annotated[Path, typer.Option(help="ISIC-layout folder: images and metadata.csv.")],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, sample grids, bundle.")],
    resolution: Annotated[int, typer.Option(help="Image side in pixels, a power of two.")] = 64,
    kimg: Annotated[float, typer.Option(help="Length: thousands of real images shown to the discriminator.")] = 1000.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with other options than before; the card tells of it.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: the run folder's name.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the training images, carried by the weights.")] = "unknown",
    attribution: Annotated[str, typer.Option(help="Whom users of the weights must credit.")] = "",
    conditional: Annotated[bool, typer.Option(help="Learn one class label an image.")] = True,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes; default: target, ...")] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV file; default: metadata.csv in --data.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step; default follows the resolution.")] = None,
    channel_base: Annotated[int | None, typer.Option(help="Network width; default 16384 (32768 from 512 px).")] = None,
    channel_max: Annotated[int, typer.Option(help="Most channels of a layer.")] = 512,
    z_dim: Annotated[int, typer.Option(help="Size of z.")] = 512,
    w_dim: Annotated[int, typer.Option(help="Size of w.")] = 512,
    mapping_layers: Annotated[int, typer.Option(help="Depth of the mapping network.")] = 2,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of both networks; default follows the resolution.")
    ] = None,
    r1_gamma: Annotated[float | None, typer.Option(help="R1 weight; default follows resolution and batch.")] = None,
    pl_weight: Annotated[float, typer.Option(help="Path-length weight; 0 leaves the phase out.")] = 2.0,
    mirror: Annotated[bool, typer.Option(help="Flip training images horizontally at random.")] = True,
    augment: Annotated[
        str | None, typer.Option(help="none, blit, geom or bg; default bg, with --projected blit.")
    ] = None,
    augment_target: Annotated[float, typer.Option(help="Target of E[sign(D(real))].")] = 0.6,
    augment_p: Annotated[
        float | None, typer.Option(help="Fixed augmentation strength instead of an adaptive one.")
    ] = None,
    augment_kimg: Annotated[float, typer.Option(help="Speed: kimg in which p can go from 0 to 1.")] = 500.0,
    projected: Annotated[
        bool, typer.Option("--projected", help="Judge by features of a pretrained network: learns in far fewer kimg.")
    ] = False,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile_networks: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the main phases; default: on CUDA.")
    ] = None,
    snapshot_kimg: Annotated[float, typer.Option(help="Checkpoint, grid and bundle every so many kimg.")] = 20.0,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    cache: Annotated[Path, typer.Option(help="Where decoded images are kept.")] = Path(".dermis/cache"),
) -> None:
    """Train StyleGAN2-ADA on a folder of dermoscopy images and write a bundle. Ctrl-C saves; --resume goes on."""
    import torch

    from dermis.devices import fast_dtype, resolve_device
    from dermis.errors import TrainingError
    from training.data.isic import load_isic
    from training.gan.config import auto_config
    from training.gan.loop import train
    from training.gan.snapshot import Origin, write_snapshot

    target = resolve_device(device)
    if precision == "auto":
        precision = "bf16" if fast_dtype(target) == torch.bfloat16 else "fp32"
    if precision not in ("fp32", "bf16", "fp16"):
        raise TrainingError(f"--precision: {precision!r} is none of auto, fp32, bf16, fp16")
    dataset = load_isic(data, resolution, class_column=class_column, metadata=metadata, cache=cache)
    try:
        config = auto_config(
            resolution,
            len(dataset.class_names) if conditional else 0,
            total_kimg=kimg,
            batch=batch,
            channel_base=channel_base,
            channel_max=channel_max,
            z_dim=z_dim,
            w_dim=w_dim,
            mapping_layers=mapping_layers,
            learning_rate=learning_rate,
            r1_gamma=r1_gamma,
            pl_weight=pl_weight,
            mirror=mirror,
            augment=augment,
            augment_target=augment_target,
            augment_p=augment_p,
            augment_kimg=augment_kimg,
            precision=precision,
            projected=projected,
            seed=seed,
        )
        if augment_p is not None:
            from dataclasses import replace

            config = replace(config, augment_target=None)
        _ = config.generator, config.discriminator
    except ValueError as error:
        raise TrainingError(str(error)) from error
    typer.echo(f"{len(dataset.labels)} images, {len(dataset.class_names)} classes, {precision} on {target}", err=True)

    origin = Origin(name or out.name, data.resolve().name, licence, attribution)
    _, progress = train(
        dataset,
        config,
        out,
        device=target,
        resume=resume,
        allow_changes=allow_changes,
        compile_networks=target.type == "cuda" if compile_networks is None else compile_networks,
        snapshot_kimg=snapshot_kimg,
        on_snapshot=write_snapshot(dataset, config, origin, target),
    )
    if progress.stopped:
        typer.echo(
            f"stopped at {progress.nimg / 1000:.1f} kimg and saved; the same command with --resume goes on", err=True
        )
        raise typer.Exit(130)
    typer.echo(f"{out}: {progress.nimg / 1000:.1f} kimg in {progress.seconds / 3600:.2f} h; bundle in {out / 'bundle'}")
