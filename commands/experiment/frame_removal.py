"""`dermis experiment frame-removal`: classifiers trained on generated images with and without the black frame."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    CACHE,
    BundleOption,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    MetadataOption,
    SampleSeedOption,
    SettingsOption,
    SplitOption,
    TruncationOption,
    WeightsOption,
)


def frame_removal(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the images, the runs and the table.")],
    generator: BundleOption,
    direction: Annotated[
        str, typer.Option(help="Direction that adds and removes the frame; see `dermis directions measure --framed`.")
    ],
    framing: Annotated[float, typer.Option(help="Strength that adds the frame.")] = -2.0,
    removing: Annotated[float, typer.Option(help="Strength that removes the frame.")] = 1.0,
    samples: Annotated[
        int | None, typer.Option(help="Generated images of each class; default: 10000 times --scale.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor for the number of generated images.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Classifiers in each arm.")] = 3,
    seed: SampleSeedOption = 0,
    split: SplitOption = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side in pixels of the classifier's input; default 256.")
    ] = None,
    settings: SettingsOption = None,
    weights: WeightsOption = "imagenet",
    truncation_psi: TruncationOption = 1.0,
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
) -> None:
    """Train classifiers on generated images: as they are, with the frame added, and with the frame removed.

    The bundle needs directions and the classes benign and malignant. Ctrl-C saves the state. Run the same command again to
    continue. Not a medical device.
    """
    from dermis.bundle import open_bundle, trained_on
    from dermis.devices import resolve_device
    from training.classifier.config import ClassifierConfig
    from training.classifier.data import load_real
    from training.experiments.frame_removal import TABLE, FramePlan, run_frame_removal, write_results
    from training.options import parse_settings

    bundle = open_bundle(generator)
    plan = FramePlan(
        direction=direction,
        framing=framing,
        removing=removing,
        per_class=samples or max(1, round(10_000 * scale)),
        truncation_psi=truncation_psi,
        synthetic_seed=seed,
        seeds=seeds,
    )
    overrides = parse_settings(settings or [], ClassifierConfig)
    config = ClassifierConfig(**overrides | ({} if resolution is None else {"size": resolution}))
    real = load_real(data, config.size, metadata=metadata, class_column=class_column, split=split, cache=cache)
    if trained_on(bundle.provenance) != real.train.sha256:
        typer.echo(
            "warning: the generator may have been trained on test images, which makes all numbers too good; train it on "
            "the training part alone (see docs/classifier.md)",
            err=True,
        )
    results = run_frame_removal(
        real,
        bundle,
        config,
        plan,
        out,
        weights=weights,
        device=device,
        target=resolve_device(device),
        cache=cache,
    )
    if results is None:
        typer.echo("stopped and saved; run the same command again to continue", err=True)
        raise typer.Exit(130)
    typer.echo(write_results(out, real.test, results, plan), nl=False)
    typer.echo(f"{out / TABLE}", err=True)
