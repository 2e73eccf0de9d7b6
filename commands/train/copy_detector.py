"""`dermis train copy-detector`: a detector of training images that were changed before they were passed on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.console import table_console
from commands.options import (
    CACHE,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    LogOption,
    MetadataOption,
    ResumeOption,
    TrainingSeedOption,
)

if TYPE_CHECKING:
    from dermis.bundle.copies import CopiesDescription
    from training.data.images import ImageDataset


def train_copy_detector(
    data: DataOption,
    calibration: Annotated[
        Path,
        typer.Option(
            help="Real images of other patients, at least 200, for the threshold: a CSV of other images of --data, or a folder."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run folder: checkpoint, log, and the folder `copies`.")],
    metadata: MetadataOption = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Real images to measure with, of patients who are in neither of the other sets: a CSV or a folder."
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Bundle of the generator: its resolution is used, and its training set compared."),
    ] = None,
    attach: Annotated[
        bool, typer.Option("--attach", help="Put the detector into --bundle, which gets a new digest.")
    ] = False,
    resolution: Annotated[int, typer.Option(help="Side of the images in pixels, without --bundle.")] = 128,
    steps: Annotated[int, typer.Option(help="Number of steps.")] = 2000,
    batch: Annotated[int, typer.Option(help="Images in a step.")] = 64,
    learning_rate: Annotated[float, typer.Option(help="Maximum learning rate of AdamW.")] = 5e-4,
    size: Annotated[int, typer.Option(help="Side in pixels of the network's input.")] = 96,
    dim: Annotated[int, typer.Option(help="Dimensions of a descriptor.")] = 64,
    pretrained: Annotated[bool, typer.Option(help="Start from the weights of ImageNet.")] = True,
    seed: TrainingSeedOption = 0,
    class_column: ClassColumnOption = None,
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
    resume: ResumeOption = False,
    log: LogOption = None,
) -> None:
    """Train a detector that recognises training images after mirroring, cropping, recolouring and other changes.

    --data are the images that the generator was trained on. Ctrl-C saves; --resume continues.
    """
    from dermis.bundle import amend_bundle, open_bundle, trained_on
    from dermis.errors import RequestError
    from training.copies.config import CopiesConfig
    from training.copies.run import train_copy_detector as run
    from training.data.isic import load_isic
    from training.evaluation.holdout import check_holdout
    from training.loggers import check_loggers

    loggers = check_loggers(log or ())
    config = CopiesConfig(
        size=size,
        dim=dim,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        pretrained=pretrained,
        seed=seed,
    )
    if attach and bundle is None:
        raise RequestError("--attach", "needs --bundle, the bundle to put the detector into")
    if not 32 <= resolution <= 4096:
        raise RequestError("--resolution", f"{resolution} must be from 32 to 4096")
    opened = None if bundle is None else open_bundle(bundle)
    side = resolution if opened is None else opened.generator.img_resolution

    def load(folder: Path, csv: Path | None) -> ImageDataset:
        return load_isic(folder, side, class_column=class_column, metadata=csv, cache=cache)

    def other(place: Path) -> ImageDataset:
        return load(data, place) if place.suffix.lower() == ".csv" else load(place, None)

    real, for_threshold = load(data, metadata), other(calibration)
    training_set = None if opened is None else trained_on(opened.provenance)
    check_holdout(real, for_threshold, training_set, option="--calibration")
    measured = None if held_out is None else other(held_out)
    if measured is not None:
        check_holdout(real, measured, training_set, option="--held-out")
        check_holdout(for_threshold, measured, None, option="--held-out", data_option="--calibration")
    if training_set is not None and training_set != real.sha256:
        typer.echo("warning: --data is not the set that the bundle names as its training set", err=True)
    result = run(real, for_threshold, config, out, held_out=measured, device=device, resume=resume, loggers=loggers)
    if result is None:
        typer.echo("stopped and saved; run the same command with --resume to continue", err=True)
        raise typer.Exit(130)
    _show(result.description)
    typer.echo(f"{result.folder}: {result.progress.step:,} steps in {result.progress.seconds / 60:.0f} min")
    if attach and opened is not None:
        amended = amend_bundle(opened, parts={"copies": result.folder})
        typer.echo(f"{bundle}: {amended.name}@{amended.digest}")


def _show(description: CopiesDescription) -> None:
    from rich.table import Table

    columns = {
        "training": "copies of training images",
        "other_references": "of images that the network was not trained on",
    }
    measured = {key: description.metrics[key] for key in columns if key in description.metrics}
    table = Table("found", *(columns[key] for key in measured))
    for name in measured["training"]["found"]:
        table.add_row(name, *(f"{row['found'][name]:.1%}" for row in measured.values()))
    table.add_row(
        "false alarms", *(f"{row['false_alarms']:.2%} of {row['others']:,} other images" for row in measured.values())
    )
    table_console().print(table)
