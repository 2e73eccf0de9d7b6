"""`dermis experiment edge-cases`: does retraining with neighbours of edge cases help on edge cases?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.explain_edge_cases import AgreementOption, NeighboursOption, OddsOption


def edge_cases_experiment(
    data: Annotated[Path, typer.Option(help="Real images: anything that `dermis data` reads. Melanoma is malignant.")],
    generator: Annotated[Path, typer.Option(help="A bundle that draws benign and malignant images.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs, the neighbours and the table.")],
    split: Annotated[
        Path | None, typer.Option(help="Folder of `dermis data split` with train, validation and test.")
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Without --split: of the division by patient, 65, 15 and 20 %.")] = 0,
    metadata: Annotated[Path | None, typer.Option(help="CSV file; default: metadata.csv in --data.")] = None,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the diagnosis; default: target, ...")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each arm.")] = 5,
    generate: Annotated[
        int, typer.Option(help="Images to draw and look for edge cases in, half of each class.")
    ] = 1000,
    cases: Annotated[int, typer.Option(help="Of these edge cases at most, spread evenly over their ranking.")] = 100,
    count: Annotated[int, typer.Option(help="Neighbours of each.")] = 5,
    distance: Annotated[float, typer.Option(help="Of the neighbours, as in `dermis augment edge-cases`.")] = 0.1,
    space: Annotated[str, typer.Option(help="w or z.")] = "w",
    truncation_psi: Annotated[float, typer.Option(help="Of all images that are drawn.")] = 1.0,
    synthetic_seed: Annotated[int, typer.Option(help="Of the images that are drawn; random ones have the next.")] = 0,
    neighbours: NeighboursOption = 15,
    agreement: AgreementOption = 0.6,
    odds: OddsOption = 1.5,
    architecture: Annotated[
        str, typer.Option(help="As `dermis train classifier` has it, and so below.")
    ] = "efficientnet_b2",
    weights: Annotated[str, typer.Option(help="To begin with: imagenet, none, or a .safetensors file.")] = "imagenet",
    size: Annotated[int, typer.Option(help="Image side in pixels that the network sees.")] = 256,
    epochs: Annotated[int, typer.Option(help="At most.")] = 20,
    patience: Annotated[int, typer.Option(help="Epochs without a better AUC on validation before a run ends.")] = 3,
    batch: Annotated[int, typer.Option(help="Images a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Of Adam.")] = 5e-4,
    rotation: Annotated[float, typer.Option(help="Turn training images by up to so many degrees; 0: not.")] = 180.0,
    flips: Annotated[bool, typer.Option(help="Flip training images at random.")] = True,
    freeze_stages: Annotated[int, typer.Option(help="Keep the stem and so many stages as they are.")] = 0,
    head_only: Annotated[
        bool, typer.Option("--head-only", help="Train the last layer only; fastest with --rotation 0 --no-flips.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[Path, typer.Option(help="Where images and features are kept.")] = Path(".dermis/cache"),
) -> None:
    """Train without synthetic images, with neighbours of edge cases, and with as many random ones; compare on test images.

    Ctrl-C saves; the same command goes on, and passes over what is done. Not a medical device.
    """
    from dermis.bundle import open_bundle
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
        space=space,  # type: ignore[arg-type]
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
    trained_on = bundle.provenance.get("dataset")
    if not isinstance(trained_on, dict) or trained_on.get("sha256") != real.train.sha256:
        typer.echo(
            "warning: the generator may have seen test images, and then the numbers of both arms with generated images "
            "are too good; train it on the training part alone (see docs/classifier.md)",
            err=True,
        )
    measured = run_edge_cases(
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
    if measured is None:
        typer.echo("stopped and saved; the same command goes on", err=True)
        raise typer.Exit(130)
    typer.echo(write_results(out, real.test, measured, plan), nl=False)
    typer.echo(f"{out / TABLE}", err=True)
