"""`dermis federate simulate` and `watch`: a federation in one process, and a view of any federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.federate.options import (
    FederationOption,
    IterationsOption,
    NameOption,
    ResolutionOption,
    RoundsOption,
    SeedOption,
    SizesOption,
    StartOption,
    StrategyOption,
    TaskOption,
    federation_config,
    full_path,
    parse_sizes,
)
from commands.options import (
    CACHE,
    AttributionOption,
    CacheOption,
    ClassColumnOption,
    DataOption,
    DeviceOption,
    LicenceOption,
    LogOption,
    MetadataOption,
    SettingsOption,
)


def simulate(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder of the federation: its state, record and result.")],
    hospitals: Annotated[int, typer.Option(help="Number of hospitals.")] = 3,
    sizes: SizesOption = "",
    split: Annotated[
        Path | None,
        typer.Option(help="Folder of `dermis data split`: each of its parts, except `rest`, is a hospital."),
    ] = None,
    metadata: MetadataOption = None,
    class_column: ClassColumnOption = None,
    task: TaskOption = "gan",
    rounds: RoundsOption = 100,
    iterations: IterationsOption = 100,
    resolution: ResolutionOption = 64,
    strategy: StrategyOption = "fedavg",
    name: NameOption = "federation",
    settings: SettingsOption = None,
    options: FederationOption = None,
    start: StartOption = "",
    seed: SeedOption = 0,
    licence: LicenceOption = "unknown",
    attribution: AttributionOption = "",
    log: LogOption = None,
    device: DeviceOption = "auto",
    cache: CacheOption = CACHE,
) -> None:
    """Simulate hospitals on this machine: the images are divided by patient, and each part trains as a client.

    This is the code of a real federation, in one process and without a network. Ctrl-C loses no finished round; the same
    command continues.
    """
    from dataclasses import replace

    from commands.federate.screen import screen
    from training.data.sources import read_source
    from training.federated.simulation.simulate import divide, hospital_sites, hospital_sizes, hospitals_of_split
    from training.federated.simulation.simulate import simulate as run
    from training.loggers import check_loggers

    loggers = check_loggers(log or ())
    parts = None if split is None else hospitals_of_split(split)
    shares = {} if parts else hospital_sizes(hospitals, parse_sizes(sizes))
    clients = len(parts or shares)
    federation = federation_config(
        settings,
        options,
        task=task,
        rounds=rounds,
        iterations=iterations,
        resolution=resolution,
        strategy=strategy,
        name=name,
        start=full_path(start),
        seed=seed,
        licence=licence,
        attribution=attribution,
        clients=clients,
        min_clients=min(2, clients),
    )
    federation = replace(federation, clients=clients)
    if parts is None:
        source = read_source(data, metadata=metadata, class_column=class_column, binary=federation.binary)
        tables = divide(source, shares, out, seed)
    else:
        tables = parts
    sites = hospital_sites(data, tables, out, class_column=class_column, cache=cache, device=device)
    try:
        with screen(out) as report:
            run(federation, list(sites.values()), out, on_progress=report, loggers=loggers)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to continue after the last finished round", err=True)
        raise typer.Exit(130) from None
    result = out / ("bundle" if federation.task == "gan" else "classifier")
    typer.echo(f"{result}: after {federation.rounds} rounds of {federation.iterations} steps at {len(sites)} hospitals")


def watch(
    out: Annotated[Path, typer.Argument(help="Folder of the federation, at the server.")],
    once: Annotated[bool, typer.Option("--once", help="Show the state once and exit.")] = False,
) -> None:
    """Show rounds, clients, losses and distances of a federation, while it runs or afterwards."""
    from commands.federate.screen import follow

    follow(out, once=once)
