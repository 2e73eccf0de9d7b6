"""`dermis train gan`: from a folder of images to a run folder and a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.options import (
    CACHE,
    AttributionOption,
    BinaryOption,
    CacheOption,
    ClassColumnOption,
    CompileOption,
    DataOption,
    DeviceOption,
    ImageColumnOption,
    LayoutOption,
    LicenceOption,
    LogOption,
    MapOption,
    MetadataOption,
    ResumeOption,
    TensorboardOption,
    TrainingSeedOption,
)
from commands.sources import read_and_report


def train_gan(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, sample grids, bundle.")],
    resolution: Annotated[int, typer.Option(help="Image side in pixels, a power of two.")] = 64,
    base: Annotated[
        Literal["auto", "paper256", "stylegan2"], typer.Option(help="Configuration that the other options change.")
    ] = "auto",
    kimg: Annotated[
        float | None,
        typer.Option(help="Length: thousands of real images shown to the discriminator; default 1000."),
    ] = None,
    resume: ResumeOption = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with other options than before; the card lists the changes.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Initial weights: a bundle or an official .pkl.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; default: name of the run folder.")] = None,
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    with_discriminator: Annotated[
        bool,
        typer.Option(
            "--with-discriminator", help="Put the discriminator into the bundle, to continue training from it."
        ),
    ] = False,
    conditional: Annotated[bool, typer.Option(help="Train with the class of each image as its label.")] = True,
    metadata: MetadataOption = None,
    image_column: ImageColumnOption = None,
    class_column: ClassColumnOption = None,
    binary: BinaryOption = False,
    maps: MapOption = None,
    layout: LayoutOption = None,
    batch: Annotated[
        int | None, typer.Option(help="Images in a step, over all GPUs; the default depends on the resolution.")
    ] = None,
    channel_base: Annotated[int | None, typer.Option(help="Network width; default 16384 (32768 from 512 px).")] = None,
    channel_max: Annotated[int | None, typer.Option(help="Maximum number of channels of a layer; default 512.")] = None,
    z_dim: Annotated[int | None, typer.Option(help="Dimensions of z; default 512.")] = None,
    w_dim: Annotated[int | None, typer.Option(help="Dimensions of w; default 512.")] = None,
    mapping_layers: Annotated[int | None, typer.Option(help="Layers of the mapping network; default 2.")] = None,
    discriminator_mapping_layers: Annotated[
        int, typer.Option(min=0, max=64, help="Layers of the discriminator's mapping network for labels.")
    ] = 8,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of both networks; the default depends on the resolution.")
    ] = None,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="Lower the learning rate to this value until --learning-rate-kimg.")
    ] = None,
    learning_rate_kimg: Annotated[
        float, typer.Option(help="Length after which --final-learning-rate is reached; constant from there on.")
    ] = 0.0,
    r1_gamma: Annotated[
        float | None, typer.Option(help="Weight of R1; the default depends on resolution and batch.")
    ] = None,
    pl_weight: Annotated[
        float | None, typer.Option(help="Weight of path-length regularisation; default 2, 0 for none.")
    ] = None,
    mirror: Annotated[bool, typer.Option(help="Flip training images horizontally at random.")] = True,
    augment: Annotated[
        str | None,
        typer.Option(help="none, blit, geom, color, ..., bg, bgc, ... bgcfnc; default bg, with --projected blit."),
    ] = None,
    augment_target: Annotated[float | None, typer.Option(help="Target of E\\[sign(D(real))]; default 0.6.")] = None,
    augment_p: Annotated[
        float | None, typer.Option(help="Fixed augmentation strength instead of an adaptive one.")
    ] = None,
    augment_kimg: Annotated[
        float | None,
        typer.Option(help="Length in kimg over which p can rise from 0 to 1; default 500, with --from 100."),
    ] = None,
    projected: Annotated[
        bool,
        typer.Option("--projected", help="Discriminate in features of a pretrained network: needs far fewer kimg."),
    ] = False,
    projected_levels: Annotated[
        int, typer.Option(help="With --projected: number of feature levels to discriminate, 4 or 5.")
    ] = 4,
    projected_input: Annotated[
        int, typer.Option(help="With --projected: side to which smaller images are enlarged; 224 suits the network.")
    ] = 128,
    projected_mbstd: Annotated[
        bool,
        typer.Option(
            "--projected-mbstd", help="With --projected: show its heads how much the images of a group differ."
        ),
    ] = False,
    moments_weight: Annotated[
        float,
        typer.Option(help="With --projected: weight of matching mean and covariance of the features; try 1 to 5."),
    ] = 0.0,
    class_moments_weight: Annotated[
        float, typer.Option(help="With --moments-weight: weight of matching the distance of the classes; try 0.5.")
    ] = 0.0,
    projected_width: Annotated[
        int | None,
        typer.Option(
            help="With --projected: largest number of channels in the heads; default 256. Noise of --dp harms small heads less."
        ),
    ] = None,
    relativistic: Annotated[
        bool,
        typer.Option(
            "--relativistic",
            help="Compare generated with real images in pairs, with the penalties R1 and R2.",
        ),
    ] = False,
    class_balance: Annotated[
        float, typer.Option(help="0 shows the classes in their proportions, 1 all equally often.")
    ] = 0.0,
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="Arithmetic; fp16 on a GPU only.")
    ] = "auto",
    device: DeviceOption = "auto",
    compile_networks: CompileOption = None,
    snapshot_kimg: Annotated[float, typer.Option(help="Interval in kimg of checkpoint, grid and bundle.")] = 20.0,
    log: LogOption = None,
    tensorboard: TensorboardOption = False,
    metric: Annotated[
        Literal["fid", "kid"] | None,
        typer.Option(help="Measure this at snapshots and keep the best generator as the bundle `best`."),
    ] = None,
    metric_kimg: Annotated[float, typer.Option(help="Interval in kimg of the measurements.")] = 50.0,
    metric_count: Annotated[int, typer.Option(help="Generated images of a measurement.")] = 2000,
    dp: Annotated[
        bool,
        typer.Option(
            "--dp", help="Train with differential privacy for each patient; needs --dp-epsilon or --dp-noise."
        ),
    ] = False,
    dp_epsilon: Annotated[
        float | None,
        typer.Option(help="With --dp: stop before this epsilon is exceeded; without --dp-noise, reach it at --kimg."),
    ] = None,
    dp_noise: Annotated[
        float | None, typer.Option(help="With --dp: standard deviation of the noise, divided by --dp-clip.")
    ] = None,
    dp_clip: Annotated[
        float | None, typer.Option(help="With --dp: largest norm of the gradient of one patient; default 1.")
    ] = None,
    dp_delta: Annotated[
        float | None, typer.Option(help="With --dp: delta; default 1 / (10 x number of patients).")
    ] = None,
    dp_images_per_patient: Annotated[
        int | None, typer.Option(help="With --dp: maximum number of images of a patient in a step; default 4.")
    ] = None,
    dp_public_start: Annotated[
        bool,
        typer.Option(
            "--dp-public-start", help="With --dp: state that the weights of --from were trained on public images only."
        ),
    ] = False,
    dp_seed: Annotated[
        int | None,
        typer.Option(help="With --dp, for tests only: noise from a seed. The run can be repeated and protects nobody."),
    ] = None,
    seed: TrainingSeedOption = 0,
    cache: CacheOption = CACHE,
) -> None:
    """Train StyleGAN2-ADA on dermoscopy images and write a bundle. Ctrl-C saves; --resume continues.

    Under `torchrun` each process uses one GPU.
    """
    from dataclasses import replace

    from dermis.devices import resolve_device
    from dermis.errors import TrainingError
    from training.data.images import load_images
    from training.distributed import joined_ranks
    from training.gan.best import Measurements
    from training.gan.config import automatic_batch, automatic_precision, base_config
    from training.gan.loop import NOT_PUBLIC, train
    from training.gan.private.planning import describe_privacy, resolved_privacy
    from training.gan.snapshot import GeneratorOrigin, write_snapshot
    from training.gan.state import GanState
    from training.gan.transfer import read_source, transfer
    from training.loggers import check_loggers

    loggers = check_loggers([*(log or ()), *(["tensorboard"] if tensorboard else [])])
    if dp and source is not None and not dp_public_start:
        raise TrainingError(NOT_PUBLIC)
    if dp_public_start and source is None:
        raise TrainingError("--dp-public-start: is a statement about the weights of --from; give --from as well")
    with joined_ranks(resolve_device(device)) as ranks:

        def report(text: str) -> None:
            if ranks.first:
                typer.echo(text, err=True)

        target = ranks.device
        if precision == "auto":
            precision = automatic_precision(target)
        with ranks.first_rank_first():
            images = read_and_report(
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
                projected_width=projected_width,
                moments_weight=moments_weight,
                class_moments_weight=class_moments_weight,
                relativistic=relativistic,
                class_balance=class_balance,
                seed=seed,
                dp=dp,
                dp_epsilon=dp_epsilon,
                dp_noise=dp_noise,
                dp_clip=dp_clip,
                dp_delta=dp_delta,
                dp_images_per_patient=dp_images_per_patient,
                dp_seed=dp_seed,
                dp_public_start=dp_public_start,
            )
            if augment_p is not None:
                config = replace(config, augment_target=None)
            if source is not None:  # trained weights need no short average at the start
                config = replace(config, ema_rampup=None)
            _ = config.generator, config.discriminator
            if dp:
                config = resolved_privacy(config, dataset, out, resume=resume)
                report(describe_privacy(config, dataset))
        except ValueError as error:
            raise TrainingError(str(error)) from error
        hardware = f"{ranks.count} x {target.type}" if ranks.count > 1 else str(target)
        report(f"{len(dataset.labels)} images, {len(dataset.class_names)} classes, {precision} on {hardware}")

        def begin(state: GanState) -> None:
            if source is not None:
                report("\n".join(map(str, transfer(read_source(source), state))))

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
            ),
            loggers=loggers,
        )
    if progress.stopped:
        report(f"stopped at {progress.kimg:.1f} kimg and saved; run the same command with --resume to continue")
        raise typer.Exit(130)
    if dp and progress.kimg * 1000 < int(config.total_kimg * 1000):
        report(
            f"stopped at {progress.kimg:.1f} kimg, because the next step would exceed --dp-epsilon {config.dp_epsilon:g}"
        )
    if dp and "epsilon" in progress.stats:
        report(f"epsilon {progress.stats['epsilon']:.3f} after {progress.dp_steps:,} steps")
    if ranks.first:
        typer.echo(f"{out}: {progress.kimg:.1f} kimg in {progress.seconds / 3600:.2f} h; bundle in {out / 'bundle'}")
