"""Options of a federation, and the configuration that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.federated import StrategyName, TaskName

if TYPE_CHECKING:
    from training.federated.config import FederationConfig

TaskOption = Annotated[TaskName, typer.Option(help="What is trained.")]
RoundsOption = Annotated[int, typer.Option(help="Number of rounds.")]
IterationsOption = Annotated[int, typer.Option(help="Training steps of each client in a round.")]
ResolutionOption = Annotated[int, typer.Option(help="Image side in pixels.")]
StrategyOption = Annotated[StrategyName, typer.Option(help="How the server combines the updates of the clients.")]
NameOption = Annotated[str, typer.Option(help="Name of the bundle, or title of the classifier.")]
FederationOption = Annotated[
    list[str] | None,
    typer.Option("--federation", help="OPTION=VALUE of the federation (see docs/federated.md); may be repeated."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random; each client adds its own number.")]
StartOption = Annotated[
    str,
    typer.Option("--from", help="Initial weights: a bundle or .pkl; for a classifier imagenet, none, or a file."),
]
SizesOption = Annotated[
    str, typer.Option(help="Relative numbers of images of the hospitals; for three the default is 2000,12000,20000.")
]


def parse_sizes(text: str) -> list[float]:
    """Parse numbers that are separated by commas.

    Raises:
        TrainingError: One of them is not a number above 0.
    """
    from dermis.errors import TrainingError

    try:
        sizes = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        sizes = [-1.0]
    if any(size <= 0 for size in sizes):
        raise TrainingError(f"--sizes: {text!r}: give numbers above 0 separated by commas, such as 2000,12000,20000")
    return sizes


def full_path(start: str) -> str:
    """Return the value of --from so that it means the same in every folder: an existing file with its full path."""
    return str(Path(start).resolve()) if start not in ("", "imagenet", "none") and Path(start).exists() else start


def federation_config(settings: Sequence[str] | None, options: Sequence[str] | None, **values: Any) -> FederationConfig:
    """Configuration from the options of a command.

    Args:
        settings: OPTION=VALUE of the generator's or classifier's training.
        options: OPTION=VALUE of --federation, which override `values`.
        values: Fields of FederationConfig.

    Raises:
        TrainingError: A value is invalid, or values do not go together; the message names them.
    """
    from training.federated.config import FederationConfig, parse_options
    from training.federated.server.rounds import check_options

    federation = FederationConfig(**(values | {"options": " ".join(settings or [])} | parse_options(options or [])))
    check_options(federation)
    return federation
