"""`dermis train ...`: from a folder of images to a run folder and a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    BinaryOption,
    ClassColumnOption,
    ImageColumnOption,
    LayoutOption,
    MapOption,
    MetadataOption,
    read_described,
)

train_app = typer.Typer(no_args_is_help=True, help="Train generators.")


@train_app.command("gan")
def train_gan(
    data: Annotated[Path, typer.Option(help="ISIC folder with its CSV, folder of class folders, or StyleGAN zip.")],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, sample grids, bundle.")],
    resolution: Annotated[int, typer.Option(help="Image side in pixels, a power of two.")] = 64,
    base: Annotated[str, typer.Option(help="Configuration to start from: auto, paper256 or stylegan2.")] = "auto",
    kimg: Annotated[
        float | None, typer.Option(help="Length: thousands of real images shown to the discriminator; default 1000.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with other options than before; the card tells of it.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Begin with the weights of a bundle or an official .pkl.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: the run folder's name.")] = None,
    licence: Annotated[str, typer.Option(help="Licence of the training images, carried by the weights.")] = "unknown",
    attribution: Annotated[str, typer.Option(help="Whom users of the weights must credit.")] = "",
    with_discriminator: Annotated[
        bool, typer.Option("--with-discriminator", help="Put the discriminator into the bundle, for others to go on.")
    ] = False,
    conditional: Annotated[bool, typer.Option(help="Learn one class label an image.")] = True,
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
    batch: Annotated[
        int | None, typer.Option(help="Images a step, of all GPUs; default follows the resolution.")
    ] = None,
    channel_base: Annotated[int | None, typer.Option(help="Network width; default 16384 (32768 from 512 px).")] = None,
    channel_max: Annotated[int | None, typer.Option(help="Most channels of a layer; default 512.")] = None,
    z_dim: Annotated[int | None, typer.Option(help="Size of z; default 512.")] = None,
    w_dim: Annotated[int | None, typer.Option(help="Size of w; default 512.")] = None,
    mapping_layers: Annotated[int | None, typer.Option(help="Depth of the mapping network; default 2.")] = None,
    discriminator_mapping_layers: Annotated[
        int, typer.Option(min=0, max=64, help="Depth of the discriminator's mapping network of labels.")
    ] = 8,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of both networks; default follows the resolution.")
    ] = None,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="Lower the learning rate to this value by --learning-rate-kimg.")
    ] = None,
    learning_rate_kimg: Annotated[
        float, typer.Option(help="When --final-learning-rate is reached; constant from there on.")
    ] = 0.0,
    r1_gamma: Annotated[float | None, typer.Option(help="R1 weight; default follows resolution and batch.")] = None,
    pl_weight: Annotated[
        float | None, typer.Option(help="Path-length weight; default 2, 0 leaves the phase out.")
    ] = None,
    mirror: Annotated[bool, typer.Option(help="Flip training images horizontally at random.")] = True,
    augment: Annotated[
        str | None, typer.Option(help="none, blit, geom, color, ..., bg, bgc, ... bgcfnc; default bg, projected blit.")
    ] = None,
    augment_target: Annotated[float | None, typer.Option(help="Target of E[sign(D(real))]; default 0.6.")] = None,
    augment_p: Annotated[
        float | None, typer.Option(help="Fixed augmentation strength instead of an adaptive one.")
    ] = None,
    augment_kimg: Annotated[
        float | None, typer.Option(help="Speed: kimg in which p can go from 0 to 1; default 500, with --from 100.")
    ] = None,
    projected: Annotated[
        bool, typer.Option("--projected", help="Judge by features of a pretrained network: learns in far fewer kimg.")
    ] = False,
    projected_levels: Annotated[
        int, typer.Option(help="With --projected: feature levels that are judged, 4 or 5.")
    ] = 4,
    projected_input: Annotated[
        int, typer.Option(help="With --projected: enlarge smaller images to this side; 224 suits it.")
    ] = 128,
    projected_mbstd: Annotated[
        bool,
        typer.Option("--projected-mbstd", help="With --projected: show its heads how much images of a group differ."),
    ] = False,
    moments_weight: Annotated[
        float, typer.Option(help="With --projected: match mean and covariance of its features; try 1 to 5.")
    ] = 0.0,
    class_moments_weight: Annotated[
        float, typer.Option(help="With --moments-weight: match how far the classes are apart; try 0.5.")
    ] = 0.0,
    relativistic: Annotated[
        bool, typer.Option("--relativistic", help="Judge generated images against real ones in pairs, with R1 and R2.")
    ] = False,
    class_balance: Annotated[
        float, typer.Option(help="0 shows the classes in their proportions, 1 all equally often.")
    ] = 0.0,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 (the last on a GPU only).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile_networks: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the main phases; default: on CUDA.")
    ] = None,
    snapshot_kimg: Annotated[float, typer.Option(help="Checkpoint, grid and bundle every so many kimg.")] = 20.0,
    tensorboard: Annotated[bool, typer.Option(help="Curves and grids for TensorBoard, in the run folder.")] = False,
    metric: Annotated[
        str | None, typer.Option(help="fid or kid: measure at snapshots and keep the best as the bundle `best`.")
    ] = None,
    metric_kimg: Annotated[float, typer.Option(help="Measure every so many kimg.")] = 50.0,
    metric_count: Annotated[int, typer.Option(help="Generated images of a measurement.")] = 2000,
    seed: Annotated[int, typer.Option(help="Decides everything random.")] = 0,
    cache: Annotated[Path, typer.Option(help="Where decoded images are kept.")] = Path(".dermis/cache"),
) -> None:
    """Train StyleGAN2-ADA on a folder of dermoscopy images and write a bundle. Ctrl-C saves; --resume goes on.

    Under `torchrun` it uses one GPU a process.
    """
    from dataclasses import replace

    from dermis.devices import resolve_device
    from dermis.errors import TrainingError
    from training.data.images import load_images
    from training.distributed import joined_ranks
    from training.gan.best import Measurements
    from training.gan.config import automatic_batch, automatic_precision, base_config
    from training.gan.loop import train
    from training.gan.snapshot import GeneratorOrigin, write_snapshot
    from training.gan.state import GanState
    from training.gan.transfer import read_source, transfer
    from training.tensorboard import require_tensorboard

    if tensorboard:
        require_tensorboard()
    with joined_ranks(resolve_device(device)) as ranks:

        def tell(text: str) -> None:
            if ranks.first:
                typer.echo(text, err=True)

        target = ranks.device
        if precision == "auto":
            precision = automatic_precision(target)
        with ranks.one_after_another():
            images = read_described(
                data, metadata, image_column, class_column, binary, maps, layout, quiet=not ranks.first
            )
            dataset = load_images(images, resolution, cache=cache)
        try:
            config = base_config(
                base,
                resolution,
                len(dataset.class_names) if conditional else 0,
                total_kimg=kimg,
                batch=batch or (automatic_batch(resolution, ranks.count) if base == "auto" else None),
                channel_base=channel_base,
                channel_max=channel_max,
                z_dim=z_dim,
                w_dim=w_dim,
                mapping_layers=mapping_layers,
                discriminator_mapping_layers=discriminator_mapping_layers,
                learning_rate=learning_rate,
                final_learning_rate=final_learning_rate,
                learning_rate_kimg=learning_rate_kimg,
                r1_gamma=r1_gamma,
                pl_weight=pl_weight,
                mirror=mirror,
                augment=augment,
                augment_target=augment_target,
                augment_p=augment_p,
                augment_kimg=100.0 if augment_kimg is None and source is not None else augment_kimg,
                precision=precision,
                projected=projected,
                projected_levels=projected_levels,
                projected_input=projected_input,
                projected_mbstd=projected_mbstd,
                moments_weight=moments_weight,
                class_moments_weight=class_moments_weight,
                relativistic=relativistic,
                class_balance=class_balance,
                seed=seed,
            )
            if augment_p is not None:
                config = replace(config, augment_target=None)
            if source is not None:  # trained weights need no short average at the start
                config = replace(config, ema_rampup=None)
            _ = config.generator, config.discriminator
        except ValueError as error:
            raise TrainingError(str(error)) from error
        where = f"{ranks.count} x {target.type}" if ranks.count > 1 else str(target)
        tell(f"{len(dataset.labels)} images, {len(dataset.class_names)} classes, {precision} on {where}")

        def begin(state: GanState) -> None:
            if source is not None:
                tell("\n".join(map(str, transfer(read_source(source), state))))

        origin = GeneratorOrigin(name or out.name, data.resolve().name, licence, attribution)
        _, progress = train(
            dataset,
            config,
            out,
            device=target,
            ranks=ranks,
            resume=resume,
            allow_changes=allow_changes,
            compile_networks=target.type == "cuda" if compile_networks is None else compile_networks,
            snapshot_kimg=snapshot_kimg,
            begin=begin,
            on_snapshot=write_snapshot(
                dataset,
                config,
                origin,
                target,
                with_discriminator=with_discriminator,
                measurements=Measurements(dataset, metric, metric_kimg, metric_count, target) if metric else None,
                tensorboard=tensorboard,
            ),
            tensorboard=tensorboard,
        )
    if progress.stopped:
        tell(f"stopped at {progress.kimg:.1f} kimg and saved; the same command with --resume goes on")
        raise typer.Exit(130)
    if ranks.first:
        typer.echo(f"{out}: {progress.kimg:.1f} kimg in {progress.seconds / 3600:.2f} h; bundle in {out / 'bundle'}")
