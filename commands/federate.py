"""`dermis federate ...`: hospitals train together; played on one machine, or for real."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training.federated.config import FederationConfig

federate_app = typer.Typer(no_args_is_help=True, help="Train one generator or classifier at several hospitals.")

TaskOption = Annotated[str, typer.Option(help="gan or classifier.")]
RoundsOption = Annotated[int, typer.Option(help="Exchanges of weights.")]
IterationsOption = Annotated[int, typer.Option(help="Training steps of each member between two exchanges.")]
ResolutionOption = Annotated[int, typer.Option(help="Image side in pixels.")]
StrategyOption = Annotated[
    str,
    typer.Option(
        help="fedavg, fedprox, fedadam, fedadagrad, fedyogi, fedavgm, fedmedian, fedtrimmedavg, krum or multikrum."
    ),
]
NameOption = Annotated[str, typer.Option(help="Name of the bundle, or title of the classifier.")]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="OPTION=VALUE of the generator's or classifier's training; may be repeated."),
]
FederationOption = Annotated[
    list[str] | None,
    typer.Option("--federation", help="OPTION=VALUE of the federation (see docs/federated.md); may be repeated."),
]
LicenceOption = Annotated[str, typer.Option(help="Licence of the images, carried by the weights.")]
AttributionOption = Annotated[str, typer.Option(help="Whom users of the weights must credit.")]
SeedOption = Annotated[int, typer.Option(help="Decides everything random; each member adds its own number.")]
StartOption = Annotated[
    str, typer.Option("--from", help="Bundle or .pkl to begin with; of a classifier: imagenet, none, or a file.")
]


def parse_sizes(text: str) -> list[float]:
    """Numbers separated by commas. DermisError if they are none above 0."""
    from dermis.errors import TrainingError

    try:
        sizes = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        sizes = [-1.0]
    if any(size <= 0 for size in sizes):
        raise TrainingError(f"--sizes: {text!r}: give numbers above 0 separated by commas, such as 2000,12000,20000")
    return sizes


def federation_of(settings: Sequence[str] | None, options: Sequence[str] | None, **given: Any) -> FederationConfig:
    """From the options of a command, over which those of --federation win. TrainingError names what does not fit."""
    from training.federated.config import FederationConfig, parse_options
    from training.federated.server.rounds import check_options

    federation = FederationConfig(**(given | {"options": " ".join(settings or [])} | parse_options(options or [])))
    check_options(federation)
    return federation


@federate_app.command("simulate")
def simulate(
    data: Annotated[Path, typer.Option(help="Real images: anything that `dermis data` reads.")],
    out: Annotated[Path, typer.Option(help="Folder of the federation: its state, record, and result.")],
    hospitals: Annotated[int, typer.Option(help="How many; three have the paper's proportions unless --sizes.")] = 3,
    sizes: Annotated[str, typer.Option(help="Their proportions, such as 2000,12000,20000.")] = "",
    split: Annotated[
        Path | None, typer.Option(help="Folder of `dermis data split`: each of its parts is a hospital, but `rest`.")
    ] = None,
    metadata: Annotated[Path | None, typer.Option(help="CSV file; default: metadata.csv in --data.")] = None,
    class_column: Annotated[str | None, typer.Option(help="CSV column of the classes; default: target, ...")] = None,
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
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    cache: Annotated[Path, typer.Option(help="Where decoded images and features are kept.")] = Path(".dermis/cache"),
) -> None:
    """Play hospitals on this machine: the images are divided by patient, and each part trains as a member.

    The same code as in a real federation, in one process and without a network. Ctrl-C loses no finished round; the same
    command goes on.
    """
    from dataclasses import replace

    from commands.federate_screen import screen
    from training.data.sources import read_source
    from training.federated.simulation.simulate import divide, hospital_sites, hospital_sizes, hospitals_of_split
    from training.federated.simulation.simulate import simulate as run

    parts = None if split is None else hospitals_of_split(split)
    wanted = parts or hospital_sizes(hospitals, parse_sizes(sizes))
    federation = federation_of(
        settings,
        options,
        task=task,
        rounds=rounds,
        iterations=iterations,
        resolution=resolution,
        strategy=strategy,
        name=name,
        start=start,
        seed=seed,
        licence=licence,
        attribution=attribution,
        clients=len(wanted),
        min_clients=min(2, len(wanted)),
    )
    federation = replace(federation, clients=len(wanted))
    if parts is None:
        source = read_source(data, metadata=metadata, class_column=class_column, binary=federation.binary)
        tables = divide(source, hospital_sizes(hospitals, parse_sizes(sizes)), out, seed)
    else:
        tables = parts
    sites = hospital_sites(data, tables, out, class_column=class_column, cache=cache, device=device)
    try:
        with screen(out) as tell:
            run(federation, list(sites.values()), out, tell=tell)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on with the last finished round", err=True)
        raise typer.Exit(130) from None
    result = out / ("bundle" if federation.task == "gan" else "classifier")
    typer.echo(f"{result}: after {federation.rounds} rounds of {federation.iterations} steps at {len(sites)} hospitals")


@federate_app.command("watch")
def watch(
    out: Annotated[Path, typer.Argument(help="Folder of the federation, on the server.")],
    once: Annotated[bool, typer.Option("--once", help="Show the screen once, and end.")] = False,
) -> None:
    """Rounds, members, losses and distances of a federation on one screen, while it runs or afterwards."""
    from commands.federate_screen import follow

    follow(out, once=once)
