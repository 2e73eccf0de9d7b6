"""`dermis experiment hospitals`: a generator trained at each hospital alone, at all together, and centrally."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from commands.console import table_console
from commands.federate.options import FederationOption, SizesOption, parse_sizes
from commands.options import (
    CACHE,
    AttributionOption,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    ExtractorOption,
    LicenceOption,
    MetadataOption,
    SettingsOption,
    TrainingSeedOption,
)


def hospitals(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder for the runs, the table and the curves.")],
    only: Annotated[list[str] | None, typer.Option(help="Run only this arm now; may be repeated.")] = None,
    sizes: SizesOption = "",
    kimg: Annotated[
        float | None, typer.Option(help="Images shown at each hospital, in thousands; default: 100 rounds.")
    ] = None,
    resolution: Annotated[int, typer.Option(help="Image side in pixels.")] = 256,
    settings: SettingsOption = None,
    federation: FederationOption = None,
    seed: TrainingSeedOption = 0,
    extractor: ExtractorOption = "inception",
    samples: Annotated[int | None, typer.Option(help="Generated images of an evaluation; default 500.")] = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
) -> None:
    """Train a generator centrally, at each of three hospitals alone, and at all of them together, and compare them.

    The images are divided by patient. Ctrl-C loses no finished round; run the same command again to continue.
    """
    from dataclasses import replace

    import torch
    from rich.markdown import Markdown
    from rich.text import Text

    from dermis.errors import TrainingError
    from training.data.sources import read_source
    from training.experiments.hospital_curves import draw_curves
    from training.experiments.hospitals import plan, run_arm, write_results
    from training.federated.config import FederationConfig, gan_config, parse_options
    from training.federated.simulation.simulate import hospital_sizes

    logging.getLogger("flwr").setLevel(logging.WARNING)
    values: dict[str, Any] = {
        "name": "hospitals",
        "options": " ".join(settings or []),
        "resolution": resolution,
        "seed": seed,
        "extractor": extractor,
        "licence": licence,
        "attribution": attribution,
    }
    if samples is not None:
        values["evaluate_images"] = samples
    config = FederationConfig(**(values | parse_options(federation or [])))
    if kimg is not None:
        batch = gan_config(config, torch.device("cpu")).batch
        config = replace(config, rounds=max(round(kimg * 1000 / batch / config.iterations), 1))
    source = read_source(data, metadata=metadata, class_column=class_column, binary=config.binary)
    experiment = plan(
        source,
        data,
        out,
        config,
        hospital_sizes(3, parse_sizes(sizes)),
        class_column=class_column,
        cache=cache,
        device=device,
    )
    if unknown := set(only or ()) - set(experiment.arms):
        raise TrainingError(f"--only: {min(unknown)} is none of {', '.join(experiment.arms)}")
    for arm in only or experiment.arms:
        try:
            run_arm(experiment, arm, lambda text, arm=arm: typer.echo(f"{arm}: {text}", err=True))  # type: ignore[misc]
        except KeyboardInterrupt:
            typer.echo(
                f"{arm}: stopped; run the same command again to continue after the last finished round", err=True
            )
            raise typer.Exit(130) from None
    write_results(experiment)
    draw_curves(experiment)
    console, table = table_console(), (out / "table.md").read_text()
    console.print(Markdown(table) if console.is_terminal else Text(table))
    typer.echo(f"{out / 'table.md'}, {out / 'results.json'} and {out / 'curves.svg'} written", err=True)
