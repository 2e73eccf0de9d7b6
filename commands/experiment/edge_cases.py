"""`dermis experiment edge-cases`: classifiers retrained with neighbours of edge cases, compared on edge cases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.options import (
    CACHE,
    AgreementOption,
    ArchitectureOption,
    CacheOption,
    ClassColumnOption,
    ClassifierBatchOption,
    ClassifierRateOption,
    ClassifierSizeOption,
    DataOption,
    DeviceOption,
    EpochsOption,
    FlipsOption,
    FreezeStagesOption,
    HeadOnlyOption,
    MetadataOption,
    NeighbourDistanceOption,
    NeighboursOption,
    NeighbourSpaceOption,
    OddsOption,
    PatienceOption,
    RotationOption,
    SplitOption,
    SplitSeedOption,
    TruncationOption,
    WeightsOption,
)


def edge_cases(
    data: DataOption,
    generator: Annotated[Path, typer.Option(help="Bundle with the classes benign and malignant.")],
    out: Annotated[Path, typer.Option(help="Folder for the neighbours, the runs and the table.")],
    split: SplitOption = None,
    split_seed: SplitSeedOption = 0,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    seeds: Annotated[int, typer.Option(help="Classifiers in each arm.")] = 5,
    generate: Annotated[
        int, typer.Option(help="Generated images, half of each class, among which edge cases are searched.")
    ] = 1000,
    cases: Annotated[
        int, typer.Option(help="Maximum number of edge cases to use, spread evenly over their ranking.")
    ] = 100,
    count: Annotated[int, typer.Option(help="Neighbours of each edge case.")] = 5,
    distance: NeighbourDistanceOption = 0.1,
    space: NeighbourSpaceOption = "w",
    truncation_psi: TruncationOption = 1.0,
    synthetic_seed: Annotated[
        int, typer.Option(help="Seed of the generated images; the arm with random ones has the next seed.")
    ] = 0,
    neighbours: NeighboursOption = 15,
    agreement: AgreementOption = 0.6,
    odds: OddsOption = 1.5,
    architecture: ArchitectureOption = "efficientnet_b2",
    weights: WeightsOption = "imagenet",
    size: ClassifierSizeOption = 256,
    epochs: EpochsOption = 20,
    patience: PatienceOption = 3,
    batch: ClassifierBatchOption = 32,
    learning_rate: ClassifierRateOption = 5e-4,
    rotation: RotationOption = 180.0,
    flips: FlipsOption = True,
    freeze_stages: FreezeStagesOption = 0,
    head_only: HeadOnlyOption = False,
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
) -> None:
    """Train without synthetic images, with neighbours of edge cases, and with as many random ones; compare on test images.

    Ctrl-C saves the state. Run the same command again to continue; finished parts are not repeated. Not a medical device.
    """
    from dermis.bundle import open_bundle, trained_on
    from dermis.devices import resolve_device
    from dermis.explain.edge_cases import Criteria
    from dermis.latent_neighbours import check_options
    from training.classifier.config import ClassifierConfig
    from training.classifier.data import load_real
    from training.experiments.edge_case_table import TABLE, write_results
    from training.experiments.edge_cases import EdgePlan, run_edge_cases

    check_options(distance, space)
    plan = EdgePlan(
        generate=generate,
        cases=cases,
        count=count,
        distance=distance,
        space=space,
        truncation_psi=truncation_psi,
        synthetic_seed=synthetic_seed,
        seeds=seeds,
        criteria=Criteria(neighbours, agreement, odds),
    )
    config = ClassifierConfig(
        architecture=architecture,
        size=size,
        epochs=epochs,
        patience=patience,
        batch=batch,
        learning_rate=learning_rate,
        rotation=rotation,
        flips=flips,
        freeze_stages=freeze_stages,
        head_only=head_only,
    )
    bundle = open_bundle(generator)
    real = load_real(
        data, size, metadata=metadata, class_column=class_column, split=split, split_seed=split_seed, cache=cache
    )
    if trained_on(bundle.provenance) != real.train.sha256:
        typer.echo(
            "warning: the generator may have been trained on test images, which makes the numbers of both arms with "
            "generated images too good; train it on the training part alone (see docs/classifier.md)",
            err=True,
        )
    results = run_edge_cases(
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
